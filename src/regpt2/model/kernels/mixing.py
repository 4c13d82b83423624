"""Streams added up by learned scalars. In: scalars (n,), n streams of one shape; out: their weighted sum."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regpt2.model.kernels.norm import widened


def mixed(scalars: Tensor, *streams: Tensor) -> Tensor:
    """sum_i scalars[i] * streams[i], of the streams' type, computed at least in fp32 and rounded once.

    The scalars are never rounded, and their gradients, sums over all numbers of a stream, are computed in fp32 too.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _sum(scalars, streams)
    y: Tensor = _Mixed.apply(scalars, *streams)  # type: ignore[no-untyped-call]
    return y


def _sum(scalars: Tensor, streams: tuple[Tensor, ...]) -> Tensor:
    first, *others = scalars.unbind()
    total = widened(streams[0]) * widened(first)
    for scalar, stream in zip(others, streams[1:], strict=True):
        total = torch.addcmul(total, widened(stream), widened(scalar))
    return total.to(streams[0].dtype)


class _Mixed(torch.autograd.Function):
    """Autograd would keep the product of each scalar, and sum up 16-bit gradients of the scalars in 16 bits."""

    @staticmethod
    def forward(ctx: Any, scalars: Tensor, *streams: Tensor) -> Tensor:
        ctx.save_for_backward(scalars, *streams)
        return _sum(scalars, streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        scalars, *streams = ctx.saved_tensors
        wide = widened(d_y)
        d_scalars = torch.stack([(wide * stream).sum() for stream in streams]).to(scalars.dtype)
        return d_scalars, *((wide * widened(scalar)).to(d_y.dtype) for scalar in scalars.unbind())
