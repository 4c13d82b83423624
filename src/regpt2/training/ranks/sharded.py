"""Weights in shards over the ranks (FSDP2). In: a plain model or a whole tensor; out: shards. Slow to import."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from regpt2.base.ranks.world import World
from regpt2.model.language_model import LanguageModel


def shard(model: LanguageModel, dtype: torch.dtype, reduce_dtype: torch.dtype, world: World) -> None:
    """Replace the parameters of `model` by shards: gathered in `dtype` where they are used, summed in `reduce_dtype`.

    Block by block, so that one block's weights can be gathered while the one before computes.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    # What a block is given stays as it is: the angles of rotary positions are fp32, the stream is in `dtype` anyway.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_like(tensor: Tensor, pattern: DTensor) -> DTensor:
    """This rank's shard of a whole tensor that every rank holds, cut as `pattern` is. Nothing is exchanged."""
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)
