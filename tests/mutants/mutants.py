"""The list of mutants. In: the TOML files beside this one; out: bugs to plant, each checked against the source.

An entry plants one bug:

    [[mutant]]
    name = "the loop ignores the schedule"                      # a sentence: what the mutated program does
    file = "run/loop.py"                                           # below src/regpt2
    old = "learning_rate(config.schedule, config.optim.lr, ..."  # occurs exactly once in the file
    new = "config.optim.lr"
    tests = ["tests/run/test_train.py::test_..."]                   # these have to feel it, and pass without it
"""

import ast
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutant:
    """One bug: `new` instead of `old` in `file`."""

    area: str
    """The name of its TOML file."""
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def place(self, root: Path) -> Path:
        """The file that it changes, in the checkout or copy at `root`."""
        return root / "src" / "regpt2" / self.file

    def plant(self, root: Path) -> None:
        """Change the file in a copy at `root`."""
        path = self.place(root)
        path.write_text(path.read_text().replace(self.old, self.new))


def read(folder: Path = FOLDER) -> list[Mutant]:
    """All mutants, area by area."""
    return [
        Mutant(path.stem, **entry | {"tests": tuple(entry["tests"])})
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["mutant"]
    ]


def sample(mutants: list[Mutant], n: int) -> list[Mutant]:
    """The first of each area, then the second of each, and so on: the quick ones come first in their files."""
    seen = Counter[str]()
    ranked = []
    for mutant in mutants:
        ranked.append((seen[mutant.area], len(ranked), mutant))
        seen[mutant.area] += 1
    return [mutant for *_, mutant in sorted(ranked, key=lambda item: item[:2])[:n]]


def faults(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """Why an entry cannot be planted, or no test can feel it; empty if all is well."""
    path = mutant.place(root)
    if not path.is_file():
        return [f"there is no file src/regpt2/{mutant.file}"]
    text = path.read_text()
    found = []
    if (n := text.count(mutant.old)) != 1:
        found.append(f"`old` occurs {n} times in src/regpt2/{mutant.file}, expected once")
    elif path.suffix == ".py":
        try:
            if ast.dump(ast.parse(text.replace(mutant.old, mutant.new))) == ast.dump(ast.parse(text)):
                found.append("`new` means the same as `old`")
        except SyntaxError as error:
            found.append(f"with `new` the file is no Python: {error}")
    if not mutant.tests:
        found.append("it names no test")
    return found + [f"there is no test {test}" for test in mutant.tests if not _exists(test, root)]


def judge(code: int, n_passed: int, failed: str) -> tuple[str, str]:
    """Verdict and reason of a run of pytest: its exit code 1 alone means that a test has failed."""
    if code == pytest.ExitCode.OK and n_passed:
        return "passed", ""
    if code == pytest.ExitCode.TESTS_FAILED and failed:
        return "killed", failed
    return "broken", "every test was skipped" if code == pytest.ExitCode.OK else ""


def _exists(test: str, root: Path) -> bool:
    name, _, function = test.partition("::")
    path = root / name
    return path.is_file() and (not function or f"def {function.partition('[')[0]}(" in path.read_text())
