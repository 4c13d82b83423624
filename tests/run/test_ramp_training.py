"""A run whose batch grows: killed, resumed or on more ranks in the ramp it is the same; tokens are counted right."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import command, evals, losses, run_train, state_of, torchrun, wait_for_step

from conftest import TINY_RECIPE
from regpt2 import cli
from regpt2.base.errors import ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.commands import plan
from regpt2.config.recipe_files import load_recipe
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens
from regpt2.machine.known_gpus import find_machine
from regpt2.machine.planning.formulas import Place, step_seconds
from regpt2.pages.record import read_record
from regpt2.pages.report.certificate import certificate
from regpt2.references.curves import choose
from regpt2.references.run_facts import facts_of
from regpt2.references.verdict import of_record
from regpt2.run.loop import train
from regpt2.training.memory import Setup, micro_batches
from warm_processes import Python

# 128 tokens 27 times, 256 13 times, 384 9 times, then 512
RAMP = "[batch]\nramp_from = 128\nramp_tokens = 10_000\n"
RECIPE = TINY_RECIPE.replace("[batch]\n", RAMP).replace("batch_tokens = 256", "batch_tokens = 512")
SIZES = [128] * 27 + [256] * 13 + [384] * 9 + [512] * 11


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "ramp.toml"
    path.write_text(
        RECIPE.replace("max_steps = 12", "max_steps = 60")
        .replace("save_every = 4", "save_every = 10")
        .replace("eval_every = 6", "eval_every = 20")
        + "[parallel]\nstrategy = 'ordered'\n"
    )
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run, with dropout, through the ramp and beyond."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_train(recipe, tiny_data, run, keep_checkpoints=0, log_every=7)
    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == kind]


def test_the_record_counts_the_tokens_of_each_update(straight: Path, tiny_data: Path) -> None:
    after = np.cumsum([0, *SIZES]).tolist()
    assert [e["tokens"] for e in events(straight, "train")] == after[1:]
    assert [(e["step"], e["seen_tokens"]) for e in events(straight, "eval")] == [
        (step, after[step]) for step in (0, 20, 40, 60)
    ]
    assert events(straight, "run")[0]["total_tokens"] == after[-1]
    state = json.loads((straight / "checkpoints" / "step-00000030" / "state.json").read_text())
    assert state["tokens"] == after[30]
    assert read_record(straight).tokens_at(np.array([0.0, 12.0, 33.0])).tolist() == [0, after[12], after[33]]
    assert certificate(read_record(straight))["Batch ramp"] == "from 128 tokens per update on, over the first 10,000"
    facts = facts_of(read_events(straight / "metrics.jsonl"))
    assert facts.eval_tokens.tolist() == [after[step] for step in (0, 20, 40, 60)]
    assert facts.total_tokens == after[-1]
    assert events(straight, "run")[0]["data_sets"][0]["epochs"] == pytest.approx(after[-1] / 20_000)
    with open_tokens(tiny_data, "train") as tokens:
        batch = BatchConfig(batch_tokens=512, ramp_from=128, ramp_tokens=10_000, micro_batch=4, seq_len=32)
        loader = Loader(tokens, batch, seed=1337)
        expected = [f"{loader.batch(step).digest:016x}" for step in range(1, 61)]
    assert [e["data"] for e in events(straight, "train")] == expected


def test_the_speed_counts_the_tokens_that_were_trained_on(straight: Path) -> None:
    """Up to seven updates are timed together: their tokens over their time."""
    lines: dict[float, list[dict[str, Any]]] = {}
    for row in events(straight, "train"):
        lines.setdefault(row["step_ms"], []).append(row)
    assert max(map(len, lines.values())) == 7
    for step_ms, rows in lines.items():
        tokens = sum(SIZES[row["step"] - 1] for row in rows)
        assert rows[0]["tokens_per_s"] == pytest.approx(tokens / (len(rows) * step_ms / 1000))


def test_kill_9_in_the_ramp_changes_no_bit(straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The real command, killed hard before the batch is full, and given again."""
    killed = tmp_path / "killed"
    options = command(recipe, tiny_data, killed, "--keep-checkpoints", "0")
    process = Python(*options)
    wait_for_step(killed, 31, process)
    process.kill()
    process.communicate(timeout=60)
    assert 31 <= max(losses(killed)) < 60
    kept = max(int(path.name.removeprefix("step-")) for path in (killed / "checkpoints").glob("step-*"))
    assert 10 <= kept < 49, "the run was to be killed in the ramp"
    train(dataclasses.replace(load_recipe(str(recipe)), data=str(tiny_data), run=str(killed)))
    assert state_of(killed, 60) == state_of(straight, 60)
    assert losses(killed) == losses(straight)
    assert evals(killed) == evals(straight)


@pytest.mark.slow
def test_two_ranks_go_on_in_the_ramp_where_one_stopped(tmp_path: Path, tiny_data: Path) -> None:
    """To the bit, with dropout: in a ramp whose sizes can be summed in one order, of 4 and 8 micro-batches."""
    recipe = tmp_path / "ramp.toml"
    recipe.write_text(
        RECIPE.replace("ramp_from = 128", "ramp_from = 256").replace("10_000", "2000")
        + "[parallel]\nstrategy = 'ordered'\n"
    )
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    run_train(recipe, tiny_data, alone)
    assert [e["tokens"] for e in events(alone, "train")][6:10] == [7 * 256, 8 * 256, 8 * 256 + 512, 8 * 256 + 1024]
    shutil.copytree(alone, mixed)
    for step in (8, 12):
        shutil.rmtree(mixed / "checkpoints" / f"step-{step:08d}")
    torchrun(2, recipe, tiny_data, mixed)
    assert [e["world_size"] for e in events(mixed, "run")] == [1, 2]
    assert state_of(mixed) == state_of(alone)
    for key in ("loss", "data", "tokens"):
        assert [e[key] for e in events(mixed, "train")] == [e[key] for e in events(alone, "train")]


def test_another_ramp_is_another_run(straight: Path, recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    config = dataclasses.replace(load_recipe(str(recipe)), data=str(tiny_data), run=str(run), max_steps=61)
    for change, said in (({"ramp_tokens": 9_999}, "ramp_tokens was 10000"), ({"ramp_from": 256}, "ramp_from was 128")):
        with pytest.raises(ConfigError, match=said):
            train(dataclasses.replace(config, batch=dataclasses.replace(config.batch, **change)))


def test_the_first_line_says_the_ramp_and_a_bad_one_is_refused_in_one_message(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seldom = ["--eval-every", "0", "--sample-every", "0", "--save-every", "0", "--max-steps", "2"]
    options = [str(recipe), "--data", str(tiny_data), "--run", str(tmp_path / "run"), *seldom]
    assert cli.main(["train", *options]) == 0
    assert (
        "1 rank(s) x 8 micro-steps x 2 x 32 = 512 tokens per update, grown from 128 over the first 10k tokens; "
        "2 updates are 256 tokens, 0.01 epochs of 20k tokens"
    ) in " ".join(capsys.readouterr().out.split())
    assert cli.main(["train", *options, "--batch.ramp-from", "100"]) == 2
    said = capsys.readouterr().err
    assert (
        "batch.ramp_from = 100 must be a multiple of micro_batch x seq_len = 2 x 32 = 64; the nearest is 128." in said
    )
    assert said.count("\n") == 1


def test_every_size_must_be_one_that_the_ranks_can_share(recipe: Path, tmp_path: Path) -> None:
    """In one order of sums: two ranks would have 1, 2, 3 and 4 micro-steps each; one rank takes them all."""
    config = dataclasses.replace(load_recipe(str(recipe)), run=str(tmp_path / "run"))
    config.check_ranks(1)
    with pytest.raises(ConfigError, match=r"on 2 ranks needs 1, 2, 4, 8, .* not 3"):
        config.check_ranks(2)
    with pytest.raises(ConfigError, match=r"batch.ramp_from = 128 must be a multiple of .* = 256; the nearest is 256"):
        config.check_ranks(4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_plan_is_the_sum_over_the_updates(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = ["--batch.ramp-from", "65536", "--batch.ramp-tokens", "20_000_000", "--batch.micro-batch", "8"]
    where = ["--machine", "4090", "--gpus", "8", "--max-steps", "200", "--parallel.strategy", strategy]
    assert plan.main(["gpt2_124m", *where, *ramp, "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    batch = BatchConfig(ramp_from=65_536, ramp_tokens=20_000_000, micro_batch=8)
    setup = Setup(model=load_recipe("gpt2_124m").model, micro_batch=8, seq_len=1024, strategy=strategy, ranks=8)
    machine = Place(find_machine("4090"), 8)
    updates = [dataclasses.replace(setup, grad_accum_steps=batch.grad_accum_steps(8, n)) for n in range(1, 201)]
    assert len(set(updates)) == 8
    assert found["step"]["parts"]["exchange"] > 0
    assert found["seconds"]["training"] == pytest.approx(sum(sum(step_seconds(u, machine).values()) for u in updates))
    assert found["tokens"] == sum(u.grad_accum_steps for u in updates) * 65_536
    assert max(one["micro_batch"] for one in found["micro_batches"]) == 8, "64 would not divide the first update"
    said = capsys.readouterr().out
    assert "200 updates of 524,288, grown from 65,536 over the first 20M tokens" in " ".join(said.split())


def test_micro_batches_divide_the_smallest_update() -> None:
    setup = Setup(model=load_recipe("gpt2_124m").model, micro_batch=2, seq_len=1024, grad_accum_steps=32, ranks=2)
    found = [(one.micro_batch, one.grad_accum_steps) for one in micro_batches(setup, 4 * 2 * 1024)]
    assert found == [(1, 64), (2, 32), (4, 16)]


def test_a_run_in_its_ramp_is_held_against_its_reference_at_equal_tokens() -> None:
    curve = choose("fineweb_gpt2_124m_llmc", None, None)
    assert curve is not None
    batch = BatchConfig(ramp_from=32_768, ramp_tokens=4_000_000_000, micro_batch=32)
    steps = range(6_000, 20_001, 2_000)
    seen = [batch.tokens_until(step) for step in steps]
    start = {"event": "run", "step": 0, "batch_tokens": 524_288, "max_steps": 26_000, "n_params": 124_439_808,
             "dataset": "fineweb", "total_tokens": batch.tokens_until(26_000),
             "config": {"batch": {"ramp_from": 32_768}, "schedule": {"kind": "cosine"}}}  # fmt: skip
    record = [start] + [
        {"event": "eval", "eval": "val_loss", "step": step, "seen_tokens": tokens, "loss": curve.at(tokens)}
        for step, tokens in zip(steps, seen, strict=True)
    ]
    found = of_record(record, curve.name)
    assert found is not None
    assert (found.state, found.tokens, found.difference) == ("on track", seen[-1], pytest.approx(0, abs=1e-9))
    record[-1]["loss"] += 0.5
    worse = of_record(record, curve.name)
    assert worse is not None
    assert worse.state == "above"
    assert "batch tokens: they grow from 32,768, the reference's do not" in worse.checks
    for event in record[1:]:  # as an older record
        del event["seen_tokens"]
    assert facts_of(record).eval_tokens.tolist() == [step * 524_288 for step in steps]
