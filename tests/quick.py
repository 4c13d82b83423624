"""`make quick`: which tests need no process of their own. In: collected tests; out: those that do are marked `process`.

A test starts processes if its code, its fixtures' or that of a function of tests/ that they call names a module that
starts them. What a test reaches through regpt2 itself is not seen here; `refuse_processes` catches it.
"""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

TESTS = str(Path(__file__).parent)
STARTERS = ("subprocess", "multiprocessing", "torch.multiprocessing", "concurrent.futures")


def mark_those_that_start_processes(items: list[pytest.Item]) -> None:
    """Add the marker `process`."""
    known: dict[Any, bool] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [each.func for of_name in item._fixtureinfo.name2fixturedefs.values() for each in of_name]
            if any(_starts(function, known) for function in (item.function, *fixtures)):
                item.add_marker(pytest.mark.process)


def _starts(thing: Any, known: dict[Any, bool]) -> bool:
    """Does a function or class of tests/ start processes?"""
    if isinstance(thing, type) and thing.__module__ not in sys.builtin_module_names:
        return any(_starts(method, known) for method in vars(thing).values() if isinstance(method, FunctionType))
    function = getattr(thing, "__wrapped__", thing)
    if not isinstance(function, FunctionType) or not function.__code__.co_filename.startswith(TESTS):
        return False
    if function not in known:
        known[function] = False  # while it is looked at: it may call itself
        used = [function.__globals__.get(name) for name in _names(function.__code__)]
        known[function] = any(getattr(one, "__name__", "") in STARTERS or _starts(one, known) for one in used)
    return known[function]


def _names(code: CodeType) -> Iterator[str]:
    """The names in a function and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def refuse_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting an interpreter fails the test; others, as git, take no time."""
    begin = subprocess.Popen.__init__

    def guarded(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        first = command if isinstance(command, str) else str(next(iter(command)))
        assert sys.executable not in first, MEND
        begin(self, command, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: pytest.fail(MEND))


MEND = "this test starts a process: mark it with @pytest.mark.process, or do without"
