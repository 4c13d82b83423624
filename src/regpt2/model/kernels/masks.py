"""Which keys each query sees. In: documents, a window; out: a mask for attention, made once for all layers."""

import torch
from torch import Tensor

from regpt2.model.kernels.attention import DocumentMask, document_mask


def visible_keys(
    T: int,
    S: int,
    *,
    device: torch.device,
    documents: Tensor | None = None,
    window: int | Tensor = 0,
    seen: Tensor | None = None,
) -> DocumentMask | None:
    """What the last T of S tokens see: themselves and those before, in their document and within the window.

    Args:
        documents: (B, S), the number of each token's document; None: all are one.
        window: tokens that attention reaches back, the token itself included; 0: all before. A tensor () where the
            pass is compiled, so that a new value does not compile it again.
        seen: (B, 1, 1, S), for rows of one query each at places of their own: which keys were written before it.
    """
    assert not isinstance(window, Tensor) and not window, "not written yet"
    if documents is None:
        return seen
    return document_mask(documents, T, seen)
