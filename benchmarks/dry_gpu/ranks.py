"""Eight pretended ranks on the dry GPU. In: how ranks share an update; out: JSON: when gradients are exchanged.

    run.sh DIR ranks.py --strategy ddp --mode compiled

This process is rank 0 of a group whose exchanges do nothing. The result is when each exchange of gradients begins, as
the share of the backward pass's kernels that were launched before it. Nothing can hide an exchange at 100 %.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import counts
import step
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from regpt2.base.ranks.world import World
from regpt2.model.architecture import build_model
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import ParallelConfig, make_trainable
from regpt2.training.step import train_step

RANKS = 8
MICRO_STEPS = 2  # only the last one exchanges
# DDP rebuilds its buckets after the first step, in the order of the gradients, and times its first ten.
WARMUP_STEPS = 12
SMALL_BYTES = 1 << 20  # norms and losses are exchanged too
EXCHANGES = ("all_reduce", "reduce_scatter_tensor", "all_gather")  # ddp, fsdp, ordered


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp", "ordered"], default="ddp")
    parser.add_argument("--mode", choices=["compiled", "eager"], default="compiled")
    parser.add_argument("--model", choices=list(step.MODELS), default="gpt2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--reduce-dtype", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


class Observer:
    """Records each exchange of gradients: its bytes, its content, and how many kernels were launched before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.exchanges: list[dict[str, Any]] = []
        self.backward = (0, 0)  # kernels launched before and after the newest backward pass
        for name in EXCHANGES:
            setattr(dist, name, self.noting(getattr(dist, name)))
        torch.Tensor.backward = self.bounded(torch.Tensor.backward)  # type: ignore[method-assign]

    def note(self, sent: Tensor, carries: str = "") -> None:
        if sent.numel() * sent.element_size() >= SMALL_BYTES:
            kernels = counts.kernels(counts.now())
            self.exchanges.append({"bytes": sent.numel() * sent.element_size(), "kernels": kernels, "of": carries})

    def noting(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.note(max(tensors, key=Tensor.numel))
            return exchange(*args, **kwargs)

        return noted

    def bounded(self, backward: Callable[..., None]) -> Callable[..., None]:
        def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            before = counts.kernels(counts.now())
            backward(loss, *args, **kwargs)
            self.backward = before, counts.kernels(counts.now())

        return noted

    def bucket_ready(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Replaces DDP's own exchange, which Python cannot see."""
        names = [self.names[id(p)] for p in bucket.parameters()]
        self.note(bucket.buffer(), f"{names[0]} ... {names[-1]}")
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def seen(self) -> list[dict[str, Any]]:
        """With `at`: the share of the backward pass that was launched before, 0 to 1."""
        before, after = self.backward
        return [
            {"mb": e["bytes"] / 1e6, "at": min(1.0, (e["kernels"] - before) / (after - before)), "of": e["of"]}
            for e in self.exchanges
        ]


def join() -> World:
    """Rank 0 of eight; the other seven do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    dist._verify_params_across_processes = lambda *_: None  # it would read back data that the others never sent
    return World(rank=0, local_rank=0, size=RANKS, device=torch.device("cuda", 0))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    world, compiled, ordered = join(), options.mode == "compiled", options.strategy == "ordered"
    model = build_model(step.config_of(options), seed=1).to(world.device)
    config = ParallelConfig(strategy=options.strategy, reduce_dtype=options.reduce_dtype)
    trainable = make_trainable(model, torch.bfloat16, world, config, compiled=compiled)
    optimizer = build_optimizer(model, OptimConfig(), world, ordered=ordered, compiled=compiled)
    observer = Observer(model)
    if isinstance(trainable, DistributedDataParallel) and options.reduce_dtype == "fp32":
        trainable.register_comm_hook(None, observer.bucket_ready)
    seq_len = step.SEQ_LENS.get(options.model, step.SEQ_LEN)
    ids = torch.zeros(options.micro_batch, seq_len, dtype=torch.int64, device=world.device)

    def update() -> None:
        observer.exchanges.clear()
        batches = [(ids, ids)] * MICRO_STEPS
        train_step(trainable, optimizer, batches, lr=1e-3, grad_clip=1.0, world=world, ordered=ordered)

    for _ in range(WARMUP_STEPS):
        update()
    counted = counts.during(update)
    exchanges = observer.seen()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
        sync_error = ""
    except RuntimeError as error:
        sync_error = str(error).splitlines()[0]
    return {
        **step.compiler_counts(),
        "exchanges": exchanges,
        "during_backward": sum(e["at"] < 1 for e in exchanges),
        "counted": counted,
        "waits_in_step": counts.waits(counted),
        "sync_error": sync_error,
    }


def main() -> None:
    options = read_options()
    counts.now()
    print(json.dumps(vars(options) | measure(options)))


if __name__ == "__main__":
    main()
