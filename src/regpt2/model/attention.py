"""Causal attention. In: queries, keys, values (B, H, T, D); out: what each token gathers from itself and those before.

The mathematics is softmax(q k^T / sqrt(D)) v with the future masked; which kernel does it depends on the device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# B sequences, H heads, T queries, S keys, D = head width, n queries in a block, s keys that they may see

_BLOCK = 256  # queries at a time: of 128, 256 and 512 the fastest at T=1024 with and without gradient


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """(B, H, T, D) from q (B, H, T, D), k and v (B, H, S, D): the queries are the last T of S tokens.

    Keys and values may be of another type than the queries, which is then the type of the mathematics.
    """
    if q.dtype != k.dtype:
        return causal_attention(q.to(k.dtype), k, v, dropout_p=dropout_p).to(q.dtype)
    T, S = q.shape[2], k.shape[2]
    if torch.compiler.is_exporting():  # one graph for every T: its value must decide nothing
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cpu" and T > 1 and (T <= _BLOCK or q.dtype == torch.bfloat16):
        return _in_blocks(q, k, v, dropout_p)
    if T in (1, S):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout_p)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # is_causal would count from the first key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout_p)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Matrix products of blocks of queries with the keys that they may see.

    On a CPU torch's flash attention spends its time in the backward pass: forward and backward together this is 5 to 8
    times faster at T = 64 and 128, and 1.7 times in bf16 at T = 1024. In fp32 at T = 1024 it is slower, and not used.
    """
    B, H, T, D = q.shape
    q, k, v = (z.reshape(B * H, -1, D) for z in (q, k, v))  # (B H, T, D), two of (B H, S, D)
    if T > _BLOCK and not dropout_p:
        gathered: Tensor = _Blocks.apply(q, k, v)  # type: ignore[no-untyped-call]
    else:
        gathered = _gather(q, k, v, dropout_p)
    return gathered.view(B, H, T, D)


def _gather(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """(B H, T, D): autograd would keep the weights, T x S of them for each head."""
    blocks = [F.dropout(_weights(q[:, i], k[:, j]), dropout_p) @ v[:, j] for i, j in _blocks(q, k)]
    return torch.cat(blocks, dim=1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which queries go together, and which keys they see."""
    T, past = q.shape[1], k.shape[1] - q.shape[1]  # tokens before the first query
    for start in range(0, T, _BLOCK):
        end = min(T, start + _BLOCK)
        yield slice(start, end), slice(0, past + end)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """(B H, n, s): how much each query of a block takes from each token; the last query is at the last key."""
    n, s = q.shape[1], k.shape[1]
    future = torch.full((n, s), float("-inf"), dtype=q.dtype).triu(s - n + 1)
    return torch.softmax(torch.baddbmm(future, q, k.transpose(1, 2), alpha=q.shape[2] ** -0.5), dim=-1)


class _Blocks(torch.autograd.Function):
    """`_gather` that computes the weights again in the backward pass instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _gather(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        scale = q.shape[2] ** -0.5
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, j in _blocks(q, k):
            weights = _weights(q[:, i], k[:, j])  # (B H, n, s)
            d_v[:, j].baddbmm_(weights.transpose(1, 2), d_out[:, i])
            d_weights = d_out[:, i] @ v[:, j].transpose(1, 2)  # (B H, n, s)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, i] = scale * (d_scores @ k[:, j])
            d_k[:, j].baddbmm_(d_scores.transpose(1, 2), q[:, i], alpha=scale)
        return d_q, d_k, d_v
