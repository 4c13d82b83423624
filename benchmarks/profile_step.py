"""Where a training step's time goes. In: a job as JSON; out: a line of JSON: milliseconds of each part, and its floor.

Started by run.py --profile. A part is a kind of operator (the matmuls one by one). Its floor is the least time of the
same work here: for a matmul one of the same shape, alone; for attention its arithmetic at the best rate of those; for
the rest the bytes that it must read and write, at the rate of a copy. Fused parts can be faster than the sum.
"""

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from regpt2.base.device import choose_compute, synchronize
from regpt2.machine.speed.rates import copy_rate
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.matmul_rate import seconds_of
from training import batches, ours
from works import TrainingWork

# B sequences, H heads, T tokens, N = tokens of a micro-step, C = n_embd, V = padded_vocab_size

OPTIMIZER, ATTENTION, LOSS, CASTS = "AdamW and clipping", "attention", "loss", "casts"
POINTWISE, BIASES, EMBEDDING, REST = "LayerNorm, GELU, residual", "bias gradients", "embedding", "other operators"
OUTSIDE = {"cpu": "outside of operators", "cuda": "GPU idle"}
# The first that occurs in an operator's name, or in the name of an operator that contains it.
RULES = [
    (r"Optimizer\.step|_fused_adamw|vector_norm|foreach_norm|_foreach_mul|clip_grad", OPTIMIZER),
    (r"_Blocks|scaled_dot_product|flash_attention|aten::(badd)?bmm|aten::_?softmax|aten::triu", ATTENTION),
    (r"aten::(add)?mm\b|linear_pointwise", "matmul"),
    (r"AddmmBackward.*aten::sum", BIASES),
    (r"log_softmax|aten::(gather|scatter|exp)|cross_entropy|nll_loss|triton\w*(gather|scatter|logsumexp)", LOSS),
    (r"triton\w*embedding|aten::embedding|EmbeddingBackward", EMBEDDING),
    (r"triton_poi_fused__to_copy(_t|_view|_transpose|_permute|_\d+)*$", CASTS),
    (r"layer_norm|gelu|triton_", POINTWISE),
    (r"aten::_to_copy|ToCopyBackward", CASTS),
    (r"LinearCrossEntropy", LOSS),
    (r"aten::add\b|AddBackward|aten::add_\b", POINTWISE),
]
MATMUL = re.compile(r"aten::(add)?mm$")


def chain(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The operator, then those that contain it, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def matmul_of(events: list[FunctionEvent], work: TrainingWork) -> tuple[str, tuple[int, ...]]:
    """The matmul's layer, its direction, and its (m, k, n)."""
    event = next((event for event in events if MATMUL.search(event.name)), None)
    if event is None or len(event.input_shapes) < 2:
        return "other matmuls", ()
    a, b = event.input_shapes[1:3] if event.name == "aten::addmm" else event.input_shapes[:2]
    if len(a) != 2 or len(b) != 2:
        return "other matmuls", ()
    C, V = work.model.n_embd, GPTConfig(**work.model.sizes()).padded_vocab_size
    m, k, n = a[0], a[1], b[1]
    layers = {(C, 3 * C): "attn.c_attn", (C, C): "attn.c_proj", (C, 4 * C): "mlp.c_fc", (4 * C, C): "mlp.c_proj"}
    if any("LinearCrossEntropy" in event.name for event in events) or (V != C and V in (m, k, n)):
        way = "wgrad" if k not in (C, V) else "dgrad" if k == V else "forward"  # wgrad may come in parts of V
        return f"head {way}", (m, k, n)
    if k == work.micro_batch * work.seq_len:
        way = "wgrad"
    else:
        way = "dgrad" if any("Backward" in event.name for event in events) else "forward"
    inputs, outputs = {"forward": (k, n), "dgrad": (n, k), "wgrad": (n, m)}[way]
    return f"{layers.get((inputs, outputs), 'other')} {way}", (m, k, n)


def part_of(events: list[FunctionEvent], work: TrainingWork) -> tuple[str, tuple[int, ...]]:
    """The part that an operator belongs to; for a matmul its size too."""
    names = " ".join(event.name for event in reversed(events))
    part = next((part for pattern, part in RULES if re.search(pattern, names)), REST)
    if part == "matmul":
        return matmul_of(events, work)
    if part == ATTENTION:
        part += " backward" if "Backward" in names else " forward"
    return part, ()


def bare_matmul_s(way: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one matmul of (m, k) and (k, n), laid out as in that pass of a linear layer."""
    m, k, n = size
    a = torch.randn((k, m) if way == "wgrad" else (m, k), device=device, dtype=dtype)
    b = torch.randn((n, k) if way == "forward" else (k, n), device=device, dtype=dtype)
    a, b = (a.T if way == "wgrad" else a), (b.T if way == "forward" else b)
    return seconds_of(lambda: a @ b, device, at_least_s=0.2)


def byte_floors(work: TrainingWork, config: GPTConfig, n_params: int, itemsize: int) -> dict[str, float]:
    """Bytes that each part must move in a step, if every tensor is read and written once."""
    token_layers = work.tokens * config.n_layer * config.n_embd * itemsize
    passes = work.grad_accum_steps if itemsize < 4 else 0
    return {
        POINTWISE: token_layers * (16 + 20),  # norms with their residuals 8 C forward, 8 C backward; GELU 8 C, 12 C
        LOSS: 2.0 * work.tokens * config.padded_vocab_size * itemsize,  # logits read, their gradient in their place
        OPTIMIZER: 32.0 * n_params,  # weight, moments read and written, gradient read for its norm and for the update
        CASTS: 12.0 * n_params * passes,  # weights to the compute type, gradients back
    }


def profile_step(work: TrainingWork, precision: str, steps: int) -> dict[str, Any]:
    """Milliseconds of each part of a step beside its floor, the longest first, and of the step without the profiler."""
    device = torch.device(work.device)
    step, pairs = ours(work, precision), batches(work)
    step(pairs)
    step_s = seconds_of(lambda: step(pairs), device, at_least_s=0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as seen:
        began_at = time.perf_counter()
        for _ in range(steps):
            step(pairs)
        synchronize(device)
        profiled_s = (time.perf_counter() - began_at) / steps
    found = [
        (*part_of(list(chain(event)), work), MATMUL.search(event.name) is not None, seconds(event, work.device))
        for event in seen.events()
        if event.device_type.name == "CPU"
    ]
    parts: dict[str, float] = defaultdict(float)
    matmuls: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
    for part, size, is_matmul, spent in found:
        parts[part] += spent / steps
        if size and is_matmul:
            matmuls[part, size] += 1 / steps
    parts[OUTSIDE[device.type]] = max(0.0, profiled_s - sum(parts.values()))
    floors, rates = floors_of(work, choose_compute(precision, device).dtype, matmuls)
    rows = [
        {"part": name, "ms": 1e3 * spent, "floor_ms": 1e3 * floors[name] if floors.get(name) else None}
        for name, spent in sorted(parts.items(), key=lambda item: -item[1])
        if spent
    ]
    return {"step_s": step_s, "profiled_step_s": profiled_s, **rates, "parts": rows}


def seconds(event: FunctionEvent, device: str) -> float:
    """The time of the operator without its parts: of its kernels on a GPU, its own on a CPU."""
    return (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6


def floors_of(
    work: TrainingWork, dtype: torch.dtype, matmuls: dict[tuple[str, tuple[int, ...]], float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The least seconds of each part, given the number of matmuls of each size in a step, and the rates used."""
    device, config = torch.device(work.device), GPTConfig(**work.model.sizes())
    floors: dict[str, float] = defaultdict(float)
    best = 0.0
    for (part, (m, k, n)), count in matmuls.items():
        one_s = bare_matmul_s(part.split()[-1], (m, k, n), dtype, device)
        floors[part] += count * one_s
        best = max(best, 2.0 * m * k * n / one_s)
    square = 2.0 * work.tokens * work.seq_len * config.n_embd * config.n_layer  # of scores and values, its causal half
    floors |= {f"{ATTENTION} forward": square / best, f"{ATTENTION} backward": 2 * square / best}
    bandwidth = copy_rate(device, 256 << 20, at_least_s=0.5)
    floors |= {name: n_bytes / bandwidth for name, n_bytes in bytes_of(work, config, dtype.itemsize).items()}
    return floors, {"best_matmul_flops_per_s": best, "copy_bytes_per_s": bandwidth}


def bytes_of(work: TrainingWork, config: GPTConfig, itemsize: int) -> dict[str, float]:
    """Bytes that each part must move in a step, if every tensor is read and written once."""
    n_params = GPT(config).n_params()
    token_layers = work.tokens * config.n_layer * config.n_embd * itemsize
    casts = work.grad_accum_steps if itemsize < 4 else 0
    return {
        POINTWISE: token_layers * (16 + 20.0),  # norms with their residuals 8 C forward, 8 C backward; GELU 8 C, 12 C
        LOSS: 2.0 * work.tokens * config.padded_vocab_size * itemsize,  # logits read, their gradient in their place
        OPTIMIZER: 32.0 * n_params,  # weight, moments read and written, gradient read for its norm and for the update
        CASTS: 12.0 * n_params * casts,  # weights to the compute type, gradients back
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    work = TrainingWork.from_json(job["work"])
    print(json.dumps(profile_step(work, job["precision"], job["steps"])))


if __name__ == "__main__":
    main()
