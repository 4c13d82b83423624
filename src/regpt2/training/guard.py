"""Watches losses. In: each update's loss and whether it was made; out: a limit for the next, remarks, or a stop.

The limit stays on the device and is computed from the losses of all updates before, read or not. So which updates are
skipped does not depend on when a line is logged, a checkpoint is saved, or the run is stopped and resumed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regpt2.base.errors import ConfigError, Problem
from regpt2.training.step import StepStats


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do with updates that look wrong. Those with a loss or gradient that is not finite are always skipped."""

    spikes: Literal["report", "skip", "off"] = "report"
    """If a loss is far above those before it: report it, skip the update, or do nothing."""
    spike_z: float = 6.0
    """Standard deviations above the window's mean from which a loss is a spike."""
    window: int = 128
    """Updates in the window of mean and deviation; before half of them are seen, nothing counts as a spike."""
    max_skipped: int = 3
    """Skipped updates in a row that stop the run; overflows do not count while fp16 searches its loss scale."""

    def __post_init__(self) -> None:
        for name in ("window", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"guard.{name} = {getattr(self, name)} must be at least 1.")
        if not self.spike_z > 0:
            raise ConfigError(f"guard.spike_z = {self.spike_z} must be above 0.")


class Guard:
    """The state is small and goes into the checkpoint. The losses of skipped updates never enter the window."""

    def __init__(self, config: GuardConfig, device: torch.device | None = None) -> None:
        self.config = config
        self.losses = torch.full((config.window,), math.nan, device=device)
        """(window,): losses of the newest updates that were made, the newest last; NaN while there are fewer."""
        self.spike_limit = self._limit()
        """The loss above which the next update is a spike, on the device; infinite while too few losses are known."""
        self.skipped_in_a_row = 0

    @property
    def skips_spikes(self) -> bool:
        """Skip a spike, or only report it?"""
        return self.config.spikes == "skip"

    def take_in(self, stats: StepStats) -> None:
        """After every update: its loss enters the window if the update was made. Does not wait for the device."""
        newest = stats.loss.to(self.losses.dtype).reshape(1)
        made = torch.cat([self.losses[1:], newest])
        self.losses = torch.where(stats.accepted > 0, made, self.losses)
        self.spike_limit = self._limit()

    def _limit(self) -> Tensor:
        if self.config.spikes == "off":
            return torch.full_like(self.losses[0], math.inf)
        known = ~self.losses.isnan()
        n = known.sum()
        mean = torch.where(known, self.losses, 0.0).sum() / n
        deviation = (torch.where(known, self.losses - mean, 0.0).square().sum() / n).sqrt()
        limit = mean + self.config.spike_z * deviation.clamp(min=1e-3)
        return torch.where(n < max(2, self.config.window // 2), math.inf, limit)

    def observe(
        self, step: int, loss: float, grad_norm: float, *, accepted: bool, spike_limit: float, scale: float = 1.0
    ) -> list[str]:
        """Count one update, once its numbers have been read, in the order of updates; returns the notes to record.

        Args:
            spike_limit: what its loss was compared with.
            scale: the loss scale that it was made with; above 1 a gradient may overflow until the scale is found.

        Raises:
            Problem: too many updates in a row were skipped.
        """
        if accepted:
            self.skipped_in_a_row = 0
            spike = f"step {step}: loss {loss:.4f} is a spike (expected below {spike_limit:.4f})"
            return [spike] if loss > spike_limit else []
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.skipped_in_a_row += finite or scale <= 1.0
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise Problem(self._too_many(step, loss, grad_norm, finite))
        why = f" is a spike (expected below {spike_limit:.4f})" if finite else ""
        return [f"step {step}: skipped, loss {loss:.4g}{why}, gradient norm {grad_norm:.4g}"]

    def _too_many(self, step: int, loss: float, grad_norm: float, finite: bool) -> str:
        mend = "use --precision fp32 to see whether the arithmetic is to blame"
        if finite:
            mend = f"raise --guard.spike-z above {self.config.spike_z:g}, or keep spikes with --guard.spikes report"
        return (
            f"{self.skipped_in_a_row} updates in a row were skipped, the last at step {step} with loss {loss:.4g} and "
            f"gradient norm {grad_norm:.4g}. Lower optim.lr, or {mend}. A skipped update has changed no weight."
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        losses = self.losses.tolist()
        return {
            "losses": [loss for loss in losses if not math.isnan(loss)],
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        newest = state["losses"][-self.config.window :]
        missing = [math.nan] * (self.config.window - len(newest))
        self.losses = self.losses.new_tensor([*missing, *newest])
        self.spike_limit = self._limit()
        self.skipped_in_a_row = state["skipped_in_a_row"]
