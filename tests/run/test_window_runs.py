"""Attention's window grows in a run: at every update, in checkpoints, after a resume, on ranks, in what reads them."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import pytest
import torch

from conftest import TINY_RECIPE
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.config.recipe_files import load_recipe
from regpt2.evals import val_loss
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPTConfig
from regpt2.run import intervals, loop
from regpt2.run.loop import train
from regpt2.training.ranks.strategy import ParallelConfig

INGREDIENTS = ("document_mask", "weightless_norms", "half_rotary", "value_embeddings", "unet_skips", "x0_mixing")
RECIPE = (
    TINY_RECIPE.replace(
        "dropout = 0.1",
        "\n".join(['architecture = "modern"', "window = 16", *(f"{name} = true" for name in INGREDIENTS)]),
    )
    .replace("lr = 3e-3", 'name = "muon"\nlr = 3e-3')
    .replace("[schedule]", "[schedule]\nwindow_from = 4")
)
WINDOWS = [4, 4, 4, 8, 8, 8, 12, 12, 12, 16, 16, 16]  # of its 12 updates


def run_train(recipe: Path, data: Path, run: Path, **changes: Any) -> None:
    train(dataclasses.replace(load_recipe(str(recipe)), data=str(data), run=str(run), **changes))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def files_of(run: Path, step: int = 12) -> list[bytes]:
    names = ("model.safetensors", "optimizer.safetensors", "config.json")
    return [(checkpoint(run, step) / name).read_bytes() for name in names]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == kind]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "tiny_windows.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def seen() -> dict[str, list[int]]:
    """The window at each update, evaluation and sample of `straight`."""
    return {"train": [], "eval": [], "sample": []}


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path, seen: dict[str, list[int]]) -> Path:
    """One uninterrupted run, whose losses in windows of 8 tokens stand for those in 1,024."""

    def noting(kind: str, function: Any, model_of: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen[kind].append(model_of(*args).window)
            return function(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(val_loss, "SHORT", 8)
        patch.setattr(loop, "train_step", noting("train", loop.train_step, lambda trainable, *_: trainable))
        patch.setattr(val_loss, "evaluate", noting("eval", val_loss.evaluate, lambda context: context.gpt))
        patch.setattr(intervals, "generate", noting("sample", intervals.generate, lambda model, *_: model))
        run_train(recipe, tiny_data, recipe.parent / "run")
    return recipe.parent / "run"


def test_each_update_and_each_evaluation_has_the_window_of_its_step(straight: Path, seen: dict[str, list[int]]) -> None:
    assert seen == {"train": WINDOWS, "eval": [4, 8, 16], "sample": [16]}  # before the first update, at 6, at 12
    for event in events(straight, "eval"):
        assert event["loss_1024"] != pytest.approx(event["loss"], abs=1e-4) or event["step"] == 0
    assert json.loads((checkpoint(straight, 4) / "config.json").read_text())["trained_window"] == 8
    assert json.loads((checkpoint(straight, 8) / "config.json").read_text())["trained_window"] == 12
    assert "trained_window" not in json.loads((checkpoint(straight, 12) / "config.json").read_text())


@pytest.mark.parametrize("steps", [4, 8])
def test_a_resume_in_the_middle_of_the_growth_ends_in_the_same_bits(
    straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(val_loss, "SHORT", 8)
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for step in range(steps + 4, 13, 4):
        shutil.rmtree(checkpoint(run, step))
    run_train(recipe, tiny_data, run)
    assert files_of(run) == files_of(straight)
    for kind in ("train", "eval"):
        assert [e["loss"] for e in events(run, kind)] == [e["loss"] for e in events(straight, kind)]


def test_a_checkpoint_in_the_middle_is_read_with_the_window_that_it_knows(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    middle = checkpoint(straight, 8)
    model = load_model(middle).model
    assert (model.window, model.config.window) == (12, 16)  # type: ignore[attr-defined]
    assert load_model(straight).model.window == 16
    ids = torch.arange(32)[None] % 257
    there = model(ids)
    model.set_window(16)
    assert not torch.equal(there, model(ids))
    for kind, path in (("safetensors", tmp_path / "m.safetensors"), ("native", tmp_path / "native")):
        assert main(["convert", str(middle), str(path), "--to", kind]) == 0
        again = load_model(path).model
        assert again.window == 12 and torch.equal(again(ids), there)
    config = middle / "config.json"
    old = json.loads(config.read_text())
    for value in (0, 17, "12", 1.5):
        folder = tmp_path / f"wrong-{value}"
        folder.mkdir()
        shutil.copy(middle / "model.safetensors", folder)
        (folder / "config.json").write_text(json.dumps({**old, "trained_window": value}))
        with pytest.raises(CheckpointError, match=r"trained_window = .* must be from 1 to model.window = 16"):
            load_model(folder)


def test_a_change_of_the_schedule_is_reported_and_a_window_that_cannot_be_is_refused(
    straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(checkpoint(run, 12))
    config = load_recipe(str(recipe))
    run_train(recipe, tiny_data, run, schedule=dataclasses.replace(config.schedule, window_from=8))
    assert "schedule.window_from was 4 up to step 8 and is 8 from here on" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"model\.architecture = gpt2 has no window"):
        dataclasses.replace(config, model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    wide = dataclasses.replace(config.model, window=64)
    run_train(recipe, tiny_data, tmp_path / "wide", model=wide, max_steps=4, eval_every=0, sample_every=0)
    (note,) = [e["text"] for e in events(tmp_path / "wide", "note") if "attention's window" in e["text"]]
    assert "hides nothing in sequences of batch.seq_len = 32 tokens once it has grown to that" in note


@pytest.mark.seconds
@pytest.mark.parametrize("strategy", ["ordered", "ddp"])
def test_two_ranks_train_as_one_while_the_window_grows(
    recipe: Path, tiny_data: Path, tmp_path: Path, strategy: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    less = {"eval_every": 0, "sample_every": 0, "save_every": 12}
    run_train(recipe, tiny_data, one, parallel=ParallelConfig(strategy=strategy), **less)  # type: ignore[arg-type]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in less.items()]
    command = ["train", str(recipe), "--data", str(tiny_data), "--run", str(two), "--parallel.strategy", strategy]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_command(
        [*launcher, "-m", "regpt2", "--", *command, *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if strategy == "ordered":
        assert files_of(one) == files_of(two)
    losses = [[event["loss"] for event in events(run, "train")] for run in (one, two)]
    # sums in another order, 1e-7 each, which Muon's roots of small singular values can enlarge
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
