"""The learning rate as a pure function of the step. In: a step from 1; out: the rate for that update."""

import math
from dataclasses import dataclass
from typing import Literal

from regpt2.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then decay to `min_lr_fraction` of the peak at max_steps."""

    kind: Literal["cosine", "stable_linear", "constant"] = "cosine"
    """cosine: GPT-3's; stable_linear: the peak held, then a straight line down; constant: the peak held."""
    warmup_steps: int = 715
    """Updates from 0 to the peak: 375M tokens in GPT-3 (arXiv:2005.14165, appendix B)."""
    min_lr_fraction: float = 0.1
    """The rate at the end, as a fraction of the peak."""
    decay_fraction: float = 0.4
    """stable_linear: the fraction of max_steps during which the rate decays."""
    window_from: int = 0
    """Tokens that attention reaches back in the first update; it grows linearly. 0 = model.window all along."""
    window_to: int = 0
    """The same in the last update; 0 = model.window."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps = {self.warmup_steps} must be at least 0.")
        for name in ("min_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name} = {getattr(self, name)} must lie between 0 and 1.")


def learning_rate(config: ScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """The rate of update `step`, from 1; the first is above zero. "cosine" is the lecture's get_lr(step - 1)."""
    done = step - 1
    if done < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.kind == "constant":
        return peak
    floor = peak * config.min_lr_fraction
    if config.kind == "cosine":
        way = min(1.0, (done - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
        return floor + 0.5 * (1 + math.cos(math.pi * way)) * (peak - floor)
    left = (max_steps - done) / max(1.0, config.decay_fraction * max_steps)
    return floor + max(0.0, min(1.0, left)) * (peak - floor)
