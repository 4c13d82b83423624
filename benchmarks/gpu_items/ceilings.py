"""The card's limits: every matmul of a step of GPT-2 (124M), attention by backend, the loss, a copy.

Nothing in a training step can be faster than these. Predictions are made from them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_items import Check
from gpu_timing import call_times, spread
from regpt2.base.device import pick_device
from regpt2.model.kernels.loss import linear_cross_entropy, reference_cross_entropy

# B sequences, T tokens, N = B T tokens, C = n_embd, H heads, D = C / H, V = padded_vocab_size


def run(check: Check) -> None:
    device = pick_device(check.device)
    B, T, C, H, V = (2, 32, 64, 2, 512) if check.smoke else (64, 1024, 768, 12, 50_304)
    torch.manual_seed(0)
    matmuls(check, device, B * T, C, V)
    attention(check, device, B, T, C, H)
    copy(check, device, 1 << (16 if check.smoke else 30))
    loss(check, device, B * T, C, V)


def matmuls(check: Check, device: torch.device, N: int, C: int, V: int) -> None:
    """Forward y = x W^T, gradient of the input dy W, gradient of the weight dy^T x; the head a chunk at a time."""
    shapes = {"c_attn": (N, C, 3 * C), "attn.c_proj": (N, C, C), "c_fc": (N, C, 4 * C), "mlp.c_proj": (N, 4 * C, C)}
    for name, (rows, n_in, n_out) in {**shapes, "head": (N // 8, C, V)}.items():
        x, w, dy = (normal(device, *shape) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
        ways: dict[str, Callable[[], Tensor]] = {
            "forward": lambda x=x, w=w: x @ w.T,
            "dgrad": lambda dy=dy, w=w: dy @ w,
            "wgrad": lambda dy=dy, x=x: dy.T @ x,
        }
        for way, call in ways.items():
            keep(check, device, f"matmul {name} {way}", call, flops=2 * rows * n_in * n_out)


def attention(check: Check, device: torch.device, B: int, T: int, C: int, H: int) -> None:
    """By backend, on the views of one (B, T, 3C) as in the model; causal, so half of the square counts."""
    qkv = normal(device, B, T, 3 * C).requires_grad_()
    q, k, v = (z.view(B, T, H, -1).transpose(1, 2) for z in qkv.split(C, dim=2))  # three of (B, H, T, D)
    dy, flops = normal(device, B, H, T, C // H), 2 * B * T * T * C
    backends = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH") if device.type == "cuda" else ()
    for name in ("default", *backends):
        try:
            with nullcontext() if name == "default" else sdpa_kernel(getattr(SDPBackend, name)):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                again = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
                back = lambda y=y: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)  # noqa: E731
                keep(check, device, f"attention {name} forward", again, flops=flops)
                keep(check, device, f"attention {name} backward", back, flops=5 * flops // 2)
        except (RuntimeError, TypeError) as error:  # no such kernel for this card, shape or torch
            check.keep(f"attention {name}", not_here=str(error).strip().split("\n")[0][:200])


def loss(check: Check, device: torch.device, N: int, C: int, V: int) -> None:
    """Forward and backward of head and cross entropy: 6 N C V operations."""
    hidden, weight = normal(device, N, C).requires_grad_(), (0.02 * normal(device, V, C)).requires_grad_()
    targets = torch.randint(0, V - 47, (N,), device=device)  # 50,257 tokens are real
    ways: dict[str, Callable[[], Tensor]] = {
        f"ours, {chunk} tokens a chunk" if chunk else "ours": lambda chunk=chunk: linear_cross_entropy(
            hidden, weight, targets, V - 47, chunk_tokens=chunk
        )
        for chunk in (None, 2048, 4096, 8192, 16384)
    }
    ways["whole logits"] = lambda: reference_cross_entropy(hidden, weight, targets, V - 47)
    if (options := getattr(torch.nn, "LinearCrossEntropyOptions", None)) is not None:  # from torch 2.13 on
        ways["torch's, in chunks"] = lambda: F.linear_cross_entropy(hidden, weight, targets, options=options())
    for name, way in ways.items():

        def both(way: Callable[[], Tensor] = way) -> None:
            hidden.grad = weight.grad = None
            way().backward()

        try:
            keep(check, device, f"loss, {name}", both, flops=6 * N * C * V, calls=10, warmup=2)  # 30 ms each
        except (RuntimeError, TypeError) as error:  # out of memory, or another signature in this torch
            check.keep(f"loss, {name}", not_here=str(error).strip().split("\n")[0][:200])


def copy(check: Check, device: torch.device, n_bytes: int) -> None:
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = spread(call_times(lambda: target.copy_(source), device))
    check.keep("copy on the device, read and write", **ms, gb_per_s=2 * n_bytes / ms["ms"] / 1e6)


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def keep(
    check: Check, device: torch.device, name: str, call: Callable[[], Any], *, flops: int, **how_often: int
) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    few = {"calls": 2, "warmup": 1} if check.smoke else how_often
    ms = spread(call_times(call, device, **few))
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
    check.keep(name, **ms, tflops=flops / ms["ms"] / 1e9, **peak)
