"""Batches and gradients for any number of ranks (31, 32). In: a bench; out: as an independent definition has them?"""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from suite import Bench, Fault, Outcome

from regpt2.base.ranks.world import World
from regpt2.data.loader import Batch, BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens, write_shard
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training import step as step_module
from regpt2.training.ranks.strategy import make_trainable

T, WORLDS, SEED = 16, (1, 2, 3, 4, 5, 6, 7, 8), 11
SHARDS = (1009, 211, 3001, 40, 977)  # several steps long, shorter than a step, prime, shorter than a window


def token_stream(bench: Bench) -> Outcome:
    """Every rank count reads the windows that a definition of its own gives, over shard ends and three epochs."""
    outcome = Outcome()
    folder = _shards(bench.new("shards"))
    cases = [(order, size) for order in ("sequential", "shuffled") for size in WORLDS]
    for order, size in cases[: bench.planned]:
        wrong = bench.ask(lambda order=order, size=size: _compare_stream(folder, order, size))
        outcome.fired(not wrong, f"{order}, {size} ranks: {wrong}")
    outcome.remark = f"{sum(SHARDS):,} tokens in {len(SHARDS)} shards, three epochs"
    return outcome


def _shards(folder: Path) -> Path:
    """Tokens that tell where they are: no two windows are alike."""
    folder.mkdir()
    ids = np.random.default_rng(SEED).integers(0, 50257, size=sum(SHARDS)).astype(np.uint16)
    ends = np.cumsum(SHARDS)
    for n, end in enumerate(ends):
        write_shard(folder / f"own_train_{n:06d}.bin", SHARDS[n], [ids[end - SHARDS[n] : end]])
    return folder


def _compare_stream(folder: Path, order: str, size: int) -> str:
    """What differs; empty if nothing does. The windows of a step are compared in order, rank after rank."""
    ids = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob("*.bin"))])
    windows = (len(ids) - 1) // T
    per_step = size * 3
    config = BatchConfig(batch_tokens=per_step * T, micro_batch=1, seq_len=T, order=order)  # type: ignore[arg-type]
    seen: list[int] = []
    with open_tokens(folder, "train") as tokens:
        loaders = [Loader(tokens, config, seed=SEED, rank=rank, world_size=size) for rank in range(size)]
        for step in range(1, 3 * windows // per_step + 2):
            got = sorted(row.tobytes() for loader in loaders for row in _rows(loader.batch(step)))
            places = [_place(i, windows, order) for i in range((step - 1) * per_step, step * per_step)]
            want = sorted(ids[p * T : p * T + T + 1].astype(np.int64).tobytes() for p in places)
            if got != want:
                return f"update {step} has other windows"
            seen += places
    for epoch in range(3):
        if sorted(seen[epoch * windows : (epoch + 1) * windows]) != list(range(windows)):
            return f"epoch {epoch} does not have every window once"
    return ""


def _rows(batch: Batch) -> list[np.ndarray[Any, Any]]:
    pairs = [pair for inputs, targets in batch.micro_batches for pair in zip(inputs, targets, strict=True)]
    return [np.concatenate([x, y[-1:]]) for x, y in pairs]


def _place(position: int, n: int, order: str) -> int:
    """Which window is the `position`-th of the run: written out a second time, with plain numbers."""
    epoch, place = divmod(position, n)
    if order == "sequential":
        return place
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    base = _mix((_mix(SEED) + epoch) % 2**64)
    while True:
        left, right = place >> half, place % 2**half
        for number in range(6):
            left, right = right, left ^ (_mix(right ^ _mix((number + base) % 2**64)) % 2**half)
        place = left << half | right
        if place < n:
            return place


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


LAYOUTS = ((1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 1))  # ranks, sequences in a micro-batch
SEQUENCES = 8
TOLERANCE = 1e-12  # of float64 sums in another order, relative to the norm; a wrong weight shows at 1e-2
LOSS_TOLERANCE = 1e-6  # the loss is summed in fp32


def accumulation(bench: Bench) -> Outcome:
    """One update of eight sequences, cut over ranks and micro-steps in eight ways: one gradient and one loss."""
    outcome, worst = Outcome(), 0.0
    expected = np.array(bench.ask(_gradient_at_once))
    for size, micro_batch in LAYOUTS[: bench.planned]:
        loss, *gradient = _gradient(bench, size, micro_batch)
        error = float(np.linalg.norm(gradient - expected[1:]) / np.linalg.norm(expected[1:]))
        worst = max(worst, error)
        ok = error <= TOLERANCE and abs(loss - expected[0]) <= LOSS_TOLERANCE
        outcome.fired(ok, f"{size} ranks, micro-batches of {micro_batch}: gradient off by {error:.1e}, loss {loss:.6f}")
    outcome.remark = f"gradients off by {worst:.0e} at most"
    return outcome


def _model() -> GPT:
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=T, vocab_size=257), seed=SEED).double()


def _sequences() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight sequences, each easier than the one before: no two have the same loss."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randint(0, 257 // (n + 1), (T + 1,), generator=generator) for n in range(SEQUENCES)]
    window = torch.stack(rows)
    return window[:, :-1], window[:, 1:]


def _gradient_at_once() -> list[float]:
    """The mean loss of all sequences and its gradient: one forward, one backward, no accumulation."""
    model = _model()
    inputs, targets = _sequences()
    logits = model(inputs)[..., :257]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return [loss.item(), *_flat(model)]


def _flat(model: GPT) -> list[float]:
    parts = [
        p.grad[:257] if name == "wte.weight" else p.grad for name, p in model.named_parameters() if p.grad is not None
    ]
    return [float(value) for value in torch.cat([part.flatten() for part in parts])]


def _gradient(bench: Bench, size: int, micro_batch: int) -> np.ndarray[Any, Any]:
    """The loss and gradient that `train_step` makes, on so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = [bench.folder / f"gradient-{size}-{micro_batch}-{rank}.npy" for rank in range(size)]
    trials = [bench.fork(lambda r=rank: _one_rank(r, size, micro_batch, port, answers[r])) for rank in range(size)]
    for process in trials:
        if (code := process.wait(60)) != 0:
            raise RuntimeError(f"a rank ended with exit code {code}: {process.said[-1500:]}")
    found = [np.load(path) for path in answers]
    assert all(np.array_equal(found[0], other) for other in found), "the ranks do not have the same gradient"
    return found[0]


def _one_rank(rank: int, size: int, micro_batch: int, port: int, answer: Path) -> int:
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
    model = _model()
    trainable = make_trainable(model, torch.float64, world, compiled=False)
    inputs, targets = (x.reshape(-1, micro_batch, T)[rank::size] for x in _sequences())
    found: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.extend(_flat(model))

    stats = step_module.train_step(
        trainable,
        Spy(model.parameters(), lr=0.0),
        list(zip(inputs, targets, strict=True)),
        lr=0.0,
        grad_clip=0.0,
        world=world,
    )
    np.save(answer, np.array([stats.loss.item(), *found]))
    return 0


FAULTS = [
    Fault(31, "token stream, 1 to 8 ranks", (2 * len(WORLDS), 2 * len(WORLDS)), token_stream),
    Fault(32, "accumulation and ranks", (len(LAYOUTS), len(LAYOUTS)), accumulation),
]
