"""Bugs to plant, known from other projects. In: a name; out: this process with the bug; the suite has to turn red.

python plants.py NAME train ...    the command `regpt2 train ...` with the bug
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from regpt2 import cli
from regpt2.base.files import sha256_file
from regpt2.data.loader import Batch, Loader
from regpt2.run import loop
from regpt2.sampling.batching import engine
from regpt2.serving.http import access, connection, exchange
from regpt2.training import checkpoint, guard, step


def naive_save() -> None:
    """A checkpoint is written straight under its final name, without fsync and rename."""

    def write(checkpoints: Path, snap: checkpoint.Snapshot) -> Path:
        folder = checkpoints / f"step-{snap.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(snap.model, folder / checkpoint.MODEL)
        save_file(snap.optimizer, folder / checkpoint.OPTIMIZER)
        (folder / checkpoint.CONFIG).write_text(snap.config_json)
        (folder / checkpoint.STATE).write_text(json.dumps(snap.state))
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            for name in checkpoint.FILES
        }
        (folder / "manifest.json").write_text(json.dumps({"step": snap.step, "files": files}))
        return folder

    checkpoint.write = write


def rng_not_restored() -> None:
    """Dropout draws from a generator that starts with the process, instead of being seeded by the step."""
    drawn = 0

    def running(seed: int, step: int, micro_batch: int) -> int:
        nonlocal drawn
        drawn += 1
        return seed + drawn

    loop.random_seed = running


def per_rank_shard_boundary() -> None:
    """Each rank leaves a shard when its own position comes near the end: they drift apart (build-nanogpt)."""

    def batch(self: Loader, step: int) -> Batch:
        B, T, W = self.config.micro_batch, self.config.seq_len, self.world_size
        shard, position = 0, B * T * self.rank
        sizes = [file.n_tokens for file in self.streams[0].files]  # type: ignore[attr-defined]
        found = []
        n = self.grad_accum_steps(step)  # of every update: no ramp
        for _ in range(step * n):
            start = sum(sizes[:shard]) + position
            found.append(start)
            position += B * T * W
            if position + B * T * W + 1 > sizes[shard]:
                shard, position = (shard + 1) % len(sizes), B * T * self.rank
        rows = [self.streams[0].read(start, B * T + 1).astype("int64") for start in found[-n:]]
        return Batch([(row[:-1].reshape(B, T), row[1:].reshape(B, T)) for row in rows], digest=0)

    Loader.batch = batch  # type: ignore[method-assign]


def mean_of_means() -> None:
    """The loss of an update is a running mean, (former + new) / 2: later micro-steps weigh more."""
    plain = step.train_step

    def weighted(trainable: torch.nn.Module, optimizer: Any, batches: Any, **options: Any) -> Any:
        n, done = len(batches), 0

        def weigh(module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
            nonlocal done
            weight = 0.5 ** (n - max(1, done))
            done += 1
            return loss * weight * n

        hook = trainable.register_forward_hook(weigh)
        try:
            return plain(trainable, optimizer, batches, **options)
        finally:
            hook.remove()

    step.train_step = weighted
    loop.train_step = weighted


def nan_in_window() -> None:
    """The guard remembers the losses of skipped updates too: one NaN spoils its mean for good (OLMo-core)."""
    plain = guard.Guard.take_in

    def take_in(self: guard.Guard, stats: step.StepStats) -> None:
        plain(self, dataclasses.replace(stats, accepted=torch.ones_like(stats.accepted)))

    guard.Guard.take_in = take_in  # type: ignore[method-assign]


def any_host_is_ours() -> None:
    """The server answers whatever Host is: a web page reaches it by DNS rebinding (ollama, llama.cpp)."""
    access._host = lambda *_: None


def slow_clients_are_kept() -> None:
    """No time limit for the head of a request, as in uvicorn."""
    connection.Connection._check = lambda self: None  # type: ignore[method-assign]


def queue_without_bound() -> None:
    """Every request is taken, however many wait (nanochat)."""
    plain = engine.Engine.__init__

    def begin(self: engine.Engine, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.most_waiting = sys.maxsize

    engine.Engine.__init__ = begin  # type: ignore[method-assign]


def streams_are_cut() -> None:
    """A stream that does not finish in time just ends: its client cannot know that the text is not whole."""

    async def end(self: exchange.Exchange, why: object) -> None:
        await self.send({"type": "http.response.body", "body": b'data: {"choices": [{"te'})

    exchange.Exchange.end = end  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        *(naive_save, rng_not_restored, per_rank_shard_boundary, mean_of_means, nan_in_window),
        *(any_host_is_ours, slow_clients_are_kept, queue_without_bound, streams_are_cut),
    )
}


def apply(name: str | None) -> None:
    """Plant one bug in this process; None plants nothing."""
    if name is not None:
        PLANTS[name]()


if __name__ == "__main__":
    apply(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))
