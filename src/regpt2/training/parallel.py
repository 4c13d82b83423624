"""`model` to `trainable`. In: the plain module; out: the same weights in the compute type, compiled, over ranks.

`model` stays the plain GPT with fp32 weights: it is what is saved, evaluated and sampled. `trainable` is what
`train_step` sees. Their parameters are the same tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regpt2.base.world import World


class InComputeType(nn.Module):
    """A model that computes in `dtype` from fp32 weights. Gradients are rounded once per pass and added up in fp32.

    Unlike autocast, which rounds before each matmul and keeps the rest of the stream in fp32, the whole pass runs in
    the compute type: fewer casts and half the activations. Sums inside LayerNorm, softmax and the loss are fp32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """As the model: logits in the compute type; with targets the mean loss in fp32."""
        result: Tensor = self.model(ids, targets, dtype=self.dtype)
        return result


def in_compute_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model computing in `dtype`; the model itself where that is its own type."""
    return model if next(model.parameters()).dtype == dtype else InComputeType(model, dtype)


def make_trainable(model: nn.Module, dtype: torch.dtype, world: World, *, compiled: bool) -> nn.Module:
    """The model in the compute type, compiled if asked, with gradients averaged over the ranks if there are several."""
    trainable = in_compute_type(model, dtype)
    if compiled:
        trainable = torch.compile(trainable)  # type: ignore[assignment]
    if world.size > 1:
        where = [world.device.index] if world.device.type == "cuda" else None
        trainable = DistributedDataParallel(trainable, device_ids=where, gradient_as_bucket_view=True)
    return trainable


@contextmanager
def gradient_sync(trainable: nn.Module, *, on: bool) -> Iterator[None]:
    """Average gradients over ranks in this forward and backward, or leave them to add up locally."""
    if on or not isinstance(trainable, DistributedDataParallel):
        yield
    else:
        with trainable.no_sync():
            yield
