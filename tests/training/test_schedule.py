"""The learning rate: the lecture's at every step, above zero at the first, down to its floor at the last."""

import math
from itertools import pairwise

import pytest

from regpt2.base.errors import ConfigError
from regpt2.training.schedule import ScheduleConfig, learning_rate


def lecture_lr(it: int) -> float:
    """The lecture's rule, written from its description: 715 steps up, cosine down to a tenth at 19,073."""
    peak, floor, warmup, last = 6e-4, 6e-5, 715, 19_073
    if it < warmup:
        return peak * (it + 1) / warmup
    return floor + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (last - warmup))) * (peak - floor)


def test_the_default_is_the_lectures_schedule_at_every_step() -> None:
    config = ScheduleConfig()
    for step in range(1, 19_074):
        assert learning_rate(config, 6e-4, step, 19_073) == pytest.approx(lecture_lr(step - 1), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "stable_linear"])
def test_it_rises_then_never_rises_again_and_ends_near_the_floor(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=10, min_lr_fraction=0.1)
    rates = [learning_rate(config, 1.0, step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert 0.1 <= rates[-1] < 0.13


def test_stable_linear_holds_the_peak_then_falls_in_a_straight_line() -> None:
    config = ScheduleConfig(kind="stable_linear", warmup_steps=10, min_lr_fraction=0.0, decay_fraction=0.4)
    rates = [learning_rate(config, 1.0, step, 100) for step in range(1, 101)]
    assert set(rates[9:61]) == {1.0}
    falls = {round(a - b, 9) for a, b in pairwise(rates[61:])}
    assert falls == {0.025}


def test_constant_stays_and_no_warmup_is_allowed() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=0)
    assert {learning_rate(config, 2.0, step, 10) for step in range(1, 11)} == {2.0}


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"min_lr_fraction": 1.5}, {"decay_fraction": -0.1}])
def test_impossible_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)
