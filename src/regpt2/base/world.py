"""The ranks of a run. In: what torchrun sets; out: a `World`, in which one process and many look alike."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regpt2.base.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among the others: `rank` of `size`, on `device`. Alone, every method is the identity."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and speaks; the others are silent."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place; the same on every rank."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, in place. Sum and divide: not every backend has an average."""
        return self.sum(value).div_(self.size)

    def max(self, value: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def sum_on_cpu(self, value: Tensor) -> Tensor:
        """Sum over ranks of a tensor in main memory; of any type, also where the device has none such."""
        return value if self.size == 1 else self.sum(value.to(self.device)).cpu()

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Any small picklable object of our own."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


@contextmanager
def start_world(device: torch.device, *, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone. NCCL on CUDA, gloo elsewhere.

    Raises:
        UsageError: more local ranks than GPUs.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield World(rank=0, local_rank=0, size=1, device=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"rank {rank} asks for GPU {local_rank}, this machine has {torch.cuda.device_count()}; "
                "start torchrun with --nproc_per_node of at most that."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timedelta(seconds=timeout_s), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    yield World(rank=rank, local_rank=local_rank, size=size, device=device)
    dist.destroy_process_group()  # not after an error: it would wait for collectives that the others never join
