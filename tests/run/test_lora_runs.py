"""A run with LoRA by the real commands: adapters trained, merged, saved, resumed to the same bits; damage noticed."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import TINY_RECIPE, Run
from rank_processes import command_on_ranks
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.model.files.load import load_model
from regpt2.run.loop import train
from regpt2.training import checkpoint
from regpt2.training.lora import LoraConfig

RECIPE = TINY_RECIPE + "[lora]\nrank = 4\nalpha = 8.0\n"
FILES = (*checkpoint.FILES[:3], "adapter_model.safetensors", "adapter_config.json")


def run_train(recipe: Path, data: Path, run: Path, **changes: Any) -> None:
    train(dataclasses.replace(load_recipe(str(recipe)), data=str(data), run=str(run), **changes))


def contents(run: Path, step: int = 12) -> dict[str, bytes]:
    return {name: (run / "checkpoints" / f"step-{step:08d}" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "tiny_lora.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path) -> Path:
    """One uninterrupted run."""
    run_train(recipe, tiny_data, recipe.parent / "run")
    return recipe.parent / "run"


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after update 4."""
    shutil.copytree(straight, tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    return tmp_path / "run"


def test_a_checkpoint_holds_the_base_plus_the_product_and_nothing_else_moved(straight: Path) -> None:
    folder = straight / "checkpoints" / "step-00000012"
    base, saved = load_file(straight / "base" / "model.safetensors"), load_file(folder / "model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    products = {
        name.removeprefix("base_model.model.transformer.").replace("lora_A.weight", "weight"): (
            2.0 * found[name.replace("lora_A", "lora_B")] @ found[name]
        )
        for name in found
        if "lora_A" in name
    }
    assert len(products) == 8
    for name, tensor in saved.items():
        if name in products:
            assert np.abs(products[name]).max() > 1e-4
            np.testing.assert_allclose(tensor, base[name] + products[name], rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(tensor, base[name])
    learning = sum(tensor.size for tensor in found.values())
    assert learning == 16 * 4 * 32 * 2
    moments = load_file(folder / "optimizer.safetensors")
    assert (
        sum(tensor.size for name, tensor in moments.items() if name.endswith(("exp_avg", "exp_avg_sq"))) == 2 * learning
    )


def test_a_stopped_run_resumes_to_the_same_bits(straight: Path, stopped: Path, recipe: Path, tiny_data: Path) -> None:
    run_train(recipe, tiny_data, stopped)
    assert contents(stopped) == contents(straight)

    def results(run: Path) -> dict[tuple[str, int], Any]:
        return {
            (event["event"], event["step"]): event["loss"]
            for event in read_events(run / "metrics.jsonl")
            if event["event"] in ("train", "eval")
        }

    assert results(stopped) == results(straight)
    assert results(straight)["eval", 12] < results(straight)["eval", 0]


def test_the_run_says_what_trains_and_evaluates_what_it_saves(
    straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path, regpt2: Run
) -> None:
    done = regpt2("train", recipe, "--data", tiny_data, "--run", tmp_path / "run", "--max-steps", "1")
    assert "training 4.1k of 34.7k parameters (LoRA, rank 4)" in done.stdout, done.stdout
    assert "begin from a trained one with --init MODEL" in done.stderr
    start, *_ = read_events(straight / "metrics.jsonl")
    assert start["trainable_params"] == 4096
    assert start["n_params"] == load_model(straight).model.n_params()
    found = regpt2("evaluate", straight, "--evals", "val_loss", "--data", tiny_data, "--val-tokens", "512")
    (recorded,) = (e for e in read_events(straight / "metrics.jsonl") if e["event"] == "eval" and e["step"] == 12)
    assert f"{recorded['loss']:.4f}" in found.stdout, found.stdout + found.stderr


def test_verify_notices_damaged_adapters(stopped: Path, regpt2: Run) -> None:
    whole = regpt2("verify", stopped)
    assert whole.returncode == 0
    assert "28 frozen weights of LoRA" in whole.stdout
    path = stopped / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = regpt2("verify", stopped)
    assert done.returncode == 1
    assert "adapter_model.safetensors is damaged" in done.stdout + done.stderr


def test_a_run_does_not_resume_on_other_frozen_weights(stopped: Path, recipe: Path, tiny_data: Path) -> None:
    path = stopped / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors has the SHA-256 .* put that file back"):
        run_train(recipe, tiny_data, stopped)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing: it holds the frozen weights"):
        run_train(recipe, tiny_data, stopped)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8, alpha=8.0), LoraConfig(rank=4)])
def test_other_adapters_are_another_run(stopped: Path, recipe: Path, tiny_data: Path, lora: LoraConfig) -> None:
    with pytest.raises(ConfigError, match=r"lora\.(rank|alpha) was .* that makes it another run"):
        run_train(recipe, tiny_data, stopped, lora=lora)


def test_a_bad_option_is_one_line_before_any_work(recipe: Path, tiny_data: Path, tmp_path: Path, regpt2: Run) -> None:
    for option, value, message in (
        ("rank", "-2", "lora.rank = -2 must be at least 0"),
        ("rank", "33", "lora.rank = 33 must be at most model.n_embd = 32"),
        ("rank", "many", "many"),
        ("alpha", "0", "lora.alpha = 0.0 must be above 0"),
    ):
        done = regpt2("train", recipe, "--data", tiny_data, "--run", tmp_path / "run", f"--lora.{option}", value)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["ordered", "ddp"])
def test_two_ranks_train_the_same_adapters(
    straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path, unused_port: int, strategy: str
) -> None:
    common = ["train", recipe, "--data", tiny_data, "--parallel.strategy", strategy, "--eval-every", 0]
    command_on_ranks(2, unused_port, tmp_path, *common, "--sample-every", 0, "--run", tmp_path / "two")
    if strategy == "ordered":
        ordered = dataclasses.replace(load_recipe(str(recipe)).parallel, strategy="ordered")
        run_train(recipe, tiny_data, tmp_path / "one", parallel=ordered, eval_every=0, sample_every=0)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        return
    ours, two = (load_file(run / "checkpoints" / "step-00000012" / FILES[3]) for run in (straight, tmp_path / "two"))
    for name, tensor in ours.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-3, atol=1e-5)
