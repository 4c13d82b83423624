"""Every entry of the list still applies, and the lane tells killed from survived from broken."""

from dataclasses import replace
from pathlib import Path

import pytest

from mutants import ROOT, Mutant, faults, judge, read, sample

MUTANTS = read()


def test_every_mutant_can_be_planted_and_names_tests_that_are_there() -> None:
    """One that no longer applies is an error: mend its `old`, or replace it by a bug of today's code."""
    found = {f"{mutant.area}: {mutant.name}": faults(mutant) for mutant in MUTANTS}
    assert not {name: said for name, said in found.items() if said}


def test_there_are_many_in_every_area_and_none_twice() -> None:
    assert len(MUTANTS) >= 100
    assert len({mutant.area for mutant in MUTANTS}) >= 10
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_sample_takes_one_of_each_area_before_a_second() -> None:
    areas = [mutant.area for mutant in sample(MUTANTS, 10)]
    assert len(set(areas)) == len(areas) == 10


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"old": "there is no such line"}, "`old` occurs 0 times"),
        ({"old": "return"}, "expected once"),
        ({"new": "return ("}, "the file is no Python"),
        ({"new": "return True or False and 1"}, ""),
        ({"tests": ()}, "it names no test"),
        ({"tests": ("tests/test_none.py",)}, "there is no test"),
        ({"tests": ("tests/mutants/test_mutants.py::test_none",)}, "there is no test"),
        ({"file": "none.py"}, "there is no file"),
    ],
)
def test_an_entry_that_does_not_apply_is_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    (tmp_path / "src" / "regpt2").mkdir(parents=True)
    (tmp_path / "src" / "regpt2" / "a.py").write_text("def f():\n    return True\n\n\ndef g():\n    return 2\n")
    good = Mutant("area", "name", "a.py", "return True", "return False", ("tests/mutants/test_mutants.py",))
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    assert faults(good, tmp_path) == []
    assert fault in " ".join(faults(replace(good, **change), tmp_path))  # type: ignore[arg-type]
    assert faults(replace(good, new="return (True)"), tmp_path) == ["`new` means the same as `old`"]


@pytest.mark.parametrize(
    ("code", "n_passed", "failed", "verdict"),
    [
        (0, 3, "", "passed"),
        (0, 0, "", "broken"),  # every test was skipped
        (1, 3, "a test: assert 1 == 2", "killed"),
        (2, 0, "", "broken"),  # collection was interrupted
        (4, 0, "", "broken"),  # no such file or test
        (5, 0, "", "broken"),  # nothing was collected
    ],
)
def test_only_a_failed_test_kills(code: int, n_passed: int, failed: str, verdict: str) -> None:
    assert judge(code, n_passed, failed)[0] == verdict
