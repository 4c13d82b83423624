"""README.md as a stranger meets it: short, its table is what `plan` says today, its Python and commands run."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from conftest import Run
from regpt2.commands import plan
from warm_processes import run_python

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT / "benchmarks"))
plan_table = importlib.import_module("plan_table")

TINY = (
    "--model.n-layer",
    "1",
    "--model.n-embd",
    "32",
    "--model.n-head",
    "2",
    "--max-steps",
    "3",
    "--sample-every",
    "0",
)


def blocks(language: str = "") -> list[str]:
    """The code blocks of one language, in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.M | re.S)
    return [code for name, code in found if name == language]


def test_the_first_page_has_at_most_120_lines() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_the_table_of_cards_is_what_plan_says_today() -> None:
    text = README.read_text()
    found = text[text.index(plan_table.BEGIN) + len(plan_table.BEGIN) : text.index(plan_table.END)].strip()
    assert found == plan_table.table()


@pytest.mark.parametrize(("recipe", "micro_batch"), [*zip(plan_table.RECIPES, (16, 32), strict=True)])
def test_a_row_is_that_of_the_command_beside_it(recipe: str, micro_batch: int, tmp_path: Path) -> None:
    """By the command's own JSON and arithmetic of our own, for a card whose micro-batch is not the recipe's."""
    out = tmp_path / "plan.json"
    options = ["--machine", "4090", "--price", "0.34", "--data", "", "--json", str(out)]
    assert plan.main([recipe, *options, "--batch.micro-batch", str(micro_batch)]) == 0
    found = json.loads(out.read_text())
    assert found["best_micro_batch"] == micro_batch
    minutes, gigabytes = sum(found["seconds"].values()) / 60, found["memory"]["bytes"] / 1e9
    days, hours = divmod(int(minutes // 60), 24)
    time = f"{days}d{hours:02d}h" if days else f"{hours}h{int(minutes % 60):02d}m"
    row = next(line for line in README.read_text().splitlines() if line.startswith("| RTX 4090 "))
    assert f"| {time}, ${minutes / 60 * 0.34:.0f}, {gigabytes:.0f} GB ({micro_batch}) |" in row


def test_the_command_is_on_the_path_before_it_is_used() -> None:
    start = next(code for code in blocks() if "make demo" in code).splitlines()
    activated = next(n for n, line in enumerate(start) if line.startswith("source .venv/bin/activate"))
    used = [n for n, line in enumerate(start) if line.startswith("regpt2 ")]
    assert start[0].startswith("make demo") and used and min(used) > activated


@pytest.mark.process
@pytest.mark.seconds
def test_the_python_of_the_first_page_runs_as_it_is_written(regpt2: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n\n" * 2000)
    for command in (
        ("prepare", "text_files", "--input", "text.txt", "--tokenizer", "bytes", "--out", "data/python_library_bytes"),
        ("train", "demo", *TINY),
    ):
        done = regpt2(*command)
        assert done.returncode == 0, done.stderr
    (code,) = blocks("python")
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The old man") and (tmp_path / "loss.png").stat().st_size > 10_000
