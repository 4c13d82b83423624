"""The device and what it can do. In: "auto" or a name; out: a torch device, a precision, its peak, its memory."""

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from regpt2.base.errors import UsageError

if sys.platform != "win32":
    import resource

_Hardware = Literal["fp32", "tf32", "bf16", "fp16"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

# Dense matmul peaks in TFLOP/s (16-bit with fp32 accumulation; TF32), from the makers' data sheets, without sparsity.
# The longest name that the device's name contains wins.
_PEAK_TFLOPS = {
    "A100": (312.0, 156.0),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "A40": (149.7, 74.8),
    "A6000": (154.8, 77.4),
    "L4": (121.0, 60.0),
    "L40S": (362.0, 183.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.4, 494.7),
    "H200": (989.4, 494.7),
    "GH200": (989.4, 494.7),
    "B200": (2250.0, 1125.0),
    "RTX 3090": (71.0, 35.6),
    "RTX 4070": (58.3, 29.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "T4": (65.0, 0.0),
    "V100": (125.0, 0.0),
}


def pick_device(spec: str) -> torch.device:
    """The device named by `spec`; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if spec == "auto":
        return torch.device(here[0])
    kind, _, index = spec.partition(":")
    n_devices = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in here or (index and not (index.isdigit() and int(index) < n_devices)):
        raise UsageError(f"device {spec!r} is not on this machine; available: auto, {', '.join(here)}.")
    return torch.device(spec)


def cpu_info() -> str:
    """What Linux says of this machine's processors; "" on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def device_name(device: torch.device) -> str:
    """Its type and the maker's name: "cuda: NVIDIA H200", "cpu: AMD EPYC 9B45"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    names = [line.split(":", 1)[1].strip() for line in cpu_info().splitlines() if "model name" in line]
    return f"{device.type}: {(names or [platform.processor() or platform.machine()])[0]}"


@dataclass(frozen=True)
class Compute:
    """How matmuls run: the type of weights and activations in forward and backward. Master weights stay fp32."""

    precision: _Hardware

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def needs_scaler(self) -> bool:
        """fp16 gradients underflow without a scaled loss."""
        return self.precision == "fp16"


def precisions(device: torch.device) -> list[_Hardware]:
    """Those that the device has in hardware."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    can_bf16 = ampere or (device.type == "cpu" and _cpu_has_bf16())
    known: dict[_Hardware, bool] = {"fp32": True, "tf32": ampere, "bf16": can_bf16, "fp16": device.type == "cuda"}
    return [name for name, can in known.items() if can]


def choose_compute(precision: Precision, device: torch.device, *, keep_freed_memory: bool = True) -> Compute:
    """Set up torch for the given precision, or by "auto" for the fastest that the device has in hardware.

    Raises:
        UsageError: the device does not have it.
    """
    can = precisions(device)
    chosen = next(name for name in ("bf16", "fp16", "fp32") if name in can) if precision == "auto" else precision
    if chosen not in can:
        name = device_name(device)
        raise UsageError(f"precision = {chosen!r} is not in the hardware of {name}; it has: {', '.join(can)}.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if chosen == "fp32" else "high")
    elif device.type == "cpu":
        _use_fast_exact_fp32_on_cpu()
        if keep_freed_memory:
            _keep_freed_memory()
    return Compute(chosen)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generator of dropout on this device.

    `torch.manual_seed` seeds those of all devices, and takes 1.7 ms on a machine with a CPU only.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors of Python, torch or a kernel that mean: no memory left, or none for a thread."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


_OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|cannot allocate memory|can't start new thread|"
    "could not create a (primitive|memory)",
    re.IGNORECASE,
)


def be_deterministic(device: torch.device) -> None:
    """Make the same computation give the same bits again on a GPU; a CPU does so anyway.

    An operation without a deterministic form then raises an error (see `undetermined_operation`). `warn_only` is not
    enough: attention would still choose cuDNN's kernel, which adds in any order.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # as torch asks for its deterministic algorithms
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow: for debugging
    inductor: Any = importlib.import_module("torch._inductor.config")
    if hasattr(inductor, "deterministic"):  # else the compiler takes the fastest kernel, which differs by run
        inductor.deterministic = True


@contextmanager
def settings_kept() -> Iterator[None]:
    """Start with torch's defaults, as a new process does, and restore the caller's settings at the end.

    These are the precision of matmuls, deterministic algorithms, and the state of torch's own generators.
    """
    matmuls: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [one.fp32_precision for one in matmuls]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name it once the precision of only one backend was set
        legacy = "highest"
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    inductor = getattr(sys.modules.get("torch._inductor.config"), "deterministic", False)
    workspace = os.environ.get(_WORKSPACE)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(gpus):
            torch.set_float32_matmul_precision("highest")
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for one, precision in zip(matmuls, before, strict=True):
            one.fp32_precision = precision
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if "torch._inductor.config" in sys.modules:
            sys.modules["torch._inductor.config"].deterministic = inductor  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def undetermined_operation(error: BaseException) -> str:
    """The operation without a deterministic form that torch's error names; "" for another error."""
    found = _UNDETERMINED.search(str(error))
    return found[1] if found else ""


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_UNDETERMINED = re.compile(r"(\S+) does not have a deterministic implementation")


def quiet_profiler() -> None:
    """Keep torch's profiler from writing to standard error, if it has not run yet."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its highest level


def _cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX: without them bf16 is emulated, and slower than fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_info().split())


def _use_fast_exact_fp32_on_cpu() -> None:
    """Let fp32 matmuls go through oneDNN, which is 2-3x faster than MKL on AMD, if it keeps fp32 accuracy here.

    The setting also permits oneDNN to round to bf16, which some processors then do, so one matmul is checked.
    """
    if torch.get_float32_matmul_precision() == "medium":
        return
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    if ((a @ b).double() - exact).abs().max() > 1e-4 * exact.abs().max():
        torch.set_float32_matmul_precision("highest")


def keep_few_products() -> None:
    """Let oneDNN, and torch's layer above it, keep what they prepared for the last 128 shapes of a product, not 1,024.

    Each takes up to half a megabyte, and a server sees prompts of all lengths: that was a gigabyte after 3,000 shapes.
    A setting of the user's stays. Call it before the first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next allocation, where it is the C library.

    By default it maps each block above 32 MB on allocation and unmaps it when freed: each step then has a page fault
    for every 4 KB of activations and gradients, a third of its time for the 124M model (see docs/decisions.md).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20)):
        mallopt(parameter, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device at this precision by its data sheet; None if unknown (every CPU, fp32)."""
    return sheet_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def sheet_flops(name: str, precision: str) -> float | None:
    """The same of any GPU, by the maker's name for it."""
    known = [key for key in _PEAK_TFLOPS if re.search(rf"\b{re.escape(key)}\b", name)]
    variant = re.search(r"\b(Laptop|Mobile|Max-Q|NVL|Ti|SUPER|D)\b", name)  # with another peak than the table's
    if precision == "fp32" or variant or not known:
        return None
    half, tf32 = _PEAK_TFLOPS[max(known, key=len)]
    return 1e12 * (tf32 if precision == "tf32" else half) or None


def can_compile(device: torch.device) -> bool:
    """True if torch.compile makes GPU kernels here: it needs Triton and a GPU of compute capability 7.0."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def compiles(choice: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """True if the training step is compiled: by "auto" wherever `can_compile`."""
    return choice == "on" or (choice == "auto" and can_compile(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: on the GPU of tensors, on the CPU of the process (0 on Windows: unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the peak of the parent process
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
