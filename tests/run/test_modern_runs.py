"""A modern run from recipe to report by the real commands: killed and resumed, measured, sampled, exported."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RECIPE, Run, needs_bf16
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.config.recipe_files import load_recipe
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.run.loop import train
from warm_processes import Python

RECIPE = TINY_RECIPE.replace("dropout = 0.1", 'architecture = "modern"').replace(
    "lr = 3e-3", 'name = "muon"\nlr = 3e-3'
)


def run_train(recipe: Path, data: Path, run: Path, **changes: Any) -> None:
    train(dataclasses.replace(load_recipe(str(recipe)), data=str(data), run=str(run), **changes))


def weights_and_state(run: Path, step: int = 12) -> list[bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "config.json")]


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run / "metrics.jsonl") if event["event"] == "train"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modern") / "tiny_modern.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path) -> Path:
    """One uninterrupted run."""
    run_train(recipe, tiny_data, recipe.parent / "run")
    return recipe.parent / "run"


def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path, regpt2: Run
) -> None:
    run = tmp_path / "killed"
    command = ["train", str(recipe), "--data", str(tiny_data), "--run", str(run)]
    process = Python("-m", "regpt2", *command)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    assert not (run / "checkpoints" / "step-00000012").exists(), "it was too late to kill it"
    done = regpt2(*command)
    assert done.returncode == 0, done.stderr
    assert weights_and_state(run) == weights_and_state(straight)
    assert losses(run) == losses(straight)
    assert losses(straight)[12] < losses(straight)[1]


def test_going_on_in_another_architecture_is_refused(straight: Path, recipe: Path, tiny_data: Path) -> None:
    modern = load_recipe(str(recipe)).model
    gpt2 = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257)
    with pytest.raises(CheckpointError, match="holds a model with architecture = modern, the recipe has gpt2"):
        run_train(recipe, tiny_data, straight, model=gpt2)
    with pytest.raises((ConfigError, CheckpointError), match=r"rotary"):
        run_train(recipe, tiny_data, straight, model=dataclasses.replace(modern, rotary=False))


def test_a_recipe_of_gpt2_becomes_modern_by_an_option(tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ["--model.architecture", "modern", "--model.softcap", "0", "--max-steps", "2", "--sample-every", "0"]
    assert main(["train", str(tiny_recipe), "--data", str(tiny_data), "--run", str(tmp_path / "run"), *options]) == 0
    written = load_recipe(str(tmp_path / "run" / "config.toml")).model
    assert written == ModernConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257, softcap=0.0, dropout=0.1
    )


@needs_bf16
def test_it_is_sampled_in_bf16(straight: Path) -> None:
    assert main(["sample", str(straight), "ab", "--max-new-tokens", "8", "--dtype", "bf16"]) == 0


@pytest.mark.seconds
def test_it_is_measured_sampled_and_looked_at(
    straight: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    assert main(["evaluate", str(straight), "--data", str(tiny_data), "--val-tokens", "512", "--out", str(out)]) == 0
    by_run = [e["loss"] for e in read_events(straight / "metrics.jsonl") if e["event"] == "eval" and e["step"] == 12]
    assert json.loads(out.read_text())["results"]["val_loss"]["loss"] == pytest.approx(by_run[0], rel=1e-5)
    assert main(["sample", str(straight), "ab", "--n", "3", "--max-new-tokens", "8"]) == 0
    capsys.readouterr()
    assert main(["sample", str(straight), "ab", "--dtype", "int8"]) == 2
    assert "int8 is for plain GPT-2" in capsys.readouterr().err
    assert main(["explore", str(straight), "--out", str(tmp_path / "look")]) == 0
    said = capsys.readouterr().out
    assert "modern GPT with 2 layers" in said
    assert "wpe: none" in said
    assert "lm_head" in said
    assert {path.name for path in (tmp_path / "look").iterdir()} >= {"explore.html", "wte.png", "attention_heads.png"}
    assert not (tmp_path / "look" / "wpe.png").exists()
    assert main(["verify", str(straight)]) == 0
    assert main(["report", str(straight), "--out", str(tmp_path / "report.html")]) == 0


def test_it_is_written_where_it_can_be_and_nowhere_else(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(straight), str(tmp_path / "m.safetensors"), "--to", "safetensors"]) == 0
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "native"), "--to", "native"]) == 0
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == weights_and_state(straight)[0]
    capsys.readouterr()
    assert main(["convert", str(straight), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert "holds GPT-2 alone" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_it_is_planned(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(recipe), "--machine", "H100", "--json", str(out)]) == 0
    n_params = 2 * 320 * 32 + 2 * 12 * 32 * 32 + 6 * 32  # by hand: wte and head, two blocks, six norms
    assert json.loads(out.read_text())["memory"]["parts"]["weights"] == 4 * n_params


@pytest.mark.slow  # tests/model/test_architectures.py has the gradients of two ranks
def test_two_ranks_train_as_one(straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    command = ["train", str(recipe), "--data", str(tiny_data), "--run", str(tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, "-m", "regpt2", "--", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    two, alone = losses(tmp_path / "two"), losses(straight)
    assert two.keys() == alone.keys()
    # sums in another order, 1e-7 each, which Muon's roots of small singular values can enlarge
    assert all(two[step] == pytest.approx(alone[step], abs=1e-3) for step in alone)
