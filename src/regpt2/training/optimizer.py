"""The optimizer of a run. In: a model and a config; out: a torch optimizer from the shelf, and its state by name."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regpt2.base import plugins
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.training.parallel import shard_like


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """GPT-3's AdamW (arXiv:2005.14165, appendix B)."""

    name: str = "adamw"
    """An entry of the shelf training/optim/."""
    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Pulls matrices, not vectors, towards zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares, per update."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    grad_clip: float = 1.0
    """The largest norm of the whole gradient; 0 = no clipping."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"optim.lr = {self.lr} must be above 0 and finite.")
        if not self.eps > 0:
            raise ConfigError(f"optim.eps = {self.eps} must be above 0: weights that never had a gradient are 0 / eps.")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"optim.{name} = {getattr(self, name)} must be at least 0 and finite.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas = {self.betas} must each be at least 0 and below 1.")
        if self.name not in plugins.entries("training.optim"):
            plugins.load("training.optim", self.name)  # raises, with the names that there are


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer named in `config`, over all parameters of `model`."""
    optimizer: torch.optim.Optimizer = plugins.load("training.optim", config.name).build(
        list(model.named_parameters()), config
    )
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/kind` -> tensor, not copied. Empty before the first update."""
    return {
        f"{name}/{kind}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, on each parameter's device.

    Raises:
        CheckpointError: state for another set of parameters, or of other shapes.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, kind = key.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(
                f"the optimizer state is of another model: it has {key!r}, the model has no {name!r}."
            )
        p = parameters[name]
        if value.dim() and value.shape != p.shape:
            raise CheckpointError(f"optimizer state {key!r} is {tuple(value.shape)}, expected {tuple(p.shape)}.")
        if value.dim():
            value = shard_like(value.to(p.device), p)
        else:  # a counter of steps: beside the parameter for fused kernels only
            value = value.to(p.device) if optimizer.defaults.get("fused") else value.clone()
        found.setdefault(name, {})[kind] = value
    missing = sorted(set(parameters) - set(found)) if found else []
    if missing:
        raise CheckpointError(f"the optimizer state lacks {len(missing)} parameters, the first is {missing[0]!r}.")
    for name, state in found.items():
        optimizer.state[parameters[name]] = state
