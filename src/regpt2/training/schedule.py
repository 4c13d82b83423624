"""Learning rate and attention's window as pure functions of the step. In: a step from 1; out: what that update uses."""

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
    """Tokens that attention reaches back in the first updates; it grows linearly. 0 = model.window all along."""
    window_to: int = 0
    """The same in the last updates; 0 = model.window."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps = {self.warmup_steps} must be at least 0.")
        for name in ("min_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name} = {getattr(self, name)} must lie between 0 and 1.")
        for name in ("window_from", "window_to"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name} = {getattr(self, name)} must be at least 0 tokens.")
        if self.window_to and not self.window_from:
            raise ConfigError(
                f"schedule.window_to = {self.window_to:,} has no effect without schedule.window_from: give the window "
                "of the first updates too."
            )

    def check_window(self, architecture: str, model_window: int | None) -> None:
        """Refuse a window that this model cannot have; `model_window` is None for a model that never has one.

        Raises:
            ConfigError: there is no model.window to grow to, or the window would shrink, or outgrow it.
        """
        start, end = self.window_from, self.window_to or model_window or 0
        if not start:
            return
        if model_window is None:
            raise ConfigError(
                f"schedule.window_from = {start:,} lets attention's window grow, and model.architecture = "
                f"{architecture} has no window. Remove it, or use model.architecture = modern with model.window."
            )
        if not model_window:
            raise ConfigError(
                f"schedule.window_from = {start:,} needs a window to grow to, and model.window = 0 lets attention "
                "reach all tokens before; set model.window to that of the finished model."
            )
        if end > model_window:
            raise ConfigError(
                f"schedule.window_to = {end:,} must be at most model.window = {model_window:,}, the window of the "
                "finished model."
            )
        if start > end:
            name = "schedule.window_to" if self.window_to else "model.window"
            raise ConfigError(
                f"schedule.window_from = {start:,} must be at most {name} = {end:,}: the window grows during training."
            )


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


def window_at(config: ScheduleConfig, model_window: int, step: int, max_steps: int) -> int:
    """Tokens that attention reaches back in update `step`, from 1, itself included; 0: all before.

    It grows linearly, in multiples of 128 tokens if both ends are such, as attention skips whole blocks of 128, else of
    the largest power of two that divides both. Each window lasts equally long, the first and the last too. Step 0,
    before any update, has the window of the first.
    """
    start, end = config.window_from, config.window_to or model_window
    if not start:
        return model_window
    block = math.gcd(start, end, 128)
    n_windows = (end - start) // block + 1
    return start + block * min(n_windows - 1, max(0, step - 1) * n_windows // max_steps)


def mean_window(config: ScheduleConfig, model_window: int) -> float:
    """The mean of `window_at` over a long run."""
    return ((config.window_to or model_window) + config.window_from) / 2 if config.window_from else model_window
