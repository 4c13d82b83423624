"""A run that overfits: its best model is kept and named, it stops early, and a resume changes nothing of that."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import evals, losses, run_train, state_of

from conftest import TINY_RECIPE, Run, write_tokens
from rank_processes import command_on_ranks
from regpt2.base.errors import ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.config.run import EvalConfig, RunConfig
from regpt2.data.tokens.shards import open_tokens
from regpt2.model.files.load import load_model
from regpt2.pages.record import read_record
from regpt2.pages.report.markdown import markdown
from regpt2.pages.report.page import page

RECIPE = (
    TINY_RECIPE.replace("max_steps = 12", "max_steps = 28")
    .replace("eval_every = 6", "eval_every = 4")
    .replace("sample_every = 12", "sample_every = 28")
    .replace("save_every = 4", "save_every = 4\nkeep_checkpoints = 0")
    .replace("n_layer = 2", "n_layer = 1")
    .replace("dropout = 0.1", "dropout = 0.0")
    .replace("lr = 3e-3", "lr = 3e-2")
)
LAST = 28


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few random letters: their number can be learned, and then only two windows of training text by heart."""
    ids = np.random.default_rng(0).integers(97, 107, size=800).astype(np.uint16)
    return write_tokens(tmp_path_factory.mktemp("data") / "few", [ids[:65]], ids[300:])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "few.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run to its last update."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_train(recipe, data, run, keep_best=True)
    return run


def end_of(run: Path) -> dict[str, Any]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == "end"][-1]


def lowest(run: Path) -> tuple[int, float]:
    return min(evals(run).items(), key=lambda pair: pair[1])


def stops_at(run: Path, patience: int) -> int:
    """Where a run has to stop: at the last of `patience` validations in a row that are not below the best."""
    best, worse = float("inf"), 0
    for step, loss in evals(run).items():
        best, worse = (loss, 0) if loss < best else (best, worse + 1)
        if worse == patience:
            return step
    return LAST


def best_files(run: Path) -> dict[str, str]:
    return {
        k: v["sha256"] for k, v in json.loads((run / "checkpoints/best/manifest.json").read_text())["files"].items()
    }


def test_the_best_model_is_kept_and_named_in_the_record_and_on_the_page(straight: Path, data: Path) -> None:
    step, loss = lowest(straight)
    assert 0 < step < LAST - 12, "this test needs a run that overfits"
    assert (end_of(straight)["best_step"], end_of(straight)["best_loss"]) == (step, loss)
    bests = [event for event in read_events(straight / "metrics.jsonl") if event["event"] == "best"]
    assert bests[-1] == {"event": "best", "step": step, "loss": loss, "kept": True}
    loaded = load_model(straight / "checkpoints/best")
    assert loaded.step == step
    with open_tokens(data, "val") as tokens:
        n = (tokens.n_tokens - 1) // 32
        rows = torch.from_numpy(np.stack([tokens.read(32 * w, 33) for w in range(n)]).astype(np.int64))
    logits = loaded.model(rows[:, :-1]).detach()
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[:, :257], rows[:, 1:].flatten())
    assert float(ours) == pytest.approx(loss, abs=1e-5)
    assert load_model(straight).step == LAST
    assert not list((straight / "checkpoints/best").glob("optimizer*"))
    record = read_record(straight)
    said = f"{loss:.4f} at step {step}"
    assert said in page([record])
    assert said in markdown([record], "x.png")


def test_verify_reads_the_best_one_and_finds_damage(straight: Path, tmp_path: Path, regpt2: Run) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    found = regpt2("verify", run)
    assert found.returncode == 0
    assert f"step {lowest(run)[0]}, validation loss {lowest(run)[1]:.4f}" in found.stdout
    assert regpt2("verify", run / "checkpoints/best").returncode == 0
    model = run / "checkpoints/best/model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert regpt2("verify", run).returncode == 1


def test_a_run_stops_early_and_trains_no_further_until_it_is_told_to(
    recipe: Path, data: Path, straight: Path, tmp_path: Path, regpt2: Run
) -> None:
    run, at = tmp_path / "run", stops_at(straight, 2)
    assert lowest(straight)[0] + 8 <= at < LAST
    only_at_its_end = ("--save-every", 100)
    arguments = (
        "train",
        recipe,
        "--data",
        data,
        "--run",
        run,
        *only_at_its_end,
        "--keep-best",
        "--stop-after-worse",
        2,
    )
    first = regpt2(*arguments)
    assert first.returncode == 0
    best = f"best: step {end_of(run)['best_step']}, validation loss"
    assert f"stopped early at step {at}" in first.stdout and best in first.stdout
    assert f"regpt2 sample {run}/checkpoints/best" in first.stdout
    assert end_of(run)["reason"].startswith("stopped early: 2 validations in a row were not below ")
    assert max(losses(run)) == at
    assert (run / f"checkpoints/step-{at:08d}/manifest.json").is_file()
    assert [e["step"] for e in read_events(run / "metrics.jsonl") if e["event"] == "sample"] == [at]
    again = regpt2(*arguments)
    assert again.returncode == 0
    assert f"stopped early at step {at}" in again.stdout and "--stop-after-worse 0" in again.stdout
    assert max(losses(run)) == at
    assert regpt2(*arguments[:-1], 0).returncode == 0
    assert state_of(run, LAST) == state_of(straight, LAST)
    assert evals(run) == evals(straight)
    assert best_files(run) == best_files(straight)


@pytest.mark.parametrize("case", ["after", "at, not written", "at, between renames", "before"])
def test_a_resumed_run_has_the_same_best(
    recipe: Path, data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Killed after the best validation; right after it, in its save; or with no checkpoint but one from before it."""
    run, step = shutil.copytree(straight, tmp_path / "run"), lowest(straight)[0]
    first = step + {"after": 4, "before": -4}.get(case, 0)
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > first:
            shutil.rmtree(folder)
    if case == "at, not written":
        shutil.rmtree(run / "checkpoints/best")
    if case == "at, between renames":
        (run / "checkpoints/best").rename(run / "checkpoints/old-best")
    run_train(recipe, data, run, keep_best=True)
    assert f"resuming from step {first:,}" in capsys.readouterr().out
    assert (end_of(run)["best_step"], end_of(run)["best_loss"]) == lowest(straight)
    assert best_files(run) == best_files(straight)
    assert not (run / "checkpoints/old-best").exists()


def test_a_best_model_that_is_lost_is_named(
    recipe: Path, data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, step = shutil.copytree(straight, tmp_path / "run"), lowest(straight)[0]
    shutil.rmtree(run / "checkpoints/best")
    run_train(recipe, data, run, keep_best=True)
    shown = capsys.readouterr()
    assert f"the model of the best validation so far, of step {step}, is not on the disk" in shown.err
    assert (
        f"best: step {step}, validation loss {lowest(straight)[1]:.4f}, and its model is not on the disk" in shown.out
    )


@pytest.mark.process
def test_two_ranks_with_shards_keep_the_same_best_and_leave_together(
    recipe: Path, data: Path, straight: Path, tmp_path: Path, unused_port: int
) -> None:
    run = tmp_path / "run"
    options = ("--keep-best", "--stop-after-worse", 2, "--parallel.strategy", "fsdp")
    said = command_on_ranks(2, unused_port, tmp_path, "train", recipe, "--data", data, "--run", run, *options)
    step, loss = lowest(run)
    assert f"best: step {step}, validation loss {loss:.4f}" in said
    assert max(losses(run)) == stops_at(run, 2) < LAST
    assert evals(run)[4] == pytest.approx(evals(straight)[4], abs=1e-3)
    assert load_model(run / "checkpoints/best").step == step


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_best": True, "eval_every": 0}, "keep_best = true needs validation losses"),
        ({"keep_best": True, "evals": EvalConfig(names=())}, r"none with evals.names = \[\]"),
        ({"stop_after_worse": 3, "eval_every": 0}, "stop_after_worse = 3 needs"),
        ({"stop_after_worse": -1}, "stop_after_worse = -1 must be at least 0"),
    ],
)
def test_without_validations_there_is_no_best(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig(**changes)
