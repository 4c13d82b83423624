"""What a check takes and returns. In: a run's configuration, the ranks; out: a `Patient` to check, a `CheckResult`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from regpt2.base.device import Precision, choose_compute, compiles, precisions
from regpt2.base.ranks.world import World
from regpt2.config.run import RunConfig
from regpt2.machine.health import agreement
from regpt2.model.flops import adapter_numbers, n_weights


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    status: Literal["ok", "warn", "FAIL"]
    found: str
    advice: str = ""  # what was expected, and what to do
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Patient:
    """This rank, its machine, and the run that it is to train."""

    world: World
    config: RunConfig
    of_recipe: bool = False  # False: no recipe was given; the configuration has the defaults
    ranks_here: int = 1  # on this machine
    quick: bool = False

    @property
    def n_params(self) -> int:
        """Of the model, its padding rows included."""
        return n_weights(self.config.model)

    @property
    def n_trained(self) -> int:
        """Those that have gradients and moments: with LoRA the adapters alone."""
        return adapter_numbers(self.config.model, self.config.lora.rank) or self.n_params

    @property
    def saved_bytes(self) -> int:
        """Of a checkpoint: fp32 weights, AdamW's two moments, and an average of the weights if there is one."""
        return 4 * self.n_params + (12 if self.config.optim.ema else 8) * self.n_trained

    @property
    def best_bytes(self) -> int:
        """Of the best checkpoint, fp32 weights alone; 0 if none is kept."""
        return 4 * self.n_params if self.config.keep_best else 0

    @cached_property
    def trials(self) -> tuple[agreement.Trial, ...]:
        """Small models to compute on the device; their exact results take a second."""
        return agreement.trials(self.config.model, self.config.batch.seq_len)

    @property
    def compiles(self) -> bool:
        return compiles(self.config.compile, self.world.device)

    @property
    def pass_tokens(self) -> int:
        """Rows of a matmul in training, or enough of them to time its rate in a short time."""
        batch, most = self.config.batch, 512 if self.world.device.type == "cpu" else 16_384
        return min(batch.micro_batch * batch.seq_len, most)

    @property
    def supported(self) -> list[Precision]:
        return [*precisions(self.world.device)]

    @property
    def precision(self) -> Precision:
        """What training computes in; fp32 if training will refuse the recipe's, which the check `precision` reports."""
        asked = self.config.precision if self.config.precision in ("auto", *self.supported) else "fp32"
        return choose_compute(asked, self.world.device).precision


Check = Callable[[Patient], CheckResult]
