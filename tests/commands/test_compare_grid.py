"""The verb compare over one recipe: real runs of a grid and of sizes, failed, stopped, resumed, widened, read again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_compare import here, run_here, told

from regpt2 import cli
from regpt2.commands.compare import main
from regpt2.pages.record import read_record
from regpt2.run.comparing import train_arms

assert here  # a fixture


@pytest.fixture
def options(here: Path, tiny_data: Path) -> list[str]:
    return ["--seeds", "2", "--out", str(here), "--evaluations", "2", "--", "--data", str(tiny_data)]


def records(folder: Path) -> dict[str, bytes]:
    paths = folder.glob("*/seed-*/metrics.jsonl")
    return {path.parent.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.seconds
def test_a_grid_stopped_is_resumed_widened_and_names_what_failed(
    here: Path,
    tiny_recipe: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = [str(tiny_recipe), "--sweep", "optim.lr=3e-3,2e-2", "batch.micro-batch=2,3", *options]

    def stopped(*arguments: Any, **more: Any) -> Iterator[tuple[int, int]]:
        ended = run_here(*arguments, **more)
        yield next(ended)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_arms, "run_commands", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(grid)
    first = records(here)
    assert list(first) == ["optim.lr=0.003,batch.micro_batch=2/seed-1"], "the recipe's own place is the baseline"
    assert not (here / "compare.html").exists() and told(here)["plan"]["kind"] == "sweep"
    monkeypatch.setattr(train_arms, "run_commands", run_here)
    capsys.readouterr()
    assert main(grid) == 1, "a pass of 3 sequences does not divide an update of 8"
    shown = capsys.readouterr().out
    assert "8 runs, 24.6k tokens in all, roughly" in shown and "2 seeds of 4 places, 3.07k tokens each" in shown
    assert "batch.micro_batch=3 seed 1 does not count: failed: batch.batch_tokens = 256 must be a multiple" in shown
    assert "optim.lr \\ batch.micro_batch" in shown and "2 have no loss" in shown
    second = records(here)
    assert first.items() <= second.items() and len(second) == 4, "what was finished is kept"
    best = next(cell for cell in told(here)["sweep"]["cells"] if cell["verdict"] == "the best")
    label = "optim.lr=0.02,batch.micro_batch=2"
    finals = [read_record(here / label / f"seed-{seed}").validations[-1]["loss"] for seed in (1, 2)]
    assert best["label"] == label and list(best["finals"].values()) == finals

    assert main([*grid[:2], "optim.lr=3e-3,2e-2,1e-2", "batch.micro-batch=2,4", *options]) == 0
    third = records(here)
    assert second.items() <= third.items() and len(third) == 4 + 2 + 6, "another value on each axis"

    monkeypatch.setattr(train_arms, "run_commands", lambda *_, **__: pytest.fail("a run was started"))
    answer = told(here)["answer"]
    assert main([str(here)]) == 0 and told(here)["answer"] == answer
    assert f"\n{answer}\n" in capsys.readouterr().out


@pytest.mark.seconds
def test_budgets_give_a_law_over_tokens_that_is_checked_on_the_longest_run(
    here: Path, tiny_recipe: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--scaling", "budget=2k,4k,8k,16k", *options]) == 0
    shown, found = capsys.readouterr().out, told(here)
    assert found["scaling"]["over"] == "tokens" and found["plan"]["hold_out"] == 1
    assert [size["x"] for size in found["scaling"]["sizes"]] == [1792, 3840, 7936, 15872], "whole updates of 256"
    (check,) = found["scaling"]["laws"][0]["checks"]
    inside = check["interval"]["low"] <= check["came"] <= check["interval"]["high"]
    assert (check["verdict"] == "within") is inside
    assert f", {'inside' if inside else 'outside'} the predicted " in shown
    runs = records(here)
    assert main([str(here), "--hold-out", "0", "--over", "flops"]) == 0
    assert told(here)["scaling"]["over"] == "flops" and records(here) == runs
    assert cli.main(["compare", str(here), "--hold-out", "2"]) == 2
    assert "4 sizes with 2 held out leave 2 to fit" in capsys.readouterr().err


@pytest.mark.seconds
def test_sizes_of_several_settings_change_together(here: Path, tiny_recipe: Path, options: list[str]) -> None:
    sizes = ["--scaling", "model.n_embd=8,16,32,64", "model.n_head=1,1,2,4"]
    assert main([str(tiny_recipe), *sizes, "--budget", "2k", "--seeds", "1", *options[2:]]) == 0
    arms = {arm["label"]: arm for arm in told(here)["plan"]["arms"]}
    shapes = [(8, 1), (16, 1), (32, 2), (64, 4)]
    assert list(arms) == [f"model.n_embd={width},model.n_head={heads}" for width, heads in shapes]
    for (width, heads), (label, arm) in zip(shapes, arms.items(), strict=True):
        start = read_record(here / label / "seed-1").start
        assert start["config"]["model"]["n_head"] == heads
        assert arm["weights"] == start["n_params"] - (257 + 32) * width, "less its embeddings of tokens and positions"
    assert told(here)["scaling"]["over"] == "parameters"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --sweep optim.lr=1e-3,2e-3 --scaling budget=1M,2M", "exclude each other"),
        ("demo small --sweep optim.lr=1e-3,2e-3", "--sweep takes one recipe before it, got 2"),
        ("--scaling budget=1M,2M,3M,4M", "--scaling takes one recipe before it, got 0"),
        ("demo --scaling budget=1M,2M,3M", "3 sizes with 1 held out leave 2 to fit"),
        ("demo --scaling budget=1M,2M,3M,4M --baseline x", "--baseline does not apply to --scaling"),
        ("demo --scaling budget=1M,2M,3M,4M --target 2", "--target does not apply to --scaling"),
        ("demo --scaling budget=1M,2M,3M,4M -- --max-steps 9", "exclude each other: both set how long"),
        ("demo small --over tokens", "--hold-out and --over apply to --scaling only"),
        ("demo --sweep optim.lr=1e-3,2e-3 --hold-out 1", "--hold-out and --over apply to --scaling only"),
    ],
)
def test_wrong_usage_of_a_grid_is_one_message(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("budgets", "message"),
    [("10k,20k,30k,4h", "budget=4h must be tokens"), ("100,2k,3k,4k", "100 tokens make 0 updates")],
)
def test_a_budget_that_cannot_be_trained_is_one_message(
    here: Path, tiny_recipe: Path, options: list[str], budgets: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(tiny_recipe), "--scaling", f"budget={budgets}", *options]) == 2
    assert message in capsys.readouterr().err and not list(here.glob("*/recipe.toml"))


@pytest.mark.seconds
def test_many_runs_are_warned_of(here: Path, tiny_recipe: Path, options: list[str], monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(train_arms, "run_commands", lambda *_, **__: iter(()))
    rates = ",".join(f"{rate}e-3" for rate in range(1, 27))
    assert main([str(tiny_recipe), "--sweep", f"optim.lr={rates}", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: 52 runs, 160k tokens in all, roughly ")
    assert json.loads((here / "compare.json").read_text())["answer"].startswith("No run of the grid finished")
