"""The verb compare: arms read and checked, real runs killed and resumed, failures shown, pages written."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from regpt2 import cli
from regpt2.base.errors import UsageError
from regpt2.base.ranks.processes import Command, Place
from regpt2.commands import compare
from regpt2.commands.compare import main
from regpt2.config.recipe_files import load_recipe
from regpt2.data.loader import BatchConfig
from regpt2.pages.record import read_record
from regpt2.run.comparing import train_arms
from regpt2.run.comparing.arms import read_arms, read_budget, steps_within, within


def told(folder: Path) -> Any:
    return json.loads((folder / "compare.json").read_text())


def test_an_arm_is_a_recipe_with_options_and_a_name(tiny_recipe: Path) -> None:
    arms = read_arms(
        [str(tiny_recipe), f"{tiny_recipe} --optim.lr 1e-2", f"fast={tiny_recipe} --max-steps 5 --optim.lr 0.5"],
        ["--optim.lr", "0.25", "--batch.micro-batch", "4"],
    )
    assert [arm.label for arm in arms] == ["tiny", "tiny-optim.lr-1e-2", "fast"]
    assert [arm.config.optim.lr for arm in arms] == [0.25, 0.01, 0.5], "its own option goes before that of all"
    assert {arm.config.batch.micro_batch for arm in arms} == {4}
    assert [arm.keeps_steps for arm in arms] == [False, False, True]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["TINY", "TINY"], "two arms are called 'tiny'"),
        (["a=TINY", "A=TINY --optim.lr 1"], "two arms are called 'A'"),
        (["TINY", "nonesuch"], "there is no recipe 'nonesuch'"),
        (["TINY", "b=TINY --data elsewhere"], "b has data = 'elsewhere', tiny has ''"),
        (["TINY", "b=TINY --evals.val-tokens 7"], "b has evals.val_tokens = 7, tiny has 512"),
        (["TINY", "b=TINY --seed 3"], "--seed cannot be set for an arm"),
        (["TINY", "b=TINY --evals.names hellaswag"], "b does not evaluate val_loss"),
        (["TINY", "b=TINY 'open"], "a quote is not closed"),
        (["TINY", ""], "it is empty"),
        (["TINY", "b=TINY --optim.lr -1"], "optim.lr"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tiny_recipe: Path, specs: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_arms([spec.replace("TINY", str(tiny_recipe)) for spec in specs], [])


def test_a_budget_is_tokens_or_time(tiny_recipe: Path) -> None:
    tiny = load_recipe(str(tiny_recipe))
    assert read_budget("", tiny).tokens == 12 * 256
    tokens = {"300k": 300_000, "4.6M": 4_600_000, "1.7B": 1_700_000_000, "12,345": 12_345, ".5M": 500_000}
    assert {text: read_budget(text, tiny).tokens for text in tokens} == tokens
    assert [read_budget(text, tiny).seconds for text in ("90s", "1.5min", "2h")] == [90, 90, 7200]
    for wrong in ("5m", "0", "0min", "-3M", "1e6", "inf", "M", "5 M", "10 minutes"):
        with pytest.raises(UsageError, match="is neither tokens"):
            read_budget(wrong, tiny)


def test_a_budget_sets_updates_that_do_not_exceed_it_and_spans_the_schedule(tiny_recipe: Path) -> None:
    small, large, own = read_arms(
        [str(tiny_recipe), f"b={tiny_recipe} --batch.batch-tokens 1024", f"c={tiny_recipe} --max-steps 7"], []
    )
    assert [within(arm, 10_000, 20).max_steps for arm in (small, large, own)] == [39, 9, 7]
    assert [within(arm, 10_000, 20).eval_every for arm in (small, large, own)] == [2, 1, 1]
    batch = BatchConfig(batch_tokens=256, micro_batch=2, seq_len=32)
    assert [steps_within(batch, tokens) for tokens in (255, 256, 511, 512, 25_600)] == [0, 1, 1, 2, 100]
    with pytest.raises(UsageError, match=r"1,024 tokens make 4 updates, expected more than schedule.warmup_steps = 4"):
        within(small, 1024, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "two recipes or more"),
        (["demo", "demo --optim.lr 1", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["."], "holds no comparison"),
        (["demo", "b=demo", "--budget", "5m"], "--budget 5m is neither"),
        (["demo", "b=demo"], "data/python_library_bytes"),
    ],
)
def test_wrong_usage_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def run_here(
    commands: Sequence[Command], places: Sequence[Place], on_wait: Callable[[], object] = lambda: None
) -> Iterator[tuple[int, int]]:
    """The same commands in this process: it need not import torch for each."""
    for which, command in enumerate(commands):
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with open(command.log, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = cli.main(command.arguments)
        on_wait()
        yield which, code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs without processes and without reports of their own; the folder of the comparison."""
    monkeypatch.setattr(train_arms, "run_commands", run_here)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "compared"


@pytest.mark.seconds
def test_it_trains_compares_tells_what_failed_and_trains_nothing_twice(
    here: Path, tiny_recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    high, bad = f"high={tiny_recipe} --optim.lr 2e-2", f"bad={tiny_recipe} --batch.micro-batch 3"
    options = ["--seeds", "2", "--out", str(here), "--evaluations", "4", "--", "--data", str(tiny_data)]
    assert main([str(tiny_recipe), high, bad, *options]) == 1
    said = capsys.readouterr().out
    assert "bad seed 1: failed: batch.batch_tokens = 256 must be a multiple" in said
    assert "the baseline" in said and "no run finished" in said
    check_files(here)

    monkeypatch.setattr(compare, "show", lambda *_: None)
    with pytest.raises(UsageError, match="--baseline hihg; did you mean 'high'"):
        main([str(tiny_recipe), high, bad, "--baseline", "hihg", *options])
    with pytest.raises(UsageError, match=r"optim.lr was 0.02 and is 0.01 now"):
        main([str(tiny_recipe), high.replace("2e-2", "1e-2"), *options])
    records = {path: path.read_bytes() for path in here.glob("*/seed-*/metrics.jsonl")}
    third = [str(tiny_recipe), high, f"third={tiny_recipe} --optim.lr 1e-2 --max-steps 8", *options]
    capsys.readouterr()
    assert main([*third[:4], "3", *third[5:]]) == 0, "an arm and a seed more, the failed arm left out"
    assert "3 seeds of tiny (3.07k tokens), high (3.07k tokens), third (2.05k tokens)" in capsys.readouterr().out
    assert all(path.read_bytes() == record for path, record in records.items()), "finished runs are not touched"
    assert len(list(here.glob("*/seed-*/metrics.jsonl"))) == len(records) + 5
    assert [arm["tokens"] for arm in told(here)["plan"]["arms"]] == [3072, 3072, 2048]
    assert told(here)["plan"]["budget"] == "2.05k to 3.07k tokens"
    monkeypatch.setattr(
        train_arms, "run_commands", lambda commands, *_, **__: iter(pytest.fail("run") for _ in commands)
    )
    assert main([*third[:4], "3", *third[5:]]) == 0


def check_files(out: Path) -> None:
    """What a comparison leaves: figures that follow from its records, pages that hold them, a picture."""
    found = told(out)
    tiny, high, bad = found["outcomes"]
    for label, outcome in (("tiny", tiny), ("high", high)):
        finals = [read_record(out / f"{label}/seed-{seed}").validations[-1]["loss"] for seed in (1, 2)]
        assert list(outcome["finals"].values()) == finals and outcome["mean"] == pytest.approx(np.mean(finals))
    assert high["mean"] < tiny["mean"] and bad["verdict"] == "no run finished"
    assert high["shares"]["tokens"][0] < 1
    assert len(found["runs"]["high"][0]["losses"]) == 5 and found["runs"]["high"][0]["start"]["config"]
    html, text = (out / "compare.html").read_text(), (out / "compare.md").read_text()
    for page in (html, text):
        assert f"{high['mean']:.4f}" in page and "optim.lr 0.003 → 0.02" in page and "does not count" in page
    assert found["answer"].startswith("Beside tiny with 2 seeds, high ") and found["answer"] in text.split("\n")[0]
    assert 0 < html.index('<p class="verdict">Beside tiny') < html.index("<table"), "the answer comes first"
    assert "<script" not in html and "http" not in html.replace("http-equiv", "")
    assert imread(out / "compare.png").shape[:2] >= (800, 1700)
    first_losses = [read_record(out / run).train["loss"][0] for run in ("tiny/seed-1", "high/seed-1", "tiny/seed-2")]
    assert first_losses[0] == first_losses[1] != first_losses[2], "a seed is one order of data and one start"


@pytest.mark.seconds
def test_equal_time_is_measured_once_and_the_tables_are_written_again(
    here: Path, tiny_recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(tiny_recipe), f"big={tiny_recipe} --model.n-embd 64 --schedule.warmup-steps 0", "--seeds", "1"]
    command += ["--budget", "0.3s", "--out", str(here), "--", "--data", str(tiny_data), "--schedule.warmup-steps", "0"]
    assert main(command) == 0
    arms = {arm["label"]: arm for arm in told(here)["plan"]["arms"]}
    for label, arm in arms.items():
        rates = read_record(here / label / "timing").train["tokens_per_s"]
        assert len(rates) == 30
        expected = 0.3 * float(np.median(rates[10:]))
        assert expected - 256 < arm["tokens"] <= expected + 1
    timed = {path: path.read_bytes() for path in here.glob("*/timing/metrics.jsonl")}
    assert main(command) == 0 and all(path.read_bytes() == record for path, record in timed.items())
    capsys.readouterr()

    monkeypatch.setattr(train_arms, "run_commands", lambda *_, **__: pytest.fail("a run was started"))
    assert main([str(here), "--baseline", "big", "--target", "100"]) == 0
    said = capsys.readouterr().out
    assert "time to 100" in said and "tokens to big's loss" in said
    assert told(here)["answer"] in said and "shows nothing" in said, "with one seed"
    assert (here / "compare.md").read_text().startswith(f"# {told(here)['answer']}\n\nbig · tiny · ")
    with pytest.raises(UsageError, match="--baseline bigg; did you mean 'big'"):
        main([str(here), "--baseline", "bigg"])


@pytest.mark.skipif(sys.platform == "win32", reason="there a run does not know that its comparison is gone")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "places"),
    [(["high=TINY --optim.lr 2e-2"], ["tiny", "high"]),
     (["--sweep", "optim.lr=3e-3,2e-2"], ["optim.lr=0.003", "optim.lr=0.02"])],
)  # fmt: skip
def test_killed_in_the_middle_it_goes_on(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, asked: list[str], places: list[str]
) -> None:
    """kill -9 while two runs are at work: they leave with a checkpoint, and the same command takes them up."""
    out = tmp_path / "compared"
    asked = [word.replace("TINY", str(tiny_recipe)) for word in asked]
    command = [sys.executable, "-m", "regpt2", "compare", str(tiny_recipe), *asked]
    command += [
        "--seeds",
        "1",
        "--parallel",
        "2",
        "--evaluations",
        "1",
        "--out",
        str(out),
        "--",
        "--data",
        str(tiny_data),
    ]
    command += ["--max-steps", "1000", "--save-every", "100", "--log-every", "10", "--sample-every", "0"]
    command += ["--batch.micro-batch", "8", "--model.n-layer", "1", "--model.n-embd", "16"]
    two_threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    runs = [out / place / "seed-1" for place in places]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path, env=two_threads) as process:
        wait_for(lambda: any(list((run / "checkpoints").glob("step-*")) for run in runs))
        process.kill()
    assert not (out / "compare.html").exists()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=two_threads, timeout=200)
    assert done.returncode == 0, done.stderr
    records = [read_record(run) for run in runs]
    assert [(record.status, record.last_step) for record in records] == [("finished", 1000)] * 2
    resumed = [record.name for record in records if len(record.runs) == 2 and record.runs[1]["step"] >= 100]
    assert resumed, "one had a checkpoint to go on from"
    assert {record.start["threads"] for record in records} == {1}, "two at once share the threads"
    assert any("SIGTERM" in (run / "train.log").read_text() for run in runs), "asked to leave with its comparison"


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()
