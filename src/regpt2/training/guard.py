"""Watches losses. In: each update's loss and whether it was made; out: remarks, a limit for the next, or a stop."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from regpt2.base.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do with updates that look wrong. Those with a loss or gradient that is not finite are always skipped."""

    spikes: Literal["report", "skip", "off"] = "report"
    """A loss far above those before it: say so, skip the update, or nothing."""
    spike_z: float = 6.0
    """How many standard deviations above the mean of the window make a spike."""
    window: int = 128
    """Updates that the mean and deviation are taken over; before half of them are seen nothing is a spike."""
    max_skipped: int = 3
    """So many skipped updates in a row stop the run."""

    def __post_init__(self) -> None:
        for name in ("window", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"guard.{name} = {getattr(self, name)} must be at least 1.")
        if not self.spike_z > 0:
            raise ConfigError(f"guard.spike_z = {self.spike_z} must be above 0.")


class Guard:
    """The state is small and goes into the checkpoint. The losses of skipped updates never enter the window."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.skipped_in_a_row = 0

    def spike_limit(self) -> float:
        """The loss above which the next update is a spike; infinite while too few are known."""
        if self.config.spikes == "off" or len(self.losses) < max(2, self.config.window // 2):
            return math.inf
        return statistics.fmean(self.losses) + self.config.spike_z * max(1e-3, statistics.pstdev(self.losses))

    def loss_limit(self) -> float:
        """What `train_step` skips above."""
        return self.spike_limit() if self.config.spikes == "skip" else math.inf

    def observe(self, step: int, loss: float, grad_norm: float, *, accepted: bool, counted: bool = True) -> list[str]:
        """Take in one update; returns what should be said about it. A skip that is not `counted` was to be expected.

        Raises:
            Problem: too many updates in a row were skipped.
        """
        remarks = []
        if not accepted:
            self.skipped_in_a_row += counted
            remarks.append(f"step {step}: skipped, loss {loss:.4g}, gradient norm {grad_norm:.4g}")
            if self.skipped_in_a_row >= self.config.max_skipped:
                raise Problem(
                    f"{self.skipped_in_a_row} updates in a row were skipped, the last at step {step} with loss "
                    f"{loss:.4g} and gradient norm {grad_norm:.4g}. Lower optim.lr, or use --precision fp32 to see "
                    "whether the arithmetic is to blame. The weights are still those of the last update that was made."
                )
            return remarks
        self.skipped_in_a_row = 0
        if loss > self.spike_limit():
            remarks.append(f"step {step}: loss {loss:.4f} is a spike (expected below {self.spike_limit():.4f})")
        self.losses.append(loss)
        return remarks

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self.losses), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.skipped_in_a_row = state["skipped_in_a_row"]
