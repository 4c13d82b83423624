"""Is this machine fit to train? In: a `Patient`; out: a result for each check, and what to do if it is not ok."""

import importlib.util
import math
import os
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from regpt2 import __version__
from regpt2.base.console import count, flop_rate
from regpt2.base.device import Precision, choose_compute, cpu_info, device_name, peak_flops
from regpt2.base.free_memory import free_bytes
from regpt2.machine.health import agreement
from regpt2.machine.health.patient import Check, CheckResult, Patient
from regpt2.machine.known_gpus import recognize
from regpt2.machine.speed import rates
from regpt2.model.flops import flops_per_token
from regpt2.model.matmul_rate import matmul_rate, model_shapes

GOOD_SHARE = 0.6  # of a data sheet's peak for a large matmul or copy; a healthy card reaches 75 to 95 %


def machine_checks(patient: Patient) -> dict[str, Check]:
    """Every check of the machine by its name, in the order in which they run."""
    found: dict[str, Check] = {
        "software": software,
        "device": device,
        "other work": other_work,
        "memory": memory,
        "precision": precision,
        "compile": compiling,
        "attention": attention,
    }
    for name in [patient.precision] if patient.quick else patient.supported:
        found[f"math {name}"] = partial(mathematics, name=name, compiled=False)
    if patient.compiles and not patient.quick:
        found["math compiled"] = partial(mathematics, name=patient.precision, compiled=True)
    found["adamw"] = adamw
    if not patient.quick:
        found |= {"head": head, "matmul": matmul, "copy": copying}
    if patient.world.size > 1:
        found["all-reduce"] = all_reduce
    return found


def software(patient: Patient) -> CheckResult:
    """Versions, and whether torch matches the machine."""
    text = f"regpt2 {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    if patient.world.device.type == "cuda":
        cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        text += f", CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {'.'.join(map(str, nccl))}"
    elif patient.world.device.type == "cpu" and shutil.which("nvidia-smi"):
        why = "this torch is built without CUDA" if torch.version.cuda is None else "its driver may be too old or off"
        text += "; an NVIDIA driver is installed, but torch sees no GPU"
        return CheckResult("warn", text, f"{why}: see pytorch.org")
    return CheckResult("ok", text)


def device(patient: Patient) -> CheckResult:
    where = patient.world.device
    if where.type == "cuda":
        about = torch.cuda.get_device_properties(where)
        driver = nvidia_smi(where, "driver_version")
        return CheckResult(
            "ok",
            f"{device_name(where)}, {torch.cuda.device_count()} visible, {about.total_memory / 1e9:.1f} GB, "
            f"compute capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors, "
            f"driver {driver[0] if driver else 'unknown'}",
        )
    if where.type != "cpu":
        return CheckResult("ok", device_name(where))
    cores, threads = cores_here(), torch.get_num_threads()
    text = f"{device_name(where)}, {cores} cores, {threads} threads, {_cpu_features()}"
    figures = {"cores": float(cores), "threads": float(threads)}
    if threads * patient.ranks_here > cores:
        advice = f"more threads than cores: set OMP_NUM_THREADS={max(1, cores // patient.ranks_here)}"
        return CheckResult("warn", f"{text}, {patient.ranks_here} rank(s) here", advice, figures)
    if threads * patient.ranks_here <= cores // 2:
        advice = f"cores are idle: set OMP_NUM_THREADS={cores // patient.ranks_here} (torchrun sets 1)"
        return CheckResult("warn", text, advice, figures)
    return CheckResult("ok", text, figures=figures)


def cores_here() -> int:
    """Cores that this process may use: its affinity, and its control group's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def _cpu_features() -> str:
    found = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in cpu_info().split()]
    return " ".join(found) or f"{torch.backends.cpu.get_cpu_capability()} instructions"


def nvidia_smi(device: torch.device, fields: str) -> list[str]:
    """Values that nvidia-smi reports of a GPU; empty if it is missing or does not know this GPU."""
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", f"--query-gpu={fields}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 else []


def other_work(patient: Patient) -> CheckResult:
    """Does anything else use the device? Then the rates measured below are too low, and memory may run out."""
    where = patient.world.device
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info(where)
        others = total - free - torch.cuda.memory_reserved(where)
        text = f"{others / 1e9:.1f} GB of the GPU used by other processes and by CUDA itself"
        busy = others > 2e9  # a CUDA context takes half a gigabyte
        return CheckResult("warn" if busy else "ok", text, "nvidia-smi lists the processes" if busy else "")
    if where.type != "cpu" or not hasattr(os, "getloadavg"):
        return CheckResult("ok", "unknown on this system")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = load > 0.5 * cores + 0.5
    text = f"load {load:.1f} on {cores} cores in the last minute"
    return CheckResult("warn" if busy else "ok", text, "other processes slow this one down: see top" if busy else "")


def memory(patient: Patient) -> CheckResult:
    """Memory for what any training needs; `regpt2 plan` adds the activations."""
    have = free_bytes(patient.world.device)
    shares = patient.world.size if patient.config.parallel.strategy == "fsdp" else 1
    need = (4 * patient.n_params + 12 * patient.n_trained) // shares  # fp32 weights, gradients and AdamW's two moments
    text = f"{count(patient.n_params)} parameters, their gradients and AdamW's moments take {need / 1e9:.3g} GB"
    if have is None:
        return CheckResult("ok", f"{text}; free memory is unknown on this device")
    text = f"{have / 1e9:.1f} GB free for this rank; {text}"
    advice = "use a smaller model, or more ranks with --parallel.strategy fsdp" if have < need else ""
    return CheckResult("FAIL" if advice else "ok", text, advice, {"free_bytes": have, "state_bytes": need})


def precision(patient: Patient) -> CheckResult:
    """The precision that training uses, and those that the hardware supports."""
    asked = patient.config.precision
    chosen = choose_compute(asked, patient.world.device).precision  # refuses what the hardware lacks
    by = "chosen by auto" if asked == "auto" else "set by the recipe"
    return CheckResult("ok", f"{chosen}, {by}; supported: {', '.join(patient.supported)}")


def compiling(patient: Patient) -> CheckResult:
    """Does torch.compile make a correct kernel? Tried only if training compiles."""
    where = patient.world.device
    tools = [name for name in ("g++", "clang++", "cl") if shutil.which(name)]
    triton = importlib.util.find_spec("triton") is not None
    text = f"Triton is {'installed' if triton else 'missing'}, C++ compiler: {tools[0] if tools else 'none'}"
    if not patient.compiles:
        if where.type == "cuda" and patient.config.compile == "auto":
            return CheckResult("warn", f"{text}; training runs uncompiled, which is slower", "pip install triton")
        return CheckResult("ok", f"{text}; training is not compiled here ({patient.config.compile})")

    def small(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x).sum(dim=1)

    x = torch.linspace(-3, 3, 4096, device=where).view(64, 64)
    off = float((torch.compile(small)(x) - small(x)).abs().max())
    if not off < 1e-4:  # 64 sums in fp32
        return CheckResult("FAIL", f"{text}; a small kernel is off by {off:.1e}", "use --compile off, or another torch")
    return CheckResult("ok", f"{text}; a small kernel compiles and is correct")


def attention(patient: Patient) -> CheckResult:
    """The attention kernel at the model's own shape, but no longer than a few seconds allow, and its rate."""
    where = patient.world.device
    dtype = choose_compute(patient.precision, where).dtype
    model, batch = patient.config.model, patient.config.batch
    on_cpu = where.type == "cpu"
    seq_len = min(batch.seq_len, 2048 if on_cpu else 16_384)  # longer ones have a window, and would take minutes
    shape = (1 if on_cpu else batch.micro_batch, model.n_head, seq_len, model.n_embd // model.n_head)
    kernel, seconds, flops_per_s = rates.attention_rate(shape, dtype, where, at_least_s=0.1)
    text = f"{kernel} at {shape}, forward and backward in {1e3 * seconds:.3g} ms, {flop_rate(flops_per_s)}"
    slow = where.type == "cuda" and kernel == "math"
    advice = "expected a flash kernel: see torch.backends.cuda.flash_sdp_enabled()" if slow else ""
    return CheckResult("warn" if slow else "ok", text, advice, {"attention_flops_per_s": flops_per_s})


def mathematics(patient: Patient, *, name: Precision, compiled: bool) -> CheckResult:
    """Loss and gradients of small models, compared with fp64."""
    found = [agreement.agreement(one, patient.world.device, name, compiled=compiled) for one in patient.trials]
    faults = [fault for one in found if (fault := one.fault(name))]
    bounds = agreement.tolerances(name)
    figures = {what: max(abs(getattr(one, what)) for one in found) for what in bounds}
    text = ", ".join(f"{what} {figures[what]:.0e} (< {bounds[what]:.0e})" for what in ("loss", "gradient"))
    if faults:
        advice = "do not train like this: use another precision, --compile off, --device cpu or another torch"
        return CheckResult("FAIL", f"against fp64 the {faults[0]}", advice, figures)
    return CheckResult("ok", f"difference from fp64: {text}", figures=figures)


def head(patient: Patient) -> CheckResult:
    """The head and its loss at a size that small models do not reach."""
    name = patient.precision
    n_tokens = 512 if patient.world.device.type == "cpu" else 9 * 1024
    off = agreement.head_difference(patient.config.model, n_tokens, patient.world.device, name)
    most = agreement.tolerances(name)["gradient"]
    text = f"logits and gradient of {n_tokens:,} tokens at once are off by {off:.0e} (< {most:.0e}) in {name}"
    advice = "the kernels of this device are wrong: use another torch, another system version, or --device cpu"
    return CheckResult("ok", text) if off <= most else CheckResult("FAIL", text, advice)


def adamw(patient: Patient) -> CheckResult:
    off = agreement.adamw_difference(patient.trials[0], patient.world.device)
    text = f"two updates differ from the formula by {off:.0e} of the learning rate (< 1e-03)"
    advice = "the optimizer's kernel is wrong on this device"
    return CheckResult("ok", text) if off < 1e-3 else CheckResult("FAIL", text, advice)


def matmul(patient: Patient) -> CheckResult:
    """FLOP/s in each precision; on a known GPU also of a large square, compared with the data sheet."""
    where, figures = patient.world.device, dict[str, float]()
    shapes = model_shapes(patient.config.model, patient.pass_tokens)
    for name in patient.supported:
        dtype = choose_compute(name, where).dtype
        figures[f"{name}_flops_per_s"] = matmul_rate(shapes, dtype, where, at_least_s=0.2)
    each = [f"{name.split('_')[0]} {flop_rate(rate)}" for name, rate in figures.items()]
    text = f"at the model's shapes {', '.join(each)}"
    chosen = patient.precision
    sheet = peak_flops(where, chosen)
    if chosen == "bf16" and 1.2 * figures["bf16_flops_per_s"] < figures["fp32_flops_per_s"]:
        return CheckResult("warn", text, "bf16 is slower than fp32 here: --precision fp32", figures)
    if sheet is None:
        return CheckResult("ok", text, figures=figures)
    dtype = choose_compute(chosen, where).dtype
    square = matmul_rate([(8192, 8192, 8192, 1)], dtype, where, at_least_s=0.5)
    figures["square_flops_per_s"] = square
    text += f"; 8192 x 8192 in {chosen} {flop_rate(square)}, {100 * square / sheet:.0f} % of the data sheet"
    if square < GOOD_SHARE * sheet:
        state = nvidia_smi(where, "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu")
        words = "clock {} of {} MHz, {} of {} W, {} C; ".format(*state) if len(state) == 5 else ""
        return CheckResult("warn", text, f"expected at least 60 %: {words}check power, heat, other work", figures)
    return CheckResult("ok", text, figures=figures)


def copying(patient: Patient) -> CheckResult:
    where = patient.world.device
    rate = rates.copy_rate(where, 1 << (28 if where.type == "cpu" else 30), at_least_s=0.1)
    text, figures = f"memory {rate / 1e9:,.4g} GB/s, read and written", {"copy_bytes_per_s": rate}
    card = torch.cuda.get_device_properties(where) if where.type == "cuda" else None
    known = recognize(card.name, card.total_memory) if card else None
    if known and rate < GOOD_SHARE * known.bandwidth:
        advice = f"expected at least 60 % of {known.bandwidth / 1e9:,.4g} GB/s: check other processes"
        return CheckResult("warn", text, advice, figures)
    return CheckResult("ok", text, figures=figures)


def all_reduce(patient: Patient) -> CheckResult:
    """The exchange of gradients between ranks: correct sums, and its share of an update."""
    world = patient.world
    n_bytes = min(4 * patient.n_trained, 1 << (30 if world.device.type == "cuda" else 26))
    seconds = rates.exchange_seconds(world, n_bytes)
    bus = 2 * (world.size - 1) / world.size * n_bytes / seconds
    whole_s = seconds * 4 * patient.n_trained / n_bytes
    dtype = choose_compute(patient.precision, world.device).dtype
    shapes = model_shapes(patient.config.model, patient.pass_tokens)[:-1]
    flops_per_s = matmul_rate(shapes, dtype, world.device, at_least_s=0.1)
    tokens = patient.config.batch.batch_tokens / world.size
    compute_s = tokens * flops_per_token(patient.config.model, patient.config.batch.seq_len) / flops_per_s
    text = (
        f"{world.size} ranks, sums correct; {bus / 1e9:.3g} GB/s (bus); an update exchanges gradients for "
        f"{1e3 * whole_s:.3g} ms and computes for at least {1e3 * compute_s:.3g} ms"
    )
    figures = {"bus_bytes_per_s": bus, "gradients_s": whole_s, "compute_s": compute_s}
    if whole_s > 0.2 * compute_s:
        how = "NCCL_DEBUG=INFO shows the route" if world.device.type == "cuda" else "GLOO_SOCKET_IFNAME sets it"
        advice = f"expected below 20 %: {how}; --parallel.reduce-dtype bf16 halves it"
        return CheckResult("warn", text, advice, figures)
    return CheckResult("ok", text, figures=figures)
