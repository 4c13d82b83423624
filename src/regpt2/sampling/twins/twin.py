"""May a faster twin replace GPT-2? In: a model, and logits of both; out: yes or no, with one warning for a no."""

from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor, nn

from regpt2.base.console import warn
from regpt2.model.gpt import GPT, is_plain

# Half a unit in the last place. GPUs and some CPUs multiply fp32 matrices in TF32, which has fp16's precision.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-11}
# A logit has passed some 10 roundings per block: 480 in GPT-2 XL, which as a random walk add up to 22, and to 31 for
# the difference of two such logits. One wrong matrix moves logits by tenths of their spread.
_N_ROUNDINGS = 32

warn_once = cache(warn)


def may_have_twin(model: nn.Module) -> TypeGuard[GPT]:
    """Is it plain GPT-2, which a twin can compute from its weights? A changed GPT-2 causes a warning."""
    if is_plain(model):
        return True
    if isinstance(model, GPT):
        warn_once(
            f"this {type(model).__name__} is not plain GPT-2: it is a subclass, or a part of it was replaced, patched "
            "or hooked. Its own forward pass is used, without the faster ways for GPT-2."
        )
    return False


def twin_agrees(name: str, own: Tensor, twin: Tensor) -> bool:
    """Do a model and its twin give the same logits (..., V) within rounding? If not, there is a warning."""
    own_wide, off = own.float(), (twin.float() - own.float()).square().mean().sqrt()
    most = _N_ROUNDINGS * _ROUNDING[own.dtype] * own_wide.std(correction=0)
    if off <= most or not own_wide.isfinite().all():  # a broken model cannot be compared
        return True
    warn_once(f"{name} gives other logits than the model, so the slower way is used. Please report this.")
    return False
