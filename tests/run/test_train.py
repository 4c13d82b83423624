"""The loop: an uninterrupted run equals a killed and resumed one bit for bit; signals, ranks, bad input."""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_RECIPE, Run, pages_written, write_data
from rank_processes import command_on_ranks
from regpt2.base.errors import CheckpointError, ConfigError, DataError, UsageError
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.run import intervals as observe_module
from regpt2.run import loop as train_module
from regpt2.run.loop import due, train
from warm_processes import Python, run_python


def run_train(recipe: Path, data: Path, run: Path, **changes: Any) -> RunConfig:
    config = dataclasses.replace(load_recipe(str(recipe)), data=str(data), run=str(run), **changes)
    train(config)
    return config


def state_of(run: Path, step: int = 12) -> dict[str, str]:
    """SHA-256 of the weights and the optimizer state at a step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def losses(run: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(run / "metrics.jsonl") if e["event"] == "train"}


def evals(run: Path) -> dict[int, float]:
    found = [(e["step"], e["loss"]) for e in read_events(run / "metrics.jsonl") if e["event"] == "eval"]
    assert len(dict(found)) == len(found), "a step was evaluated twice"
    return dict(found)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """One uninterrupted run, with dropout."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    with pages_written():
        run_train(folder / "tiny.toml", tiny_data, folder / "run")
    return folder / "run"


def test_a_run_leaves_what_it_should(straight: Path) -> None:
    assert {p.name for p in straight.iterdir()} >= {
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "report.html",
        "report.md",
        "report.png",
    }
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (4, 8, 12)]
    events = list(read_events(straight / "metrics.jsonl"))
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 13))
    assert sorted(evals(straight)) == [0, 6, 12]
    assert [e["step"] for e in events if e["event"] == "sample"] == [12]
    assert events[-1]["event"] == "end"
    assert events[-1]["reason"] == "finished"


def test_the_loss_at_init_is_near_ln_of_the_vocabulary_and_falls(straight: Path) -> None:
    assert losses(straight)[1] == pytest.approx(math.log(257), abs=0.1)
    assert losses(straight)[12] < losses(straight)[1] - 0.5


def test_the_runs_config_is_a_recipe(straight: Path, tmp_path: Path, tiny_data: Path) -> None:
    run_train(straight / "config.toml", tiny_data, tmp_path / "again")
    assert state_of(tmp_path / "again") == state_of(straight)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_equals_an_uninterrupted_run(
    tmp_path: Path, tiny_data: Path, straight: Path, dropout: float
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_RECIPE.replace("dropout = 0.1", f"dropout = {dropout}"))
    if dropout:
        reference = straight
    else:
        reference = tmp_path / "reference"
        run_train(recipe, tiny_data, reference)
    stopped = tmp_path / "stopped"
    shutil.copytree(reference, stopped)
    for step in (8, 12):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:08d}")
    torch.manual_seed(999)  # whatever the process did before must not matter
    run_train(recipe, tiny_data, stopped)
    assert state_of(stopped) == state_of(reference)
    assert losses(stopped) == losses(reference)
    assert evals(stopped) == evals(reference)


def test_logging_seldom_loses_nothing_at_a_resume(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    """A checkpoint between two log lines: record and guard must know every update before it."""
    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    run_train(tiny_recipe, tiny_data, reference, log_every=5)
    shutil.copytree(reference, stopped)
    for step in (8, 12):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:08d}")
    run_train(tiny_recipe, tiny_data, stopped, log_every=5)
    assert losses(stopped) == losses(reference)
    assert sorted(losses(stopped)) == list(range(1, 13))
    for step in (4, 8, 12):
        states = [
            json.loads((r / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
            for r in (reference, stopped)
        ]
        assert states[0]["guard"] == states[1]["guard"]
        assert len(states[0]["guard"]["losses"]) == step


def test_random_numbers_that_are_not_a_function_of_the_step_are_caught(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: dropout draws from wherever the generator happens to stand."""
    monkeypatch.setattr(train_module, "seed_dropout", lambda *_: None)
    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    run_train(tiny_recipe, tiny_data, reference)
    shutil.copytree(reference, stopped)
    for step in (8, 12):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:08d}")
    run_train(tiny_recipe, tiny_data, stopped)
    assert state_of(stopped) != state_of(reference)


def command(recipe: Path, data: Path, run: Path, *more: str) -> list[str]:
    """What follows `python`."""
    return ["-m", "regpt2", "train", str(recipe), "--data", str(data), "--run", str(run), *more]


def wait_for_step(run: Path, step: int, process: Python, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and max([0, *losses(run)]) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


@pytest.mark.slow  # `make faults` does it 40 times
def test_kill_9_at_random_moments_changes_no_bit(tmp_path: Path, tiny_data: Path) -> None:
    """The real command, killed hard again and again until it gets through."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        TINY_RECIPE.replace("max_steps = 12", "max_steps = 400").replace("eval_every = 6", "eval_every = 50")
    )
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    run_train(recipe, tiny_data, reference)
    rng, n_kills, reached = random.Random(5), 0, 0
    while reached < 400:
        process = Python(*command(recipe, tiny_data, killed))
        target = reached + rng.randrange(20, 150)
        if target < 400:
            wait_for_step(killed, target, process)
            process.kill()
            n_kills += 1
        _, errors = process.communicate(timeout=60)
        assert target < 400 or process.returncode == 0, errors
        reached = max(losses(killed))
    assert n_kills >= 3
    assert state_of(killed, 400) == state_of(reference, 400)
    assert losses(killed) == losses(reference)
    assert evals(killed) == evals(reference)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_save_and_leave_and_the_same_command_goes_on(
    tmp_path: Path, tiny_data: Path, number: signal.Signals
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        TINY_RECIPE.replace("max_steps = 12", "max_steps = 100000").replace("save_every = 4", "save_every = 90000")
    )
    run = tmp_path / "run"
    process = Python(*command(recipe, tiny_data, run))
    wait_for_step(run, 5, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    saved = [p.name for p in (run / "checkpoints").iterdir()]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step-"))
    assert f"stopped by signal {int(number)} at step {step:,}" in output
    done = run_python(*command(recipe, tiny_data, run, "--max-steps", str(step + 3)))
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {step:,}" in done.stdout


def torchrun(n: int, recipe: Path, data: Path, run: Path, *more: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    # `--`: torchrun would take `--run` for an abbreviation of its own `--run-path`
    ours = ["-m", "regpt2", "--", *command(recipe, data, run, *more)[2:]]
    done = subprocess.run([*launcher, *ours], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_train_as_one_and_a_run_may_change_their_number(
    tmp_path: Path, tiny_data: Path, straight: Path, unused_port: int
) -> None:
    """torchrun on gloo: the same windows, so losses agree to rounding; and 2 ranks can go on where 1 stopped."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_RECIPE)
    torchrun(2, recipe, tiny_data, tmp_path / "two")
    alone, two = losses(straight), losses(tmp_path / "two")
    assert two.keys() == alone.keys()
    # the same sums in another order, some 1e-7 each, grow a little with every update
    assert all(two[step] == pytest.approx(alone[step], abs=1e-4) for step in alone)
    assert evals(tmp_path / "two")[0] == pytest.approx(evals(straight)[0], abs=1e-6)
    mixed = tmp_path / "mixed"
    shutil.copytree(straight, mixed)
    shutil.rmtree(mixed / "checkpoints" / "step-00000012")
    command_on_ranks(2, unused_port, tmp_path, "train", recipe, "--data", tiny_data, "--run", mixed)
    assert losses(mixed)[12] == pytest.approx(alone[12], abs=1e-4)


def test_observing_changes_neither_weights_nor_data(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, straight: Path
) -> None:
    run_train(tiny_recipe, tiny_data, tmp_path / "silent", eval_every=0, sample_every=0)
    run_train(tiny_recipe, tiny_data, tmp_path / "busy", eval_every=1, sample_every=1, log_every=5)
    assert state_of(tmp_path / "silent") == state_of(tmp_path / "busy") == state_of(straight)


def test_an_evaluation_that_breaks_does_not_end_the_run(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regpt2.evals import val_loss

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(val_loss, "evaluate", broken)
    monkeypatch.setattr(observe_module, "generate", broken)
    run_train(tiny_recipe, tiny_data, tmp_path / "run")
    notes = [e["text"] for e in read_events(tmp_path / "run" / "metrics.jsonl") if e["event"] == "note"]
    assert sum("evaluation val_loss failed" in text for text in notes) == 3
    assert sum("sampling failed" in text for text in notes) == 1
    assert state_of(tmp_path / "run") == state_of(straight)


def test_an_evaluation_without_its_data_is_left_out_and_said(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for before the first update, not in the middle of the run; with the file it is measured."""
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    names = dataclasses.replace(load_recipe(str(tiny_recipe)).evals, names=("val_loss", "lambada"))
    run_train(tiny_recipe, tiny_data, tmp_path / "without", evals=names)
    events = list(read_events(tmp_path / "without" / "metrics.jsonl"))
    assert {e["eval"] for e in events if e["event"] == "eval"} == {"val_loss"}
    (note,) = [e["text"] for e in events if e["event"] == "note" and "lambada" in e["text"]]
    assert "evaluation lambada is left out" in note and "--files lambada=PATH" in note
    (tmp_path / "a.jsonl").write_text('{"text": "the cat and the dog and the cat"}\n')
    given = dataclasses.replace(names, files=(f"lambada={tmp_path / 'a.jsonl'}",))
    run_train(tiny_recipe, tiny_data, tmp_path / "with", evals=given)
    events = list(read_events(tmp_path / "with" / "metrics.jsonl"))
    measured = [(e["step"], e["count"]) for e in events if e.get("eval") == "lambada"]
    assert measured == [(0, 1), (6, 1), (12, 1)]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_agrees_with_eager(tmp_path: Path, tiny_data: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    text = TINY_RECIPE.replace("dropout = 0.1", "dropout = 0.0").replace("max_steps = 12", "max_steps = 6")
    recipe.write_text(text.replace("n_layer = 2", "n_layer = 1"))  # fewer kernels to compile
    run_train(recipe, tiny_data, tmp_path / "eager")
    run_train(recipe, tiny_data, tmp_path / "compiled", compile="on")
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert all(compiled[step] == pytest.approx(eager[step], abs=1e-4) for step in eager)
    names = state_of(tmp_path / "compiled", 6)
    assert names  # evaluated, sampled and saved from the plain module, under plain names
    from safetensors import safe_open

    with safe_open(tmp_path / "compiled" / "checkpoints" / "step-00000006" / "model.safetensors", "pt") as file:
        assert "wte.weight" in set(file.keys())


@pytest.mark.seconds
def test_one_batch_can_be_learned_by_heart(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", n_train=257)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        TINY_RECIPE.replace("max_steps = 12", "max_steps = 150")
        .replace("dropout = 0.1", "dropout = 0.0")
        .replace("eval_every = 6", "eval_every = 0")
        .replace("save_every = 4", "save_every = 0")
        .replace("3e-3", "1e-2")
    )
    run_train(recipe, data, tmp_path / "run")
    assert losses(tmp_path / "run")[150] < 0.1


# what a user can get wrong


def test_going_on_as_another_run_is_refused(tmp_path: Path, tiny_data: Path, straight: Path, tiny_recipe: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = dataclasses.replace(load_recipe(str(tiny_recipe)), data=str(tiny_data), run=str(run), max_steps=20)
    with pytest.raises(ConfigError, match=r"seed was 1337 in .* and is 7 now"):
        train(dataclasses.replace(config, seed=7))
    with pytest.raises(ConfigError, match=r"batch.batch_tokens was 256"):
        train(dataclasses.replace(config, batch=dataclasses.replace(config.batch, batch_tokens=512)))
    with pytest.raises(CheckpointError, match="holds a model with n_layer = 2, the recipe has 3"):
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=3)))
    with pytest.raises(CheckpointError, match="was trained on data with fingerprint"):
        train(dataclasses.replace(config, data=str(write_data(tmp_path / "other", seed=1))))
    with pytest.raises(UsageError, match="already holds a run and resume is 'never'"):
        train(dataclasses.replace(config, resume="never"))
    with pytest.raises(UsageError, match="has no checkpoint to resume from and resume is 'must'"):
        train(dataclasses.replace(config, resume="must", run=str(tmp_path / "none")))


def test_a_damaged_newest_checkpoint_costs_only_the_way_from_the_one_before(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    weights = run / "checkpoints" / "step-00000012" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 4
    weights.write_bytes(damaged)
    run_train(tiny_recipe, tiny_data, run)
    assert state_of(run) == state_of(straight)
    assert (run / "checkpoints" / "bad-step-00000012").is_dir()


def test_wrong_data_is_refused_before_anything_is_written(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError, match="regpt2 prepare"):
        run_train(tiny_recipe, tmp_path / "nothing", run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no train tokens here"):
        run_train(tiny_recipe, tmp_path / "empty", run)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_data, damaged)
    shard = damaged / "tiny_train_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"tiny_train_000000\.bin"):
        run_train(tiny_recipe, damaged, run)
    flipped = bytearray(whole)
    flipped[3000] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(DataError, match=r"1 damaged shards .*SHA-256"):
        run_train(tiny_recipe, damaged, run)
    assert not (run / "metrics.jsonl").exists()


def test_a_vocabulary_other_than_the_datas_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY_RECIPE.replace("vocab_size = 257", "vocab_size = 50257"))
    with pytest.raises(ConfigError, match=r"model.vocab_size = 50,257, but .* 'bytes' of 257 tokens"):
        run_train(recipe, tiny_data, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gpt2_125m"], 2, "did you mean 'gpt2_124m'"),
        (["nothing.toml"], 2, "there is no such file"),
        (["demo", "--optim.lrr", "1"], 2, "lrr"),
        (["demo", "--optim.lr", "fast"], 2, "fast"),
        (["demo", "--optim.lr", "-1"], 2, "optim.lr = -1.0 must be above 0"),
        (["demo", "--batch.batch-tokens", "1000"], 2, "the nearest is"),
        (["demo", "--data", "/nonexistent"], 1, "regpt2 prepare"),
        (["demo", "--device", "cuda"], 2, "is not on this machine"),
        (["--max-steps", "3"], 2, "the recipe comes first"),
    ],
)
def test_wrong_usage_ends_in_one_message(
    regpt2: Run, tiny_data: Path, arguments: list[str], code: int, message: str
) -> None:
    more = [] if "--data" in arguments or arguments[0].startswith("-") else ["--data", str(tiny_data)]
    done = regpt2("train", *arguments, *more)
    assert done.returncode == code, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_read_only_folder_ends_in_one_message(
    tmp_path: Path, regpt2: Run, tiny_recipe: Path, tiny_data: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = regpt2("train", tiny_recipe, "--data", tiny_data, "--run", locked / "run")
    assert done.returncode == 1
    assert "ermission" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_cannot_share_a_folder(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    from regpt2.base.files import folder_lock

    with folder_lock(tmp_path / "run"), pytest.raises(UsageError, match="is in use by process"):
        run_train(tiny_recipe, tiny_data, tmp_path / "run")


def test_due() -> None:
    assert [step for step in range(11) if due(step, 4, 10)] == [0, 4, 8, 10]
    assert not any(due(step, 0, 10) for step in range(11))


def test_the_run_event_says_where_a_result_came_from(straight: Path) -> None:
    run = next(e for e in read_events(straight / "metrics.jsonl") if e["event"] == "run")
    assert {"version", "commit", "torch", "device", "precision", "data_fingerprint", "config", "command"} <= run.keys()
    assert run["n_params"] == 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32 + (257 + 32) * 32
    assert set(run["baselines"]) == {"unigram", "gzip"}


def test_a_signal_in_an_evaluation_cuts_it_short_and_loses_no_update(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a line of the record every fifth update, and the evaluation between two lines."""
    from regpt2.evals import val_loss

    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    run_train(tiny_recipe, tiny_data, reference, log_every=5)
    read, calls = val_loss.TokenStream.read, []

    def read_and_be_stopped(self: Any, start: int, count: int) -> Any:
        calls.append(start)
        if len(calls) == 20:  # the evaluation before the first update takes 16 windows
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, start, count)

    monkeypatch.setattr(val_loss, "open_tokens", lambda *args: _Counted(tiny_data, read_and_be_stopped))
    config = dataclasses.replace(load_recipe(str(tiny_recipe)), data=str(tiny_data), run=str(stopped), log_every=5)
    summary = train(config)
    assert (summary.step, summary.exit_code) == (6, 128 + signal.SIGTERM)
    assert sorted(losses(stopped)) == list(range(1, 7))
    assert len(calls) < 30, "the evaluation went on to its end"
    state = json.loads((stopped / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert len(state["guard"]["losses"]) == 6
    monkeypatch.undo()
    run_train(tiny_recipe, tiny_data, stopped, log_every=5)
    assert state_of(stopped) == state_of(reference)
    assert losses(stopped) == losses(reference)
    assert evals(stopped) == evals(reference)


class _Counted:
    """The validation split, every read of which is seen."""

    def __init__(self, data: Path, read: Any) -> None:
        from regpt2.data.tokens.shards import open_tokens

        self._tokens, self._read = open_tokens(data, "val"), read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)

    def read(self, start: int, count: int) -> Any:
        return self._read(self._tokens, start, count)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()


def test_a_run_that_the_guard_ends_says_so_in_its_record(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regpt2.base.errors import Problem
    from regpt2.model.gpt import GPT

    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **options: forward(*args, **options) * float("nan"))
    with pytest.raises(Problem, match="3 updates in a row were skipped"):
        run_train(tiny_recipe, tiny_data, tmp_path / "run")
    last = list(read_events(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert last["event"] == "end"
    assert last["reason"].startswith("failed: 3 updates in a row were skipped")


def test_what_cannot_run_fails_before_anything_is_written(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal: one micro-batch at full size, thrown away."""
    from regpt2.model.gpt import GPT

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run_train(tiny_recipe, tiny_data, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}


def test_the_garbage_collector_leaves_alone_what_stays_and_only_while_the_run_lasts(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    from regpt2.run import loop

    update, left_alone = loop.update, []

    def looking(*arguments: Any) -> Any:
        left_alone.append(gc.get_freeze_count())
        return update(*arguments)

    monkeypatch.setattr(loop, "update", looking)
    run_train(tiny_recipe, tiny_data, tmp_path / "run")
    assert min(left_alone) > 10_000
    assert gc.get_freeze_count() == 0
