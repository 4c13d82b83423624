"""Runs of a model with every ingredient of long windows: momentum by the step, dropout, killed, resumed, exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RECIPE, Run
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.run.loop import train
from regpt2.training.optim.muon import Muon

MODEL = """
architecture = "modern"
weightless_norms = true
half_rotary = true
value_embeddings = true
unet_skips = true
x0_mixing = true
mlp_only_layer = 2
document_mask = true
window = 20"""
OPTIM = """
name = "muon"
value_embedding_lr = 0.1
scalar_lr = 0.04
muon.momentum_from = 0.5
muon.momentum_warmup_steps = 6"""
RECIPE = (
    TINY_RECIPE.replace("n_layer = 2", "n_layer = 4")
    .replace("[model]", "[model]" + MODEL)
    .replace("[optim]", "[optim]" + OPTIM)
    .replace("[schedule]", '[schedule]\nkind = "constant"')  # the same for any max_steps
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ingredients") / "tiny_long.toml"
    path.write_text(RECIPE)
    return path


def run_train(recipe: Path, data: Path, run: Path, **changes: Any) -> None:
    train(dataclasses.replace(load_recipe(str(recipe)), data=str(data), run=str(run), **changes))


def weights_and_state(run: Path, step: int = 12) -> list[bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "config.json")]


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path) -> Path:
    """One uninterrupted run, with dropout."""
    run_train(recipe, tiny_data, recipe.parent / "run")
    return recipe.parent / "run"


def test_momentum_is_that_of_the_step_also_after_a_resume_in_the_middle(
    recipe: Path, straight: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: from 0.5 in the first update on a line to 0.95 in the seventh, and so on."""
    seen: list[float] = []
    step = Muon.step

    def noting(self: Muon, closure: Any = None) -> None:
        seen.append(self.param_groups[0]["momentum"])
        step(self, closure)

    monkeypatch.setattr(Muon, "step", noting)
    run_train(recipe, tiny_data, tmp_path / "run", max_steps=4)
    run_train(recipe, tiny_data, tmp_path / "run")
    assert seen == pytest.approx([0.5, 0.575, 0.65, 0.725, 0.8, 0.875, *[0.95] * 6])
    assert weights_and_state(tmp_path / "run") == weights_and_state(straight)


def test_it_learns_and_every_parameter_is_in_its_checkpoint(straight: Path) -> None:
    losses = [e["loss"] for e in read_events(straight / "metrics.jsonl") if e["event"] == "train"]
    assert losses[-1] < losses[0] - 0.3
    notes = [e["text"] for e in read_events(straight / "metrics.jsonl") if e["event"] == "note"]
    assert not [text for text in notes if "no effect" in text]
    config = json.loads((straight / "checkpoints" / "step-00000012" / "config.json").read_text())["model"]
    assert (config["window"], config["mlp_only_layer"], config["dropout"]) == (20, 2, 0.1)


@pytest.mark.seconds
def test_it_is_measured_sampled_looked_at_and_written_by_the_commands(
    straight: Path, tiny_data: Path, tmp_path: Path, regpt2: Run
) -> None:
    out = tmp_path / "results.json"
    done = regpt2("evaluate", straight, "--data", tiny_data, "--val-tokens", "512", "--out", out)
    assert done.returncode == 0, done.stderr
    by_run = [e["loss"] for e in read_events(straight / "metrics.jsonl") if e["event"] == "eval" and e["step"] == 12]
    assert json.loads(out.read_text())["results"]["val_loss"]["loss"] == pytest.approx(by_run[0], rel=1e-5)
    assert regpt2("sample", straight, "ab", "--n", "2", "--max-new-tokens", "30").returncode == 0
    look = regpt2("explore", straight, "--out", tmp_path / "look")
    assert look.returncode == 0, look.stderr
    for text in ("value embeddings", "U-net skips", "x0 mixing", "mlp_only_layer", "h.0.attn.value_mix"):
        assert text in look.stdout
    assert regpt2("convert", straight, tmp_path / "m.safetensors", "--to", "safetensors").returncode == 0
    assert regpt2("convert", tmp_path / "m.safetensors", tmp_path / "native", "--to", "native").returncode == 0
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == weights_and_state(straight)[0]
    refused = regpt2("convert", straight, tmp_path / "hf", "--to", "huggingface")
    assert refused.returncode == 2
    assert "value_embeddings, unet_skips, x0_mixing, mlp_only_layer, window" in " ".join(refused.stderr.split())
