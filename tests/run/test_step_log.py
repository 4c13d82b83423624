"""The lines of a run: what they say of an update is what the update was made with."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_train import run_train

from regpt2.base.record.metrics import read_events
from regpt2.run import loop as train_module
from regpt2.training.optimizer import AdamW

PEAK, WARMUP, LAST = 3e-3, 4, 12  # of the tiny recipe


def lecture_rate(step: int) -> float:
    """The lecture's get_lr, which counts updates from 0."""
    it = step - 1
    if it < WARMUP:
        return PEAK * (it + 1) / WARMUP
    coeff = 0.5 * (1.0 + math.cos(math.pi * (it - WARMUP) / (LAST - WARMUP)))
    return 0.1 * PEAK + coeff * (PEAK - 0.1 * PEAK)


def rates(recipe: Path, data: Path, run: Path) -> dict[int, float]:
    run_train(recipe, data, run, eval_every=0, sample_every=0, save_every=0, log_every=5)
    return {e["step"]: e["lr"] for e in read_events(run / "metrics.jsonl") if e["event"] == "train"}


EXPECTED = {step: pytest.approx(lecture_rate(step), rel=1e-12) for step in range(1, LAST + 1)}


def test_the_rates_of_record_and_screen_are_those_of_the_schedule(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[float] = []
    step = AdamW.step

    def looking(self: AdamW, *arguments: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", looking)
        recorded = rates(tiny_recipe, tiny_data, tmp_path / "run")
    assert recorded == EXPECTED
    assert list(recorded.values()) == used
    shown = dict(re.findall(r"step +(\d+)/12 .* lr (\S+) ", capsys.readouterr().out))
    assert {int(step): float(lr) for step, lr in shown.items()} == {
        step: pytest.approx(lecture_rate(step), rel=5e-3) for step in (5, 12)
    }


@pytest.mark.parametrize(
    "wrong",
    [
        lambda real: lambda schedule, peak, step, last: peak,
        lambda real: lambda schedule, peak, step, last: real(schedule, peak, step - 1, last),
        lambda real: lambda schedule, peak, step, last: real(schedule, peak, step + 1, last),
    ],
    ids=["the schedule ignored", "a step late", "a step early"],
)
def test_a_loop_that_uses_another_rate_shows_in_the_record(
    tmp_path: Path,
    tiny_recipe: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[Any], Any],
) -> None:
    monkeypatch.setattr(train_module, "learning_rate", wrong(train_module.learning_rate))
    assert rates(tiny_recipe, tiny_data, tmp_path / "run") != EXPECTED
