"""The ranks of a run. In: what torchrun sets; out: a `World`, in which one process and many look alike."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regpt2.base.errors import FailedElsewhere, Problem, UsageError
from regpt2.base.ranks.rendezvous import private_store


@dataclass(frozen=True)
class World:
    """This process among the others: `rank` of `size`, on `device`. Alone, every method is the identity."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and prints; the others do neither."""
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

    def stack(self, value: Tensor) -> Tensor:
        """Every rank's tensor, in the order of ranks: (...) -> (size, ...)."""
        if self.size == 1:
            return value.unsqueeze(0)
        rows = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(rows, value)
        return torch.stack(rows)

    def sum_on_cpu(self, value: Tensor) -> Tensor:
        """Sum over ranks of a tensor in main memory."""
        return value if self.size == 1 else self.sum(value.to(self.device)).cpu()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def everyones(self, value: Any) -> list[Any]:
        """The value of each rank, in the order of ranks: anything that JSON can hold. (torch would pickle it.)"""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.stack(torch.tensor(len(data), device=self.device)).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        rows = self.stack(padded).cpu()
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank: anything that JSON can hold."""
        return value if self.size == 1 else self.everyones(value if self.is_main else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error on one rank inside this block fails all ranks at its end, so that none waits for a lost one.

        The block must not exchange anything between ranks.

        Raises:
            FailedElsewhere: another rank failed; that rank raises and reports its own error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, once the others know of it
            failure = error
        what = None if failure is None else str(failure) or type(failure).__name__
        code = failure.exit_code if isinstance(failure, Problem) else 1
        outcomes = self.everyones([what, code])
        if failure is not None:
            raise failure
        for rank, (what, exit_code) in enumerate(outcomes):
            if what is not None:
                raise FailedElsewhere(f"rank {rank} failed: {what}", exit_code)


# In the errors of gloo and NCCL when a rank is gone or does not answer.
_LOST_RANK = re.compile(r"gloo|NCCL|Connection (reset|closed|refused)|Broken pipe|Timed out waiting", re.IGNORECASE)


@contextmanager
def start_world(device: torch.device, *, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone. NCCL on CUDA, gloo elsewhere.

    Args:
        timeout_s: how long an exchange may wait for a rank before it fails.

    Raises:
        UsageError: more local ranks than GPUs.
        Problem: the ranks could not connect, one was lost, or the exchange gives wrong sums.
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
    _meet(rank, size, device, timeout_s)
    world = World(rank=rank, local_rank=local_rank, size=size, device=device)
    check_exchange(world)
    try:
        yield world
        world.barrier()  # no rank may exit while another still sends
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        raise Problem(
            f"rank {rank} has lost another rank ({str(error).splitlines()[0]}). Its own error is above or in "
            "torchrun's log. Checkpoints are complete: run the same command again to resume from the newest."
        ) from error
    # Nothing is destroyed: see `leave_if_one_of_many`.


def _meet(rank: int, size: int, device: torch.device, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    on_gpu = device.type == "cuda"
    try:
        shared, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        store = private_store(shared, rank, size, timeout_s=timeout_s)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise Problem(
            f"rank {rank} of {size} could not connect to the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}). If they are up, look at torchrun's "
            "--rdzv-endpoint, the firewall, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
        ) from error


def check_exchange(world: World) -> None:
    """Exchange values whose results are known, in every type that training sends.

    A backend can sum wrongly without an error: gloo's average did (pytorch#162338).

    Raises:
        Problem: a result is wrong.
    """
    n = world.size
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        mine = torch.tensor([world.rank + 1, 2], dtype=dtype, device=world.device)
        expected = {"sum": [n * (n + 1) // 2, 2 * n], "max": [n, 2], "stack": [[rank + 1, 2] for rank in range(n)]}
        for name, wanted in expected.items():
            if dtype == torch.bfloat16 and n > 15:  # sums beyond 256 are not exact in 8 bits
                continue
            got = getattr(world, name)(mine.clone())
            if got.tolist() != wanted:
                raise Problem(
                    f"rank {world.rank}: the {name} of {dtype} over {n} ranks is {got.tolist()}, expected {wanted}; "
                    f"this backend ({dist.get_backend()} of torch {torch.__version__}) cannot be used for training."
                )
