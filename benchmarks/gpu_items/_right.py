"""Is it right? Shared by the items first and correctness. In: a precision, tests by name; out: a row for each."""

import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from gpu_items import Check
from gpu_timing import TINY
from regpt2.base.device import Precision, choose_compute
from regpt2.base.errors import UsageError
from regpt2.machine.health.agreement import agreement, trials
from regpt2.model.gpt import GPTConfig

TESTS = Path(__file__).parents[2] / "tests"
BY_VALUES = re.compile("updates in a row were skipped|stopped by signal 1 ")
"""The errors of a run that trusts the values of a pretended GPU."""
FIRST = "waits_for_the_device or kernel"
"""Words in the names of the tests that the item first runs; correctness runs all others."""


def compare_with_fp64(check: Check, device: torch.device, precision: Precision, *, compiled: bool) -> None:
    """Loss and gradients of training's own pass beside fp64, as `regpt2 doctor` compares them."""
    try:
        choose_compute(precision, device)
    except UsageError as why:
        check.keep(f"{precision} against fp64", skipped=str(why))
        return
    model, seq_len = (TINY, 32) if check.smoke else (GPTConfig(), 1024)
    for kind, trial in zip(("long", "wide head"), trials(model, seq_len), strict=True):
        torch.compiler.reset()  # otherwise the compiler treats the second shape as dynamic
        found = agreement(trial, device, precision, compiled=compiled)
        fault = found.fault(precision)
        check.judge(
            f"{precision} against fp64, {kind}, {'compiled' if compiled else 'eager'}",
            loss_off=found.loss,
            gradient_off=found.gradient,
            ok=not fault,
            why=fault,
        )


class EachTest:
    """A pytest plugin: a row for each test."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.broken = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        if report.skipped:
            self.check.keep(name, skipped=str(report.longrepr[2] if report.longrepr else ""))
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr).strip().split("\n")[0][:300]
            if self.check.dry and (BY_VALUES.search(why) or not is_crash(report.longrepr)):
                self.check.keep(name, not_compared=True)
            else:
                self.broken += 1
                self.check.keep(name, ok=False, why=why)
        elif report.when == "call":
            self.check.keep(name, seconds=report.duration, ok=True)


def is_crash(longrepr: Any) -> bool:
    """Did our code or a library raise it, rather than the test's own assertion?"""
    entries = getattr(getattr(longrepr, "reprtraceback", None), "reprentries", [])
    paths = [entry.reprfileloc.path for entry in entries if getattr(entry, "reprfileloc", None)]
    return not paths or any(part in path for path in paths for part in ("src/regpt2/", "site-packages/"))


def run_tests(check: Check, device: torch.device, words: str) -> None:
    """tests/test_gpu.py in this process, with pytest alone: no plugins, no settings of the project."""
    try:
        import pytest
    except ImportError:
        check.keep("tests/test_gpu.py", skipped="pytest is missing")
        return
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "REGPT2_TEST_DEVICE": device.type}
    only_here = ["-c", os.devnull, "--rootdir", str(TESTS), "-p", "no:cacheprovider", "-W", "ignore"]
    if check.dry:
        only_here.append("--assert=plain")  # printing a tensor reads its values; from garbage that never ends
    started_at, each = time.time(), EachTest(check)
    code = pytest.main([*only_here, "-q", "-m", "gpu", "-k", words, str(TESTS / "test_gpu.py")], plugins=[each])
    ok = code in (0, 1) and not each.broken  # 1: some failed, each with a row
    check.keep("tests/test_gpu.py", seconds=time.time() - started_at, ok=ok, why="" if ok else f"pytest gave {code!r}")
