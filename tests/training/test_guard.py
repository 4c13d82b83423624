"""The guard: a bad step is counted once, never poisons the window, and three in a row end the run."""

import math

import pytest

from regpt2.base.errors import Problem
from regpt2.training.guard import Guard, GuardConfig


def settled(config: GuardConfig | None = None, n: int = 128) -> Guard:
    guard = Guard(config or GuardConfig())
    for step in range(1, n + 1):
        assert guard.observe(step, 3.0 + 0.01 * (step % 7), 1.0, accepted=True) == []
    return guard


def test_one_nan_is_one_remark_and_the_next_steps_are_silent() -> None:
    guard = settled()
    assert "skipped" in guard.observe(129, math.nan, math.nan, accepted=False)[0]
    for step in range(130, 260):
        assert guard.observe(step, 3.0 + 0.01 * (step % 7), 1.0, accepted=True) == []
    assert math.isfinite(guard.spike_limit())


def test_three_skipped_in_a_row_stop_the_run() -> None:
    guard = settled()
    guard.observe(1, math.nan, 1.0, accepted=False)
    guard.observe(2, math.nan, 1.0, accepted=False)
    guard.observe(3, 3.0, 1.0, accepted=True)
    guard.observe(4, math.nan, 1.0, accepted=False)
    guard.observe(5, math.inf, 1.0, accepted=False)
    with pytest.raises(Problem, match="3 updates in a row were skipped, the last at step 6"):
        guard.observe(6, math.nan, 1.0, accepted=False)


def test_a_spike_is_reported_and_by_choice_skipped() -> None:
    assert "spike" in settled().observe(129, 30.0, 1.0, accepted=True)[0]
    assert settled().loss_limit() == math.inf
    assert 3.06 < settled(GuardConfig(spikes="skip")).loss_limit() < 3.5
    assert settled(GuardConfig(spikes="off")).spike_limit() == math.inf


def test_the_first_steps_are_never_spikes() -> None:
    guard = Guard(GuardConfig())
    assert all(guard.observe(step, 3.0, 1.0, accepted=True) == [] for step in range(1, 60))
    assert guard.observe(60, 30.0, 1.0, accepted=True) == []  # 59 are fewer than half of the window
    assert settled(n=64).observe(65, 30.0, 1.0, accepted=True)


def test_its_state_round_trips() -> None:
    one, other = settled(), Guard(GuardConfig())
    one.observe(129, math.nan, 1.0, accepted=False)
    other.load_state(one.state())
    assert other.spike_limit() == one.spike_limit()
    assert other.skipped_in_a_row == 1
