"""The guard in whole runs: what is skipped depends on the losses before alone, not on logs, saves or stops."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_train import state_of

from conftest import TINY_RECIPE
from regpt2.base.errors import Problem
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.run import ending
from regpt2.run import loop as train_module
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training.guard import GuardConfig
from regpt2.training.step import LossScale

STEPS = 40
# So low a limit that ordinary losses are above it now and then: what is skipped hangs on the last bits of the window.
TIGHT = GuardConfig(spikes="skip", spike_z=0.4, window=6, max_skipped=STEPS)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "write_report", lambda run: run / "report.html")


def tight(folder: Path, data: Path, run: str, **changes: Any) -> RunConfig:
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    config = load_recipe(str(folder / "tiny.toml"))
    optim = dataclasses.replace(config.optim, lr=2e-2)
    settings = {"max_steps": STEPS, "eval_every": 0, "sample_every": 0, "save_every": 100, "guard": TIGHT}
    settings |= {"optim": optim, "data": str(data), "run": str(folder / run), **changes}
    return dataclasses.replace(config, **settings)


def skipped(run: str | Path) -> list[int]:
    return [e["step"] for e in read_events(Path(run) / "metrics.jsonl") if e["event"] == "train" and e["skipped"]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "write_report", lambda run: run / "report.html")
        train_module.train(tight(folder, tiny_data, "run"))
    return folder / "run"


@pytest.mark.seconds
@pytest.mark.parametrize(
    "changes", [{"log_every": 7}, {"log_every": 100}, {"log_every": 100, "save_every": 3}], ids=str
)
def test_neither_log_nor_saves_change_what_is_skipped(
    tmp_path: Path, tiny_data: Path, straight: Path, changes: dict[str, int]
) -> None:
    assert 5 < len(skipped(straight)) < STEPS - 5
    train_module.train(tight(tmp_path, tiny_data, "run", **changes))
    assert skipped(tmp_path / "run") == skipped(straight)
    assert state_of(tmp_path / "run", STEPS) == state_of(straight, STEPS)


@pytest.mark.seconds
@pytest.mark.parametrize("at", [5, 17, 31])
def test_a_stop_and_a_resume_change_nothing_of_it(
    tmp_path: Path, tiny_data: Path, straight: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = train_module.update

    def stopped_at(run: Any, state: Any, step: int, batch: Any) -> Any:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, state, step, batch)

    monkeypatch.setattr(train_module, "update", stopped_at)
    config = tight(tmp_path, tiny_data, "run", log_every=7)
    assert train_module.train(config).step == at
    monkeypatch.setattr(train_module, "update", update)
    assert train_module.train(config).step == STEPS
    assert skipped(tmp_path / "run") == skipped(straight)
    assert state_of(tmp_path / "run", STEPS) == state_of(straight, STEPS)


def spiking_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From this update on every loss is ten times as large."""
    step_function = train_module.train_step
    made = 0

    def wrapped(trainable: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        hook = trainable.register_forward_hook(lambda *given: given[2] * (10.0 if made >= step else 1.0))
        try:
            return step_function(trainable, *arguments, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(train_module, "train_step", wrapped)


@pytest.mark.seconds
@pytest.mark.parametrize("scale", [None, LossScale(factor=2.0**10)], ids=["fp32", "scaled"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_spikes_that_are_skipped_in_a_row_end_the_run_also_with_a_loss_scale(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, scale: LossScale | None, log_every: int
) -> None:
    spiking_from(10, monkeypatch)
    build, states = train_module.build, list[RunState]()

    def scaled(*arguments: Any) -> tuple[TrainingRun, RunState]:
        run, state = build(*arguments)
        states.append(dataclasses.replace(state, scale=scale and dataclasses.replace(scale)))
        return run, states[-1]

    monkeypatch.setattr(train_module, "build", scaled)
    guard = GuardConfig(spikes="skip", window=12)
    with pytest.raises(Problem, match=r"3 updates in a row were skipped, the last at step 12 .*--guard.spike-z"):
        train_module.train(tight(tmp_path, tiny_data, "run", guard=guard, log_every=log_every, max_steps=31))
    assert skipped(tmp_path / "run") == [10, 11, 12]
    if scale is not None:  # their gradients were finite: the scale was right, and has learned that
        good_steps = 12 if log_every == 1 else 31
        assert states[0].scale == LossScale(factor=scale.factor, good_steps=good_steps)
