"""The guard: a bad step is counted once, never poisons the window, and three in a row end the run."""

import math
import statistics

import pytest
import torch

from regpt2.base.errors import Problem
from regpt2.training.guard import Guard, GuardConfig
from regpt2.training.step import StepStats


def fed(guard: Guard, step: int, loss: float, grad_norm: float = 1.0, *, scale: float = 1.0) -> list[str]:
    """One update as the loop hands it to the guard: judged on the device, then read."""
    limit = guard.spike_limit
    skipped = not math.isfinite(loss + grad_norm) or (guard.skips_spikes and loss > float(limit))
    accepted = torch.tensor(0.0 if skipped else 1.0)
    guard.take_in(StepStats(torch.tensor(loss), torch.tensor(grad_norm), accepted, limit, lr=1e-3, scale=scale))
    return guard.observe(step, loss, grad_norm, accepted=not skipped, spike_limit=float(limit), scale=scale)


def settled(config: GuardConfig | None = None, n: int = 128) -> Guard:
    guard = Guard(config or GuardConfig())
    for step in range(1, n + 1):
        assert fed(guard, step, 3.0 + 0.01 * (step % 7)) == []
    return guard


def test_one_nan_is_one_remark_and_the_next_steps_are_silent() -> None:
    guard = settled()
    assert "skipped" in fed(guard, 129, math.nan, math.nan)[0]
    for step in range(130, 260):
        assert fed(guard, step, 3.0 + 0.01 * (step % 7)) == []
    assert math.isfinite(guard.spike_limit)


def test_three_skipped_in_a_row_stop_the_run() -> None:
    guard = settled()
    fed(guard, 1, math.nan)
    fed(guard, 2, 3.0, math.nan)
    fed(guard, 3, 3.0)
    fed(guard, 4, math.nan)
    fed(guard, 5, math.inf)
    with pytest.raises(Problem, match=r"3 updates in a row were skipped, the last at step 6 .* --precision fp32"):
        fed(guard, 6, math.nan)


def test_a_spike_is_reported_and_by_choice_skipped() -> None:
    (said,) = fed(settled(), 129, 30.0)
    assert "loss 30.0000 is a spike (expected below 3.1" in said and "skipped" not in said
    skipping = settled(GuardConfig(spikes="skip"))
    limit = float(skipping.spike_limit)
    (said,) = fed(skipping, 129, 30.0)
    assert "skipped, loss 30 is a spike (expected below 3.1" in said
    assert float(skipping.spike_limit) == limit, "a skipped loss entered the window"
    assert float(settled(GuardConfig(spikes="off")).spike_limit) == math.inf
    assert fed(settled(GuardConfig(spikes="off")), 129, 30.0) == []


def test_the_limit_is_that_of_the_textbook_over_the_newest_updates_that_were_made() -> None:
    """Every value against `statistics`, over a window that fills, runs over and meets skipped updates."""
    config = GuardConfig(spikes="skip", spike_z=1.5, window=10, max_skipped=1000)
    guard, made = Guard(config), list[float]()
    for step in range(1, 80):
        newest = made[-10:]
        expected = math.inf
        if len(newest) >= 5:
            expected = statistics.fmean(newest) + 1.5 * max(1e-3, statistics.pstdev(newest))
        assert float(guard.spike_limit) == pytest.approx(expected, rel=1e-6)
        loss = 3.0 + math.sin(step) - 0.02 * step
        if not fed(guard, step, loss):
            made.append(loss)
    assert 30 < len(made) < 75


def test_the_first_steps_are_never_spikes() -> None:
    guard = Guard(GuardConfig())
    assert all(fed(guard, step, 3.0) == [] for step in range(1, 60))
    assert fed(guard, 60, 30.0) == []  # 59 are fewer than half of the window
    assert fed(settled(n=64), 65, 30.0)


def test_while_the_loss_scale_is_sought_only_what_is_not_finite_is_exempt() -> None:
    guard = settled(GuardConfig(spikes="skip"))
    for step in range(129, 160):
        fed(guard, step, 3.0, math.inf, scale=2.0)
    assert guard.skipped_in_a_row == 0
    fed(guard, 160, 30.0, scale=2.0)
    fed(guard, 161, 3.0, math.inf, scale=2.0)  # between them: neither counts nor makes good
    fed(guard, 162, 30.0, scale=2.0)
    with pytest.raises(Problem, match=r"the last at step 163 .* --guard.spike-z above 6"):
        fed(guard, 163, 30.0, scale=2.0)
    stuck = settled()
    fed(stuck, 129, 3.0, math.inf, scale=1.0)
    fed(stuck, 130, 3.0, math.inf, scale=1.0)
    with pytest.raises(Problem, match=r"the last at step 131 .* --precision fp32"):
        fed(stuck, 131, 3.0, math.inf, scale=1.0)


@pytest.mark.parametrize("n", [3, 70, 128, 200])
def test_its_state_round_trips_bit_for_bit(n: int) -> None:
    one, other = settled(n=n), Guard(GuardConfig())
    fed(one, n + 1, math.nan)
    other.load_state(one.state())
    assert torch.equal(other.spike_limit, one.spike_limit)
    assert torch.equal(other.losses.nan_to_num(-1.0), one.losses.nan_to_num(-1.0))
    assert other.skipped_in_a_row == 1
    assert len(one.state()["losses"]) == min(n, 128)


def test_a_state_of_a_longer_window_gives_its_newest_losses() -> None:
    short = Guard(GuardConfig(window=5))
    short.load_state({"losses": [9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0], "skipped_in_a_row": 0})
    assert short.losses.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
