"""docs/results.md: each row of its table says what its certificate says."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(r"^\| (?P<run>.+); \[certificate\]\((?P<file>results/\w+\.md)\) \| (?P<figures>.+) \|$", re.M)


def rows() -> list[tuple[str, list[str]]]:
    return [(row["file"], row["figures"].split(" | ")) for row in ROW.finditer((DOCS / "results.md").read_text())]


def short(number: str) -> float:
    """1.43M -> 1,430,000."""
    return float(number.rstrip("MB")) * {"M": 1e6, "B": 1e9}.get(number[-1], 1)


@pytest.mark.parametrize(("file", "figures"), rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_says_what_its_certificate_says(file: str, figures: list[str]) -> None:
    page = (DOCS / file).read_text()
    certificate = json.loads(re.search(r"```json\n(.+?)```", page, re.S)[1])  # type: ignore[index]
    n_params, n_tokens, time, loss, bits_per_byte = figures
    assert short(n_params) == pytest.approx(int(certificate["parameters"].replace(",", "")), rel=0.02)
    assert short(n_tokens) == pytest.approx(int(certificate["tokens"].replace(",", "")), rel=0.01)
    assert time == certificate["wall_time"]
    assert f"{float(re.search(r'Validation loss . ([0-9.]+)', page)[1]):.3f}" == loss  # type: ignore[index]
    assert f"| Bits per byte | {bits_per_byte} |" in page
    assert certificate["ended"] == "finished"


def test_every_certificate_is_in_the_table() -> None:
    assert {file for file, _ in rows()} == {f"results/{path.name}" for path in (DOCS / "results").glob("*.md")}
