"""Rotary positions and the norm of queries and keys. In: heads (B, H, T, D), positions; out: the same heads, turned."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regpt2.model.kernels.norm import RMS_EPS, reciprocal_rms, widened

# B sequences, H heads, T tokens, D = head width

_BASE = 10_000.0  # RoFormer, arXiv:2104.09864, section 3.2.2
_HALF_BASE = 1024.0  # modded-nanogpt's, for the half of the pairs that turns

Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, D / 2), or (B, 1, 1, D / 2)


def rotation_of(position: int | Tensor, T: int, D: int, like: Tensor, *, half: bool = False) -> Rotation:
    """The angles for T tokens from `position` on, or for one of each row, whose place `position` (B,) has.

    The pair i of D / 2 turns by position * base^(-2i / D). With `half` the first D / 4 pairs turn, at frequencies from
    1 down to 1/1024, and the others not at all: so a head can look for a token at any distance.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    if half:
        exponents = torch.linspace(0, -1, D // 4, device=like.device, dtype=wide)  # (D / 4,)
        frequencies = F.pad(_HALF_BASE**exponents, (0, D // 4))  # (D / 2,)
    else:
        frequencies = _BASE ** (torch.arange(0, D, 2, device=like.device, dtype=wide) / -D)  # (D / 2,)
    if isinstance(position, Tensor):
        angles = position.to(wide).view(-1, 1, 1, 1) * frequencies  # (B, 1, 1, D / 2)
    else:
        angles = torch.arange(position, position + T, device=like.device, dtype=wide).outer(frequencies)  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
    """Dimension i makes a pair with i + D / 2, so that each half stays in one piece (GPT-NeoX, arXiv:2204.06745)."""
    if rotation is None:
        return x
    cos, sin = rotation
    a, b = x.chunk(2, dim=3)  # two of (B, H, T, D / 2)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)], dim=3).to(x.dtype)


def qk_norm(x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
    """Queries or keys with RMS 1, rotated. Before or after the rotation is the same: it changes no length."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return rotated(F.rms_norm(widened(x), x.shape[3:], eps=RMS_EPS), rotation).to(x.dtype)
    y: Tensor = _QKNorm.apply(x, rotation)  # type: ignore[no-untyped-call]
    return y


class _QKNorm(torch.autograd.Function):
    """Keeps its output, as attention does anyway, and one number per row: enough for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation | None) -> Tensor:
        wide = widened(x)
        r = reciprocal_rms(wide)  # (B, H, T, 1)
        y = rotated(wide * r, rotation).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.back = rotation and (rotation[0], -rotation[1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        d_y, wide = widened(d_y), widened(y)
        along = (d_y * wide).mean(dim=3, keepdim=True)  # the part that only changes the length
        return rotated(d_y.addcmul(wide, along, value=-1).mul_(r), ctx.back).to(y.dtype), None
