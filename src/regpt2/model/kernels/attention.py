"""Causal attention. In: queries, keys, values (B, H, T, D); out: what each token gathers from itself and those before.

It computes softmax(q k^T / sqrt(D)) v with the future masked, and with a mask also other documents and what is beyond
a window. The kernel depends on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from regpt2.model.kernels.masks import Mask, Reach, is_exporting

# B sequences, H heads, T queries, S keys, D = head width, n queries in a block, s keys that they may see

_BLOCK = 256  # queries at a time: of 128, 256 and 512 the fastest at T=1024 with and without gradient
_PART = 2048  # queries at a time elsewhere, uncompiled and with a mask
_PLANS = ("cuda",)  # devices where torch may take cuDNN's attention
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WINDOW_MULTIPLE = 256  # without gradients only such lengths are worth a plan: those of whole windows


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, mask: Mask | None = None) -> Tensor:
    """(B, H, T, D) from q (B, H, T, D), k and v (B, H, S, D): the queries are the last T of S tokens.

    Keys and values may be of another type than the queries, which is then the type of the mathematics. `mask` comes
    from `visible_keys`; without one a token sees all that come before.
    """
    if q.dtype != k.dtype:
        return causal_attention(q.to(k.dtype), k, v, dropout_p=dropout_p, mask=mask).to(q.dtype)
    if isinstance(mask, BlockMask):
        assert not dropout_p, "FlexAttention has no dropout"
        return flex_attention(q, k, v, block_mask=mask)
    T, S = q.shape[2], k.shape[2]
    if isinstance(mask, Reach):
        return (_in_blocks if q.device.type == "cpu" else _in_parts)(q, k, v, dropout_p, mask)
    if is_exporting():  # one graph for every T: no branch may depend on it
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    small = T <= _BLOCK or q.dtype == torch.bfloat16
    if q.device.type == "cpu" and T > 1 and (small or mask is not None):
        return _in_blocks(q, k, v, dropout_p, mask)
    if mask is None and T not in (1, S):  # is_causal would count from the first key
        mask = _past(T, S, q.device)
    is_causal = mask is None and T > 1
    as_it_comes = q.device.type in _PLANS and not is_worth_a_plan(T, S, with_gradient=torch.is_grad_enabled())
    with (
        _small_products(on=q.device.type == "cpu" and T == 1),
        sdpa_kernel(_WITHOUT_PLANS) if as_it_comes else nullcontext(),
    ):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p)


def _in_parts(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Reach) -> Tensor:
    """By torch's kernel, with a table for as many queries at a time as it has room for."""
    parts = []
    for i, j in _blocks(q.shape[2], k.shape[2], mask, _PART):
        seen = ~mask.hidden(range(j.stop - (i.stop - i.start), j.stop), range(j.start, j.stop), q.device)
        parts.append(causal_attention(q[:, :, i], k[:, :, j], v[:, :, j], dropout_p=dropout_p, mask=seen))
    return torch.cat(parts, dim=2)


def is_worth_a_plan(T: int, S: int, *, with_gradient: bool) -> bool:
    """May torch use cuDNN's attention? It is the fastest on Hopper, but needs 40 to 70 ms to plan each new shape.

    Training has one shape. Evaluations and generation have hundreds; of these only whole windows are worth it.
    """
    return with_gradient or (T == S and T % _WINDOW_MULTIPLE == 0)


@contextmanager
def _small_products(*, on: bool) -> Iterator[None]:
    """fp32 products on a CPU without oneDNN, where a call costs more than the product of a vector."""
    if not on or torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _past(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S): each of the last T tokens sees itself and those before it."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | Reach | None = None) -> Tensor:
    """Matrix products of blocks of queries with the keys that they may see.

    On a CPU torch's flash attention spends its time in the backward pass: forward and backward together this is 5 to 8
    times faster at T = 64 and 128, and 1.7 times in bf16 at T = 1024. In fp32 at T = 1024 it is slower, and used only
    with a mask. By a rule (`Reach`), keys that no query of a block sees are left out, so that the cost is that of the
    window.
    """
    B, H, T, D = q.shape
    q, k, v = (z.reshape(B * H, -1, D) for z in (q, k, v))  # (B H, T, D), two of (B H, S, D)
    if T > _BLOCK and not dropout_p:
        gathered: Tensor = _Blocks.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    else:
        gathered = _gather(q, k, v, mask, dropout_p)
    return gathered.view(B, H, T, D)


def _gather(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Reach | None, dropout_p: float = 0.0) -> Tensor:
    """(B H, T, D): autograd would keep the weights, T x S of them for each head."""
    pairs = _blocks(q.shape[1], k.shape[1], mask, _BLOCK)
    blocks = [F.dropout(_weights(q, k, mask, i, j), dropout_p) @ v[:, j] for i, j in pairs]
    return torch.cat(blocks, dim=1)


def _blocks(T: int, S: int, mask: Tensor | Reach | None, n: int) -> Iterator[tuple[slice, slice]]:
    """Which of the last T of S tokens go together as queries, n of them, and which keys they see."""
    past = S - T  # tokens before the first query
    for start in range(0, T, n):
        end = min(T, start + n)
        first = mask.first_key(past + start) if isinstance(mask, Reach) else 0
        yield slice(start, end), slice(first, past + end)


def _weights(q: Tensor, k: Tensor, mask: Tensor | Reach | None, i: slice, j: slice) -> Tensor:
    """(B H, n, s): how much queries i take from each of keys j; the last of these queries is at the last key."""
    q, k = q[:, i], k[:, j]
    n, s = q.shape[1], k.shape[1]
    if mask is None:
        unseen = torch.full((n, s), float("-inf"), dtype=q.dtype).triu(s - n + 1)
    else:
        if isinstance(mask, Reach):
            hidden = mask.hidden(range(j.stop - n, j.stop), range(j.start, j.stop), q.device)  # (B or 1, 1, n, s)
        else:
            hidden = ~mask[:, :, i, j]  # (B, 1, n, s)
        unseen = torch.where(hidden, float("-inf"), 0.0).to(q.dtype)  # (B or 1, 1, n, s)
        unseen = unseen.expand(-1, len(q) // len(hidden), n, s).reshape(-1, n, s)  # (B H, n, s)
    return torch.softmax(torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=q.shape[2] ** -0.5), dim=-1)


class _Blocks(torch.autograd.Function):
    """`_gather` that computes the weights again in the backward pass instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Reach | None) -> Tensor:
        ctx.rule = mask if isinstance(mask, Reach) else None
        ctx.save_for_backward(q, k, v, None if isinstance(mask, Reach) else mask)
        out = torch.empty_like(q)
        for i, j in _blocks(q.shape[1], k.shape[1], mask, _BLOCK):
            out[:, i] = _weights(q, k, mask, i, j) @ v[:, j]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, table = ctx.saved_tensors
        mask = ctx.rule or table
        scale = q.shape[2] ** -0.5
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, j in _blocks(q.shape[1], k.shape[1], mask, _BLOCK):
            weights = _weights(q, k, mask, i, j)  # (B H, n, s)
            d_v[:, j].baddbmm_(weights.transpose(1, 2), d_out[:, i])
            d_weights = d_out[:, i] @ v[:, j].transpose(1, 2)  # (B H, n, s)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, i] = scale * (d_scores @ k[:, j])
            d_k[:, j].baddbmm_(d_scores.transpose(1, 2), q[:, i], alpha=scale)
        return d_q, d_k, d_v, None
