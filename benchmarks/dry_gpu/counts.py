"""The stand-in's counts. In: the library that run.sh loads; out: numbers, and their growth during some work."""

import ctypes
import sys
from collections.abc import Callable

NAMES = (
    "launches",
    "triton_launches",
    "gemms",
    "cudnn_plans",
    "syncs",
    "copies_to_host",
    "copies_to_device",
    "mallocs",
    "graph_launches",
)


def now() -> dict[str, int]:
    """Every count since the process started.

    Raises:
        SystemExit: this is not the dry GPU, so nothing would be counted.
    """
    library = ctypes.CDLL(None)
    try:
        return {name: ctypes.c_long.in_dll(library, f"dry_{name}").value for name in NAMES}
    except ValueError:
        sys.exit("There is no dry GPU in this process: start it by benchmarks/dry_gpu/run.sh DIR SCRIPT.py.")


def during(work: Callable[[], object]) -> dict[str, int]:
    """How much each count grew while `work` ran."""
    before = now()
    work()
    return {name: count - before[name] for name, count in now().items()}


def kernels(counts: dict[str, int]) -> int:
    """Kernels of every kind; a matrix product or a cuDNN plan counts as one."""
    return counts["launches"] + counts["triton_launches"] + counts["gemms"] + counts["cudnn_plans"]


def waits(counts: dict[str, int]) -> int:
    """Times that the host waits for the device."""
    return counts["syncs"]
