"""Is it right? Loss and gradients against the mathematics in fp64, in each precision, compiled; then tests/test_gpu.py.

The tests that need the training loop are skipped, aloud, where tyro is missing.
"""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch

from gpu_items import Check
from gpu_timing import TINY
from regpt2.base.device import can_compile, choose_compute, device_name, pick_device
from regpt2.base.errors import UsageError
from regpt2.model.gpt import GPTConfig
from regpt2.speed.agreement import agreement, trials
from regpt2.speed.kernels import attention_kernel

TESTS = Path(__file__).parents[2] / "tests"


def run(check: Check) -> None:
    device = pick_device(check.device)
    check.keep("device", device=device_name(device), **versions())
    if device.type == "cuda":
        check.keep("attention at B=64, H=12, T=1024, D=64", kernel=attention_kernel(lambda: attend(device)))
    compare(check, device)
    if importlib.util.find_spec("pytest") is None:
        check.keep("tests/test_gpu.py", skipped="pytest is missing")
    else:
        run_tests(check, device)


def versions() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else ""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "", "cudnn": str(cudnn)}


def attend(device: torch.device) -> torch.Tensor:
    q = torch.randn(64, 12, 1024, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def compare(check: Check, device: torch.device) -> None:
    """As `regpt2 doctor` does."""
    model, seq_len = (TINY, 32) if check.smoke else (GPTConfig(), 1024)
    usual = choose_compute("auto", device).precision
    for precision in (usual, *(other for other in ("fp32", "tf32", "bf16", "fp16") if other != usual)):
        try:
            choose_compute(precision, device)
        except UsageError as why:
            check.keep(f"{precision} against fp64", skipped=str(why))
            continue
        for compiled in (False, True) if precision == usual and can_compile(device) else (False,):
            for kind, trial in zip(("long", "wide head"), trials(model, seq_len), strict=True):
                torch.compiler.reset()  # else it takes the second shape for a changing one
                found = agreement(trial, device, precision, compiled=compiled)
                fault = found.fault(precision)
                check.keep(
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

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, asked = report.nodeid.rsplit("::", 1)[-1], report.when == "call"
        if report.skipped:
            self.check.keep(name, skipped=str(report.longrepr[2] if report.longrepr else ""))
        elif asked or report.failed:
            why = str(report.longrepr).strip().split("\n")[-1][:300] if report.failed else ""
            self.check.keep(name, seconds=report.duration, ok=report.passed, why=why)


def run_tests(check: Check, device: torch.device) -> None:
    """In this process, with no more than pytest itself: no plugins, no settings of the project."""
    import pytest

    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "REGPT2_TEST_DEVICE": device.type}
    few = ["-k", "sampling"] if check.smoke else []
    only_here = ["-c", os.devnull, "--rootdir", str(TESTS), "-p", "no:cacheprovider", "-W", "ignore"]
    started_at = time.time()
    code = pytest.main([*only_here, "-q", "-m", "gpu", *few, str(TESTS / "test_gpu.py")], plugins=[EachTest(check)])
    check.keep("tests/test_gpu.py", seconds=time.time() - started_at, ok=code == 0)
