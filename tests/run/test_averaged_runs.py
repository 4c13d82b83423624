"""Runs whose model is the average of their weights: beside NumPy's over each checkpoint's raw weights; resumed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_skipped_updates import overflow, scaled, skipped
from test_train import command, evals, losses, run_train, state_of, wait_for_step
from torch.nn import functional as F

from conftest import TINY_RECIPE, Run, shard_tokens, write_tokens
from rank_processes import command_on_ranks
from regpt2.base.errors import CheckpointError, ConfigError, Problem
from regpt2.base.ranks.world import World
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.setup import setup_of
from regpt2.data.tokenizer import load_tokenizer
from regpt2.machine.health.patient import Patient
from regpt2.machine.planning.disk import checkpoint_bytes
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT
from regpt2.run.intervals import random_seed
from regpt2.run.setup import TrainingRun
from regpt2.sampling.generate import generate
from regpt2.training import checkpoint
from regpt2.training.memory import step_memory
from warm_processes import Python

__all__ = ["overflow", "scaled"]  # fixtures

EMA, LAST = 0.6, 12
RECIPE = (
    TINY_RECIPE.replace("save_every = 4", "save_every = 1\nkeep_checkpoints = 0\nkeep_best = true")
    .replace("eval_every = 6", "eval_every = 3")
    .replace("[optim]", f"[optim]\nema = {EMA}")
    .replace("[schedule]", '[schedule]\nkind = "constant"')  # the same for any max_steps
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "averaged.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    run_train(recipe, tiny_data, run)
    return run


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def raw_of(run: Path, step: int) -> dict[str, np.ndarray]:
    tensors = load_file(folder_of(run, step) / "optimizer.safetensors")
    return {key.removesuffix("/raw"): t.double().numpy() for key, t in tensors.items() if key.endswith("/raw")}


def averages(run: Path, recipe_seed: int, missed: tuple[int, ...] = ()) -> dict[int, dict[str, np.ndarray]]:
    """What the model of each step should be, by the raw weights of the checkpoints."""
    shape = load_model(folder_of(run, 1)).model.config
    mean = {name: p.detach().double().numpy() for name, p in GPT(shape, seed=recipe_seed).named_parameters()}
    found = {}
    for step in range(1, LAST + 1):
        d = min(EMA, (1 + step) / (10 + step))
        if step not in missed:
            mean = {name: d * mean[name] + (1 - d) * raw for name, raw in raw_of(run, step).items()}
        found[step] = mean
    return found


def assert_models_are(run: Path, expected: dict[int, dict[str, np.ndarray]]) -> None:
    for step, mean in expected.items():
        model = load_file(folder_of(run, step) / "model.safetensors")
        assert model.keys() == mean.keys()
        for name, t in model.items():
            assert np.allclose(t.numpy(), mean[name][: len(t)], rtol=0, atol=1e-6), (step, name)


def val_loss(model: torch.nn.Module, data: Path) -> float:
    """Over the 512 tokens that the recipe evaluates, in windows of 32."""
    ids = torch.tensor(shard_tokens(data, "val"))
    windows = torch.stack([ids[i : i + 33] for i in range(0, 512, 32)])
    with torch.no_grad():
        logits = model.eval()(windows[:, :-1])[..., :257]
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_the_saved_model_is_the_average_of_the_raw_weights(straight: Path) -> None:
    expected = averages(straight, 1337)
    assert_models_are(straight, expected)
    last, raw = expected[LAST]["h.0.mlp.c_fc.weight"], raw_of(straight, LAST)["h.0.mlp.c_fc.weight"]
    assert np.abs(last - raw).max() > 1e-3, "to be felt, the average has to differ from the raw weights"


def test_the_average_is_evaluated_and_kept_as_the_best(straight: Path, tiny_data: Path) -> None:
    found = evals(straight)
    assert sorted(found) == [0, 3, 6, 9, 12]
    for step in (3, 6, 9, 12):
        assert found[step] == pytest.approx(val_loss(load_model(folder_of(straight, step)).model, tiny_data), abs=1e-5)
    best = min(found, key=lambda step: found[step])
    kept, there = (
        load_file(folder / "model.safetensors") for folder in (straight / "checkpoints/best", folder_of(straight, best))
    )
    assert all(torch.equal(kept[name], there[name]) for name in there)
    assert not (straight / "checkpoints" / "best" / "optimizer.safetensors").exists()


def test_the_average_writes_the_samples_and_is_what_commands_read(straight: Path, regpt2: Run) -> None:
    (event,) = [e for e in read_events(straight / "metrics.jsonl") if e["event"] == "sample"]
    loaded = load_model(folder_of(straight, LAST))
    rows = generate(
        loaded.model.train(),  # the sample of a run is written between updates
        torch.tensor([[97]] * 2),
        8,
        temperature=1.0,
        top_k=50,
        never=load_tokenizer("bytes").textless,
        generator=torch.Generator().manual_seed(random_seed(1337, LAST, 0)),
    )
    assert event["texts"] == [load_tokenizer("bytes").decode(row) for row in rows.tolist()]
    done = regpt2("verify", straight)
    assert done.returncode == 0, done.stdout + done.stderr
    assert regpt2("sample", straight, "a", "--max-new-tokens", 4).returncode == 0


def test_a_resumed_run_equals_an_uninterrupted_run(
    recipe: Path, tiny_data: Path, straight: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(straight, stopped)
    for step in range(5, LAST + 1):
        shutil.rmtree(folder_of(stopped, step))
    shutil.rmtree(stopped / "checkpoints" / "best")
    run_train(recipe, tiny_data, stopped)
    for step in range(5, LAST + 1):
        assert state_of(stopped, step) == state_of(straight, step)
    assert losses(stopped) == losses(straight) and evals(stopped) == evals(straight)


@pytest.mark.slow
def test_kill_9_in_the_middle_changes_no_bit(recipe: Path, tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = Python(*command(recipe, tiny_data, killed, "--max-steps", "2000"))
    wait_for_step(killed, 5, process)
    process.kill()
    process.communicate(timeout=60)
    for folder in sorted((killed / "checkpoints").glob("step-*"))[4:]:  # go on from step 4, however far it came
        shutil.rmtree(folder)
    run_train(recipe, tiny_data, killed)
    assert state_of(killed) == state_of(straight)
    assert losses(killed) == losses(straight)


def test_skipped_updates_do_not_move_the_average(
    scaled: None, overflow: list[float], recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overflow[0] = 5_000.0  # the first scales are 65,536 and 32,768, and the gradient of a pass is a quarter of that
    run_train(recipe, tiny_data, run)
    missed = tuple(skipped(run))
    assert missed == (1, 2)
    assert_models_are(run, averages(run, 1337, missed))
    assert (folder_of(run, 1) / "model.safetensors").read_bytes() == (
        folder_of(run, 2) / "model.safetensors"
    ).read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_have_the_average_of_one_and_a_run_may_change_their_number(
    strategy: str, recipe: Path, tiny_data: Path, straight: Path, tmp_path: Path, unused_port: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in range(5, LAST + 1):  # the first four updates on one rank
        shutil.rmtree(folder_of(run, step))
    shutil.rmtree(run / "checkpoints" / "best")
    options = ("--data", tiny_data, "--run", run, "--parallel.strategy", strategy, "--parallel.check-every", 3)
    command_on_ranks(2, unused_port, tmp_path, "train", recipe, *options)
    for name in ("model.safetensors", "optimizer.safetensors"):
        alone, two = (load_file(folder_of(r, LAST) / name) for r in (straight, run))
        assert alone.keys() == two.keys()
        for key in alone:
            if not key.endswith("exp_avg_sq"):
                assert torch.allclose(alone[key], two[key], rtol=0, atol=1e-3), key
    assert evals(run) == pytest.approx(evals(straight), abs=1e-3)
    assert_models_are(run, averages(run, 1337))


def test_the_ranks_averages_are_compared(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another rank would send differs in one average by one bit, before the first update."""

    def stack(self: World, mine: torch.Tensor) -> torch.Tensor:
        theirs = mine.clone()
        theirs[-1] += 1
        return torch.stack([mine, mine, theirs])

    monkeypatch.setattr(World, "stack", stack)
    real = TrainingRun.check_replicas
    monkeypatch.setattr(
        TrainingRun, "check_replicas", lambda self, step: real(replace(self, world=replace(self.world, size=3)), step)
    )
    with pytest.raises(Problem, match=r"rank\(s\) 2 differ from the other ranks', first in the average of ln_f\.bias"):
        run_train(recipe, tiny_data, tmp_path / "run")


def test_another_decay_is_another_run(recipe: Path, tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.toml"
    shutil.copytree(straight, run)
    for ema in (0.0, 0.5):
        other.write_text(RECIPE.replace(f"ema = {EMA}", f"ema = {ema}"))
        with pytest.raises(ConfigError, match=rf"optim\.ema was {EMA} .* and is {ema} now: that makes it another run"):
            run_train(other, tiny_data, run, max_steps=LAST + 1)


def test_a_checkpoint_without_raw_weights_is_refused(
    recipe: Path, tiny_data: Path, straight: Path, tmp_path: Path
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    without = tmp_path / "without.toml"
    without.write_text(RECIPE.replace(f"ema = {EMA}", "ema = 0.0"))
    run_train(without, tiny_data, plain, max_steps=2)
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(plain / "checkpoints", run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has no raw weight wte\.weight"):
        run_train(recipe, tiny_data, run)


def test_memory_and_disk_count_one_more_copy(recipe: Path, straight: Path) -> None:
    config = load_recipe(str(recipe))
    averaged = setup_of(config, 1, device="cpu", precision="fp32", compiled=False)
    without = replace(averaged, optim=replace(averaged.optim, ema=0.0))
    assert step_memory(averaged)["average of weights"] == 4 * averaged.n_params
    assert sum(step_memory(averaged).values()) - sum(step_memory(without).values()) == 4 * averaged.n_params
    on_disk = sum(f.stat().st_size for f in folder_of(straight, LAST).glob("*.safetensors"))
    assert checkpoint_bytes(averaged) == pytest.approx(on_disk, rel=0.2)  # beside it names, and no padding
    assert checkpoint_bytes(averaged) - checkpoint_bytes(without) == 4 * averaged.n_params
    patient = Patient(World(rank=0, local_rank=0, size=1, device=torch.device("cpu")), config)
    assert patient.saved_bytes == checkpoint_bytes(averaged)  # what doctor counts
    sharded = replace(averaged, strategy="fsdp", ranks=4)
    assert step_memory(sharded)["average of weights"] == averaged.n_params


def test_a_disk_without_room_for_the_average_is_refused(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two checkpoints of 3 numbers for each parameter, not for two of 4."""
    n_params = setup_of(load_recipe(str(recipe)), 1, device="cpu", precision="fp32", compiled=False).n_params
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 2 * checkpoint.room_bytes(14 * n_params))
    with pytest.raises(Problem, match=r"2 more checkpoints at once"):
        run_train(recipe, tiny_data, tmp_path / "run", max_steps=2, keep_best=False)
    without = tmp_path / "without.toml"
    without.write_text(RECIPE.replace(f"ema = {EMA}", "ema = 0.0"))
    run_train(without, tiny_data, tmp_path / "plain", max_steps=2, keep_best=False)


def test_the_recipe_fixed_data_trains_either_model_and_goes_on_from_another(tmp_path: Path, regpt2: Run) -> None:
    draw = np.random.default_rng(0)
    ids = np.where(draw.random(3_000) < 0.02, 256, draw.integers(97, 107, 3_000)).astype(np.uint16)
    data = write_tokens(tmp_path / "data", [ids], ids[:600])
    sizes = {"n-layer": 2, "n-head": 2, "n-embd": 16, "block-size": 64, "vocab-size": 257}
    shape = [part for name, size in sizes.items() for part in (f"--model.{name}", size)]
    batch = ("--batch.seq-len", 64, "--batch.micro-batch", 8, "--batch.batch-tokens", 1024)
    often = ("--eval-every", 8, "--save-every", 8, "--schedule.warmup-steps", 2, "--device", "cpu")
    for name, options in {
        "gpt2": [*shape, *batch],
        "modern": [*shape, *batch, "--model.architecture", "modern", "--model.dropout", 0],
        "further": ["--init", tmp_path / "gpt2", "--optim.lr", "1e-4", *batch],
    }.items():
        done = regpt2("train", "fixed_data", "--run", tmp_path / name, "--data", data, *often, *options)
        assert done.returncode == 0, done.stderr
        assert "the model is the average of the weights (optim.ema = 0.99)" in done.stdout
        assert "best: step" in done.stdout and "23.9 epochs are 70 updates" in done.stdout
    first, on = evals(tmp_path / "gpt2"), evals(tmp_path / "further")
    assert first[0] > 5 > on[0] and min(first.values()) < first[0] - 0.5
