"""One model, many ranks. In: the plain module; out: `trainable`, the same weights in the compute type, over ranks.

`model` stays the plain module with fp32 weights: it is what is saved, evaluated and sampled. `trainable` is what
`train_step` sees. Their parameters are the same tensors. Three strategies share the work of an update:

    ddp      every rank has all weights; gradients are averaged during the backward pass
    fsdp     weights, gradients and optimizer state lie in shards over the ranks, and are gathered where they are used
    ordered  as ddp, but summed at the end and in a fixed order (see ordered_sums.py): slower, and the same bits
             for 1, 2, 4, ... ranks
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.model.architecture import build_model
from regpt2.model.files.fill_model import give_memory, load_into
from regpt2.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share an update and watch each other. A single rank ignores these options."""

    strategy: Literal["ddp", "fsdp", "ordered"] = "ddp"
    """ddp: all weights on each rank; fsdp: sharded, for large models; ordered: ddp with a fixed order of sums."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of exchanged gradients: bf16 halves the traffic and rounds each rank's gradient to 8 bits."""
    check_every: int = 100
    """Updates between comparisons of the weights across ranks; also before every checkpoint. 0 = never."""
    timeout_s: float = 300.0
    """Seconds without progress on any rank before the run reports where it hangs and exits; 0 turns this off."""

    def __post_init__(self) -> None:
        if self.check_every < 0:
            raise ConfigError(f"parallel.check_every = {self.check_every} must be at least 0 (0 = never).")
        if not 0 <= self.timeout_s < float("inf"):
            raise ConfigError(f"parallel.timeout_s = {self.timeout_s} must be at least 0 (0 = never) and finite.")
        if self.strategy == "ordered" and self.reduce_dtype != "fp32":
            raise ConfigError("parallel.reduce_dtype must be 'fp32' with strategy 'ordered': it is there to be exact.")

    def check(self, world_size: int, grad_accum_steps: int) -> None:
        """Refuse what this strategy cannot do.

        Raises:
            ConfigError: ordered sums need blocks of 1, 2, 4, 8, ... micro-batches per rank.
        """
        if self.strategy == "ordered" and world_size > 1 and grad_accum_steps & (grad_accum_steps - 1):
            raise ConfigError(
                f"strategy 'ordered' on {world_size} ranks needs 1, 2, 4, 8, ... micro-steps per rank, not "
                f"{grad_accum_steps}; change batch.micro_batch, batch_tokens, ramp_from or the number of ranks."
            )


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


def make_trainable(
    model: LanguageModel, dtype: torch.dtype, world: World, config: ParallelConfig | None = None, *, compiled: bool
) -> nn.Module:
    """The model in the compute type, compiled if asked, its gradients shared over the ranks if there are several.

    With "fsdp" the parameters of `model` become shards in place: build the optimizer afterwards.
    """
    config = config or ParallelConfig()
    reduce_dtype = torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32
    if config.strategy == "fsdp" and world.size > 1:
        _sharded().shard(model, dtype, reduce_dtype, world)
    trainable = in_compute_type(model, dtype)
    if compiled:
        trainable = torch.compile(trainable, dynamic=False)  # type: ignore[assignment]
    if config.strategy == "ddp" and world.size > 1:
        where = [world.device.index] if world.device.type == "cuda" else None
        trainable = DistributedDataParallel(trainable, device_ids=where, gradient_as_bucket_view=True)
        if reduce_dtype == torch.bfloat16:
            trainable.register_comm_hook(world.size, _average_in_bf16)
    return trainable


def _average_in_bf16(
    world_size: int,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Half the traffic. (torch's own hook of this kind refuses gloo.)"""
    small = bucket.buffer().to(torch.bfloat16).div_(world_size)
    sent: torch.futures.Future[list[Tensor]] = dist.all_reduce(small, async_op=True).get_future()
    return sent.then(lambda done: bucket.buffer().copy_(done.value()[0]))


@contextmanager
def gradient_sync(trainable: nn.Module, *, on: bool) -> Iterator[None]:
    """Average gradients over ranks in this forward and backward, or leave them to add up locally."""
    for module in trainable.modules():
        if (switch := getattr(module, "set_requires_gradient_sync", None)) is not None:  # FSDP's
            switch(on)
            break  # the outermost passes it on
    if on or not isinstance(trainable, DistributedDataParallel):
        yield
    else:
        with trainable.no_sync():
            yield


def _sharded() -> ModuleType:
    """Half a second of imports, for those who need them."""
    return importlib.import_module("regpt2.training.ranks.sharded")


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def is_sharded(model: nn.Module) -> bool:
    """Do the weights lie in shards over the ranks?"""
    return _is_shard(next(model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from its shards: then every rank has to ask at the same time."""
    gathered: Tensor = tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor in shards, which shares its memory; else the tensor itself."""
    part: Tensor = tensor.to_local() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return part


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, cut as `pattern` is; the tensor itself if that is not in shards."""
    cut: Tensor = _sharded().shard_like(tensor, pattern) if _is_shard(pattern) else tensor
    return cut


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors themselves; where they lie in shards, whole ones in rank 0's main memory, and nothing elsewhere."""
    if not any(map(_is_shard, tensors.values())):
        return dict(tensors)
    gathered = {}
    for name, tensor in tensors.items():  # one at a time, so that the device never holds all of them whole
        full = whole(tensor.detach())
        if world.is_main:
            gathered[name] = full.cpu()
    return gathered


@torch.no_grad()
def load_weights(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """`load_into`, also where the weights lie in shards.

    Raises:
        CheckpointError: as there.
    """
    if not is_sharded(model):
        load_into(model, tensors)
        return
    plain = build_model(model.config)
    load_into(plain, tensors)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.copy_(shard_like(q.detach().to(p.device), p))


def whole_model(model: LanguageModel, world: World) -> LanguageModel:
    """The model itself, or a plain copy on every rank where its weights lie in shards. All ranks call this."""
    return plain_copy(model, world) if is_sharded(model) else model


@torch.no_grad()
def plain_copy(model: LanguageModel, world: World, tensors: Mapping[str, Tensor] | None = None) -> LanguageModel:
    """A plain copy on every rank, with `tensors` by parameter name, whole or in shards, in place of the weights.

    On a copy any rank may compute what it likes, and fail, with none of the others waiting for it. All ranks call this.
    """
    with world.together():  # room for it is found on all ranks, or on none
        with torch.device("meta"):
            plain = build_model(model.config)
        give_memory(plain, world.device)
        plain.trained_seq_len = model.trained_seq_len
        plain.set_window(model.window)
    held = tensors if tensors is not None else dict(model.named_parameters())
    for name, q in plain.named_parameters():
        q.copy_(whole(held[name]))
    return plain.train(model.training)
