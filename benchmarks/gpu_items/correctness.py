"""The other checks of correctness: every other precision against fp64, then the rest of tests/test_gpu.py.

If tyro is missing, the tests that need the training loop are skipped, and their rows report it.
"""

from gpu_items import Check
from gpu_items._right import FIRST, compare_with_fp64, run_tests
from regpt2.base.device import Precision, choose_compute, pick_device


def run(check: Check) -> None:
    device = pick_device(check.device)
    usual = choose_compute("auto", device).precision
    others: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
    for precision in others:
        if precision != usual:
            compare_with_fp64(check, device, precision, compiled=False)
    run_tests(check, device, "sampling" if check.smoke else f"not ({FIRST})")
