"""Norms with their weights and the gradients of these in fp32. In: activations (..., C); out: the same, normalized."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# N rows, n rows at a time, C = n_embd

RMS_EPS = 1e-6  # beside a mean square near 1; the embeddings' own, at the start, is 0.0004
_ROWS = 512  # at a time in LayerNorm's backward pass, so that their fp32 copies stay in a CPU's cache


def widened(x: Tensor) -> Tensor:
    """In fp32, where `x` is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reciprocal_rms(x: Tensor) -> Tensor:
    """(..., C) -> (..., 1), of each row; `x` is wide already."""
    return (x.square().mean(dim=-1, keepdim=True) + RMS_EPS).rsqrt()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As F.layer_norm, of the type of `x`, whatever the type of the weights; statistics and sums at least in fp32."""
    if x.dtype == weight.dtype and x.element_size() >= 4:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    wide = torch.promote_types(weight.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """torch's kernels for a CPU, except for the weights' gradient of 16-bit rows, which they sum up in 16 bits.

    Over 4,096 rows of 768 that is 6 % off for the weight and 3 % for the bias, and grows with the number of rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide_weight, wide_bias = weight.float(), bias.float()
        d_weight, d_bias = torch.zeros_like(wide_weight), torch.zeros_like(wide_bias)
        d_x = torch.empty_like(x)
        parts = (z.flatten(0, -2).split(_ROWS) for z in (d_x, d_y, x, mean, rstd))
        for out, d, row, m, r in zip(*parts, strict=True):  # three of (n, C), two of (n, 1)
            d_row, d_w, d_b = torch.ops.aten.native_layer_norm_backward(
                d.float(), row.float(), list(weight.shape), m.float(), r.float(), wide_weight, wide_bias, [True] * 3
            )
            out.copy_(d_row)
            d_weight += d_w
            d_bias += d_b
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Each row divided by its root mean square, then scaled; of the type of `x`, computed at least in fp32."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        wide_weight = None if weight is None else widened(weight)
        return F.rms_norm(widened(x), x.shape[-1:], wide_weight, RMS_EPS).to(x.dtype)
    y: Tensor = _UnitRMS.apply(x) if weight is None else _RMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    """Keeps its input unchanged and one number per row; torch would keep two fp32 copies of 16-bit rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = widened(x)
        r = reciprocal_rms(wide)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, r = ctx.saved_tensors
        d_y, unit = widened(d_y), x * r
        d_weights = d_y * unit  # of each row
        along = (d_weights * weight).mean(dim=-1, keepdim=True)  # the part that only changes the length
        d_x = (d_y * weight).addcmul_(unit, along, value=-1).mul_(r)
        return d_x.to(x.dtype), d_weights.sum_to_size(weight.shape).to(weight.dtype)


class _UnitRMS(torch.autograd.Function):
    """Keeps its output, as the linear layer behind it does anyway, and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = widened(x)
        r = reciprocal_rms(wide)
        y = (wide * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        d_y, unit = widened(d_y), widened(y)
        along = (d_y * unit).mean(dim=-1, keepdim=True)  # the part that only changes the length
        return d_y.addcmul(unit, along, value=-1).mul_(r).to(y.dtype)
