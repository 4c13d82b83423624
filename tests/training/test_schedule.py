"""Learning rate and window: the lecture's rate at every step; a window that grows in whole blocks, evenly."""

import math
from collections import Counter
from itertools import pairwise

import pytest

from regpt2.base.errors import ConfigError
from regpt2.training.schedule import ScheduleConfig, learning_rate, mean_window, window_at


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


def windows(steps: int, model_window: int = 1792, **settings: int) -> list[int]:
    config = ScheduleConfig(**settings)
    return [window_at(config, model_window, step, steps) for step in range(1, steps + 1)]


def test_the_window_is_the_published_records_to_one_block_at_every_update() -> None:
    """Theirs is 1,728 tokens times the progress, rounded up to blocks of 128; ours lasts equally long at each size."""
    ours = windows(1390, window_from=128)
    theirs = [max(128, math.ceil(1728 * step / 1390 / 128) * 128) for step in range(1390)]
    assert ours[0] == 128 and ours[-1] == 1792
    assert all(abs(a - b) <= 128 for a, b in zip(ours, theirs, strict=True))
    lasts = Counter(ours)
    assert sorted(lasts) == list(range(128, 1793, 128))
    assert max(lasts.values()) - min(lasts.values()) <= 1


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (128, 512, {128, 256, 384, 512}),
        (256, 1024, {256, 384, 512, 640, 768, 896, 1024}),  # blocks of 128, though both divide by 256
        (8, 24, {8, 16, 24}),
        (12, 24, {12, 16, 20, 24}),
        (5, 9, {5, 6, 7, 8, 9}),
        (128, 192, {128, 192}),
        (64, 64, {64}),
    ],
)
def test_the_window_grows_in_the_largest_blocks_that_both_ends_allow(start: int, end: int, expected: set[int]) -> None:
    grown = windows(200, end, window_from=start)
    assert set(grown) == expected
    assert all(a <= b for a, b in pairwise(grown))
    assert mean_window(ScheduleConfig(window_from=start), end) == pytest.approx(sum(grown) / 200, rel=0.01)


def test_without_a_schedule_the_window_is_the_models_and_before_the_first_update_that_of_the_first() -> None:
    assert set(windows(10, 1792)) == {1792}
    assert set(windows(10, 0)) == {0}
    grows = ScheduleConfig(window_from=128, window_to=256)
    assert [window_at(grows, 1792, step, 4) for step in range(5)] == [128, 128, 128, 256, 256]
    assert window_at(grows, 1792, 1, 1) == 128, "a run of one update begins, and does not end"
    assert mean_window(ScheduleConfig(), 1792) == 1792


@pytest.mark.parametrize(
    ("settings", "architecture", "model_window", "message"),
    [
        ({"window_from": 128}, "gpt2", None, "model.architecture = gpt2 has no window"),
        ({"window_from": 128}, "modern", 0, "model.window = 0 lets attention reach all tokens before"),
        ({"window_from": 512}, "modern", 256, "window_from = 512 must be at most model.window = 256"),
        ({"window_from": 128, "window_to": 512}, "modern", 256, "window_to = 512 must be at most model.window = 256"),
        ({"window_from": 200, "window_to": 100}, "modern", 256, "at most schedule.window_to = 100"),
    ],
)
def test_a_window_that_the_model_cannot_have_is_refused(
    settings: dict[str, int], architecture: str, model_window: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**settings).check_window(architecture, model_window)
    ScheduleConfig().check_window(architecture, model_window)


@pytest.mark.parametrize("wrong", [{"window_from": -1}, {"window_to": -128}, {"window_to": 256}])
def test_impossible_windows_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)
