"""Is this machine fit to train? In: a model, its batch, the ranks; out: findings: ok, warn or FAIL, and what to do."""

import importlib.util
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from regpt2 import __version__
from regpt2.base.console import count
from regpt2.base.device import Precision, choose_compute, compiles, device_name, peak_flops
from regpt2.base.errors import UsageError
from regpt2.base.free_memory import free_bytes
from regpt2.base.ranks.world import World
from regpt2.machine.health import agreement
from regpt2.machine.machines import recognize
from regpt2.machine.speed import rates
from regpt2.model.flops import flops_per_token
from regpt2.model.gpt import GPTConfig
from regpt2.training.memory import Setup

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
GOOD_SHARE = 0.6  # of a data sheet's peak that a large matmul or copy reaches on a healthy card: 75 to 95 % are usual


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    status: Literal["ok", "warn", "FAIL"]
    found: str
    advice: str = ""
    """What was expected, and what to do."""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Patient:
    """This rank's machine and what it is to train."""

    world: World
    model: GPTConfig
    micro_batch: int
    seq_len: int
    batch_tokens: int
    precision: Precision
    compile: Literal["auto", "on", "off"]
    in_shards: bool
    """Are weights and optimizer state shared out over the ranks?"""
    ranks_here: int
    """On this machine."""
    quick: bool

    @property
    def n_params(self) -> int:
        """Of the model, its padding rows included."""
        return Setup(model=self.model, micro_batch=1, seq_len=1).n_params

    @property
    def saved_bytes(self) -> int:
        """Of a checkpoint: fp32 weights and AdamW's two moments."""
        return 12 * self.n_params

    @cached_property
    def trials(self) -> tuple[agreement.Trial, ...]:
        """Small models to compute on the device; their exact results take a second."""
        return agreement.trials(self.model, self.seq_len)

    @property
    def compiles(self) -> bool:
        """Will training compile its step?"""
        return compiles(self.compile, self.world.device)

    @property
    def pass_tokens(self) -> int:
        """Rows of a matmul in training; as many as give its rate in short time."""
        return min(self.micro_batch * self.seq_len, 512 if self.world.device.type == "cpu" else 16_384)


def checks(patient: Patient) -> dict[str, Callable[[], Finding]]:
    """Every check of the machine by its name, in the order in which they are made."""
    found: dict[str, Callable[[], Finding]] = {
        "software": partial(software, patient),
        "device": partial(device, patient),
        "other work": partial(other_work, patient),
        "memory": partial(memory, patient),
        "precision": partial(precision, patient),
        "compile": partial(compiling, patient),
        "attention": partial(attention, patient),
    }
    chosen = _chosen(patient)
    for name in [chosen] if patient.quick else possible(patient.world.device):
        found[f"math {name}"] = partial(mathematics, patient, name, compiled=False)
    if patient.compiles and not patient.quick:
        found["math compiled"] = partial(mathematics, patient, chosen, compiled=True)
    found["adamw"] = partial(adamw, patient)
    if not patient.quick:
        found["head"] = partial(head, patient, chosen)
        found["matmul"] = partial(matmul, patient)
        found["copy"] = partial(copying, patient)
    if patient.world.size > 1:
        found["all-reduce"] = partial(all_reduce, patient)
    return found


def possible(device: torch.device) -> list[Precision]:
    """Precisions in the hardware of a device."""
    return [name for name in PRECISIONS if _can(name, device)]


def _can(name: Precision, device: torch.device) -> bool:
    try:
        choose_compute(name, device)
    except UsageError:
        return False
    return True


def _chosen(patient: Patient) -> Precision:
    """What training will compute in; fp32 where it will refuse, which `precision` says."""
    asked = patient.precision if patient.precision in ("auto", *possible(patient.world.device)) else "fp32"
    return choose_compute(asked, patient.world.device).precision


def software(patient: Patient) -> Finding:
    """Versions, and a torch that does not fit the machine."""
    said = f"regpt2 {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    if patient.world.device.type == "cuda":
        cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        said += f", CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {'.'.join(map(str, nccl))}"
    elif patient.world.device.type == "cpu" and shutil.which("nvidia-smi"):
        why = "this torch is built without CUDA" if torch.version.cuda is None else "its driver may be too old or off"
        return Finding("warn", f"{said}; there is an NVIDIA driver, but no GPU for torch", f"{why}: see pytorch.org")
    return Finding("ok", said)


def device(patient: Patient) -> Finding:
    """What computes."""
    where = patient.world.device
    if where.type == "cuda":
        about = torch.cuda.get_device_properties(where)
        driver = nvidia_smi(where, "driver_version")
        return Finding(
            "ok",
            f"{device_name(where)}, {torch.cuda.device_count()} here, {about.total_memory / 1e9:.1f} GB, "
            f"compute capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors, "
            f"driver {driver[0] if driver else 'not known'}",
        )
    if where.type != "cpu":
        return Finding("ok", device_name(where))
    cores, threads = cores_here(), torch.get_num_threads()
    said = f"{device_name(where)}, {cores} cores, {threads} threads, {_cpu_features()}"
    figures = {"cores": float(cores), "threads": float(threads)}
    if threads * patient.ranks_here > cores:
        advice = f"OMP_NUM_THREADS={max(1, cores // patient.ranks_here)} is faster than threads that wait for a core"
        return Finding("warn", f"{said}, {patient.ranks_here} rank(s) here", advice, figures)
    if threads * patient.ranks_here <= cores // 2:
        advice = f"cores stay idle: OMP_NUM_THREADS={cores // patient.ranks_here} (torchrun sets 1)"
        return Finding("warn", said, advice, figures)
    return Finding("ok", said, figures=figures)


def cores_here() -> int:
    """Cores that this process may use: its affinity, and its control group's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def _cpu_features() -> str:
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.exists() else set()
    there = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in words]
    return " ".join(there) or f"{torch.backends.cpu.get_cpu_capability()} instructions"


def nvidia_smi(device: torch.device, fields: str) -> list[str]:
    """What the driver's own program says of a GPU; empty where it is missing or does not know this GPU."""
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", f"--query-gpu={fields}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 else []


def other_work(patient: Patient) -> Finding:
    """Does anything else use the device? Then every rate below is too low, and memory may run out."""
    where = patient.world.device
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info(where)
        others = total - free - torch.cuda.memory_reserved(where)
        said = f"{others / 1e9:.1f} GB of the GPU taken by others and by CUDA itself"
        busy = others > 2e9  # a context of CUDA takes half a gigabyte
        return Finding("warn" if busy else "ok", said, "nvidia-smi shows whose it is" if busy else "")
    if where.type != "cpu" or not hasattr(os, "getloadavg"):
        return Finding("ok", "not known on this system")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = load > 0.5 * cores + 0.5
    said = f"load {load:.1f} on {cores} cores in the last minute"
    return Finding("warn" if busy else "ok", said, "other work takes time from this one: see top" if busy else "")


def memory(patient: Patient) -> Finding:
    """Room for what any training needs; `regpt2 plan` knows the rest."""
    have = free_bytes(patient.world.device)
    shares = patient.world.size if patient.in_shards else 1
    need = 16 * patient.n_params // shares  # fp32 weights, gradients and AdamW's two moments
    said = f"{count(patient.n_params)} parameters, their gradients and AdamW's moments take {need / 1e9:.3g} GB"
    if have is None:
        return Finding("ok", f"{said}; what is free is not known here")
    said = f"{have / 1e9:.1f} GB free for this rank; {said}"
    if have < need:
        return Finding("FAIL", said, "a smaller model, more ranks with --parallel.strategy fsdp, or more memory")
    return Finding("ok", said, figures={"free_bytes": have, "state_bytes": need})


def precision(patient: Patient) -> Finding:
    """What the hardware can do, and what training will take."""
    chosen = choose_compute(patient.precision, patient.world.device).precision
    asked = "auto" if patient.precision == "auto" else "the recipe"
    return Finding("ok", f"{chosen} by {asked}; in the hardware: {', '.join(possible(patient.world.device))}")


def compiling(patient: Patient) -> Finding:
    """Can torch.compile make a kernel here? Tried where training would."""
    where = patient.world.device
    tools = [name for name in ("g++", "clang++", "cl") if shutil.which(name)]
    triton = importlib.util.find_spec("triton") is not None
    said = f"Triton {'is there' if triton else 'is missing'}, C++ compiler: {tools[0] if tools else 'none'}"
    if not patient.compiles:
        if where.type == "cuda" and patient.compile == "auto":
            return Finding("warn", f"{said}; training will not be compiled, and slower", "pip install triton")
        return Finding("ok", f"{said}; training is not compiled here ({patient.compile})")

    def small(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x).sum(dim=1)

    x = torch.linspace(-3, 3, 4096, device=where).view(64, 64)
    off = float((torch.compile(small)(x) - small(x)).abs().max())
    if not off < 1e-4:  # 64 sums in fp32
        return Finding("FAIL", f"{said}; a small kernel is off by {off:.1e}", "--compile off, or another torch")
    return Finding("ok", f"{said}; a small kernel was compiled and is right")


def attention(patient: Patient) -> Finding:
    """Which kernel does attention, and how fast, at the model's own shape."""
    where = patient.world.device
    dtype = choose_compute(_chosen(patient), where).dtype
    batch = 1 if where.type == "cpu" else patient.micro_batch
    shape = (batch, patient.model.n_head, patient.seq_len, patient.model.n_embd // patient.model.n_head)
    one = rates.attention_rate(shape, dtype, where, at_least_s=0.1)
    said = f"{one.kernel} at {shape}, there and back in {1e3 * one.seconds:.3g} ms, {_flops(one.flops_per_s)}"
    if where.type == "cuda" and one.kernel == "math":
        return Finding("warn", said, "expected a flash kernel: see torch.backends.cuda.flash_sdp_enabled()")
    return Finding("ok", said, figures={"attention_flops_per_s": one.flops_per_s})


def mathematics(patient: Patient, name: Precision, *, compiled: bool) -> Finding:
    """Loss and gradients of small models against fp64."""
    found = [agreement.agreement(one, patient.world.device, name, compiled=compiled) for one in patient.trials]
    faults = [fault for one in found if (fault := one.fault(name))]
    bounds = agreement.tolerances(name)
    figures = {what: max(abs(getattr(one, what)) for one in found) for what in bounds}
    said = ", ".join(f"{what} {figures[what]:.0e} (< {bounds[what]:.0e})" for what in ("loss", "gradient"))
    if faults:
        advice = "do not train in it here: another precision, --compile off, --device cpu or another torch"
        return Finding("FAIL", f"against fp64 the {faults[0]}", advice, figures)
    return Finding("ok", f"off from fp64 by: {said}", figures=figures)


def head(patient: Patient, name: Precision) -> Finding:
    """The head and its loss at a size that small models do not reach."""
    n_tokens = 512 if patient.world.device.type == "cpu" else 9 * 1024
    off = agreement.head_difference(patient.model, n_tokens, patient.world.device, name)
    most = agreement.tolerances(name)["gradient"]
    said = f"logits and gradient of {n_tokens:,} tokens at once are off by {off:.0e} (< {most:.0e}) in {name}"
    advice = "the kernels of this device are wrong: another torch or system version, or --device cpu"
    return Finding("ok", said) if off <= most else Finding("FAIL", said, advice)


def adamw(patient: Patient) -> Finding:
    """Two updates against the formula."""
    off = agreement.adamw_difference(patient.trials[0], patient.world.device)
    said = f"two updates differ from the formula by {off:.0e} of the learning rate (< 1e-03)"
    return Finding("ok", said) if off < 1e-3 else Finding("FAIL", said, "this optimizer's kernel is wrong here")


def matmul(patient: Patient) -> Finding:
    """FLOP/s in each precision; on a known GPU a large square against the data sheet."""
    where, figures = patient.world.device, dict[str, float]()
    shapes = rates.model_shapes(patient.model, patient.pass_tokens)
    for name in possible(where):
        dtype = choose_compute(name, where).dtype
        figures[f"{name}_flops_per_s"] = rates.matmul_rate(shapes, dtype, where, at_least_s=0.2)
    each = [f"{name.split('_')[0]} {_flops(rate)}" for name, rate in figures.items()]
    said = f"at the model's shapes {', '.join(each)}"
    chosen = _chosen(patient)
    sheet = peak_flops(where, chosen)
    if chosen == "bf16" and 1.2 * figures["bf16_flops_per_s"] < figures["fp32_flops_per_s"]:
        return Finding("warn", said, "bf16 is slower than fp32 here: --precision fp32", figures)
    if sheet is None:
        return Finding("ok", said, figures=figures)
    dtype = choose_compute(chosen, where).dtype
    square = rates.matmul_rate([(8192, 8192, 8192, 1)], dtype, where, at_least_s=0.5)
    figures["square_flops_per_s"] = square
    said += f"; 8192 x 8192 in {chosen} {_flops(square)}, {100 * square / sheet:.0f} % of the data sheet"
    if square < GOOD_SHARE * sheet:
        state = nvidia_smi(where, "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu")
        words = "clock {} of {} MHz, {} of {} W, {} C; ".format(*state) if len(state) == 5 else ""
        return Finding("warn", said, f"expected 60 %: {words}power limit, heat or other processes?", figures)
    return Finding("ok", said, figures=figures)


def copying(patient: Patient) -> Finding:
    """Bytes/s of the device's memory."""
    where = patient.world.device
    rate = rates.copy_rate(where, 1 << (28 if where.type == "cpu" else 30), at_least_s=0.1)
    said, figures = f"memory {rate / 1e9:,.4g} GB/s, read and written", {"copy_bytes_per_s": rate}
    known = None
    if where.type == "cuda":
        known = recognize(torch.cuda.get_device_name(where), torch.cuda.get_device_properties(where).total_memory)
    if known and rate < GOOD_SHARE * known.bandwidth:
        return Finding("warn", said, f"expected 60 % of {known.bandwidth / 1e9:,.4g} GB/s: other processes?", figures)
    return Finding("ok", said, figures=figures)


def all_reduce(patient: Patient) -> Finding:
    """The gradients' way over the ranks: its sums, and its share of an update."""
    world = patient.world
    n_bytes = min(4 * patient.n_params, 1 << (30 if world.device.type == "cuda" else 26))
    seconds = rates.exchange_seconds(world, n_bytes)
    bus = 2 * (world.size - 1) / world.size * n_bytes / seconds
    whole_s = seconds * 4 * patient.n_params / n_bytes
    compute = choose_compute(_chosen(patient), world.device)
    shapes = rates.model_shapes(patient.model, patient.pass_tokens)[:-1]
    flops_per_s = rates.matmul_rate(shapes, compute.dtype, world.device, at_least_s=0.1)
    tokens = patient.batch_tokens / world.size
    compute_s = tokens * flops_per_token(patient.model, patient.seq_len) / flops_per_s
    said = (
        f"{world.size} ranks, sums right; {bus / 1e9:.3g} GB/s (bus), an update's gradients in {1e3 * whole_s:.3g} ms "
        f"beside {1e3 * compute_s:.3g} ms or more of work"
    )
    figures = {"bus_bytes_per_s": bus, "gradients_s": whole_s, "compute_s": compute_s}
    if whole_s > 0.2 * compute_s:
        way = "NCCL_DEBUG=INFO shows its way" if world.device.type == "cuda" else "GLOO_SOCKET_IFNAME chooses its way"
        advice = f"expected below 20 %: {way}; --parallel.reduce-dtype bf16 halves it"
        return Finding("warn", said, advice, figures)
    return Finding("ok", said, figures=figures)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
