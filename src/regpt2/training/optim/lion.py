"""Lion (arXiv:2302.06675): each weight moves by the learning rate, in the direction of a mean gradient's sign.

One running mean, half of AdamW's state. The paper takes a learning rate 3 to 10 times smaller than AdamW's, a weight
decay as many times larger, and betas 0.95 and 0.98 for language models.
"""

from typing import Any

import torch
from torch import Tensor

from regpt2.base.ranks.world import World
from regpt2.training.optimizer import NamedParameters, NeverCompiled, OptimConfig, assign, parameter_groups

IGNORES = ("eps", "muon")
MEANS = (1, 1)


class Lion(NeverCompiled):
    """betas[0] mixes the newest gradient into the direction, betas[1] into the mean that is kept."""

    found_inf: Tensor | None = None
    """1 on the device where an update is to be skipped."""
    _step_supports_amp_scaling = True  # torch's word for: looks at found_inf

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        skipped = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, skipped)

    def _update(self, p: Tensor, group: dict[str, Any], skipped: Tensor | None) -> None:
        if not self.state[p]:
            self.state[p]["mean"] = torch.zeros_like(p)
        mean, lr, (beta1, beta2) = self.state[p]["mean"], group["lr"], group["betas"]
        assert p.grad is not None, "step() leaves those out"
        direction = mean.lerp(p.grad, 1 - beta1).sign()
        assign(p, p * (1 - lr * group["weight_decay"]) - lr * direction, skipped)
        assign(mean, mean.lerp(p.grad, 1 - beta2), skipped)


def build(
    named_parameters: NamedParameters, config: OptimConfig, world: World, compiled: bool
) -> torch.optim.Optimizer:
    """Over all parameters, with AdamW's groups."""
    return Lion(parameter_groups(named_parameters, config), {"lr": config.lr, "betas": config.betas})
