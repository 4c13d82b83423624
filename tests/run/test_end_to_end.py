"""A whole run beside one written apart: transformers' model, torch's AdamW, and all between them from its description.

Both compute in fp64, so that they agree to 1e-9 after 30 updates, or something is wired wrongly.
"""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from conftest import shard_tokens, write_data
from rank_processes import spawn
from regpt2.base.device import Compute
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.model.gpt import GPT
from regpt2.run.loop import train

# No value is the default, so that one that does not arrive is missed.
RECIPE = """
seed = 11
max_steps = 30
log_every = 7
eval_every = 10
sample_every = 0
save_every = 30
device = "cpu"
precision = "fp32"
[model]
n_layer = 2
n_head = 2
n_embd = 16
block_size = 24
vocab_size = 257
[batch]
batch_tokens = 256
ramp_from = 64
ramp_tokens = 2300
micro_batch = 2
seq_len = 16
[optim]
lr = 8e-3
embedding_lr = 2e-2
weight_decay = 0.3
betas = [0.8, 0.97]
eps = 1e-3
grad_clip = 0.9
[schedule]
warmup_steps = 6
min_lr_fraction = 0.2
[evals]
val_tokens = 112
"""
SIZES = [4] * 12 + [8] * 6 + [12] * 4 + [16] * 8  # windows of each update
N_TRAIN, N_VAL = 2_150, 500  # 134 windows: 30 updates are 2.0 epochs; three shards, whose seams are within windows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny", n_train=N_TRAIN, n_val=N_VAL)


def recipe_for(folder: Path, order: str, dropout: float, strategy: str) -> RunConfig:
    path = folder / "recipe.toml"
    path.write_text(RECIPE + f'[parallel]\nstrategy = "{strategy}"\n')
    config = load_recipe(str(path))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=dropout),
        batch=dataclasses.replace(config.batch, order=order),
    )


def train_in_fp64(config: RunConfig) -> None:
    """The real run, its weights and its compute type widened."""
    with pytest.MonkeyPatch.context() as wide:
        wide.setattr(Compute, "dtype", property(lambda _: torch.float64))
        wide.setattr("regpt2.run.ending.write_report", lambda run: run)  # a second each, and not the point
        torch.set_default_dtype(torch.float64)
        try:
            train(config)
        finally:
            torch.set_default_dtype(torch.float32)


def rank_main(rank: int, size: int, port: int, config: RunConfig) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    train_in_fp64(config)
    os._exit(0)  # torch's own end of a group may wait forever, or abort


# What follows has of the package a config's fields and the weights at the start; shards it reads by their format.


@dataclass
class Curves:
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    val_loss: dict[int, float] = field(default_factory=dict)


def mixed(x: int) -> int:
    """SplitMix64's finalizer, of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def shuffled(place: int, n: int, seed: int, epoch: int) -> int:
    """A Feistel network of six rounds on two halves, again and again until the value is one of n."""
    bits = -(-(n - 1).bit_length() // 2)
    value = place
    while True:
        left, right = value >> bits, value % 2**bits
        for turn in range(6):
            key = mixed((turn + mixed((mixed(seed) + epoch) % 2**64)) % 2**64)
            left, right = right, left ^ mixed(right ^ key) % 2**bits
        value = left << bits | right
        if value < n:
            return value


def updates_of(tokens: list[int], config: RunConfig) -> list[Tensor]:
    """The windows of every update, (n, T + 1): one after the other through the epochs, along the line of the ramp."""
    T, batch = config.batch.seq_len, config.batch
    n_windows = (len(tokens) - 1) // T
    updates, first = [], 0
    for _ in range(config.max_steps):
        height = batch.ramp_from + (batch.batch_tokens - batch.ramp_from) * Fraction(first * T, batch.ramp_tokens)
        size = min(batch.batch_tokens, int(height) // batch.ramp_from * batch.ramp_from) // T
        rows = []
        for place in range(first, first + size):
            epoch, w = divmod(place, n_windows)
            if batch.order == "shuffled":
                w = shuffled(w, n_windows, config.seed, epoch)
            rows.append(tokens[w * T : w * T + T + 1])
        updates.append(torch.tensor(rows))
        first += size
    assert [len(windows) for windows in updates] == SIZES
    assert first >= 2 * n_windows, "to be felt, a seam of epochs has to lie within the run"
    return updates


def rate(config: RunConfig, step: int) -> float:
    """Up in a straight line to the peak, and down half a cosine."""
    peak, warmup, floor = config.optim.lr, config.schedule.warmup_steps, config.schedule.min_lr_fraction
    if step <= warmup:
        return peak * step / warmup
    way = (step - 1 - warmup) / (config.max_steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * way)) / 2)


def transformers_model(config: RunConfig) -> Any:
    """transformers' GPT-2, with the plain attention, and the weights that a run begins with."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
    unused: Any = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2Config(n_positions=shape.block_size, attn_implementation="eager", **sizes, **dropout, **unused)
    torch.set_default_dtype(torch.float64)
    try:
        ours, model = GPT(shape, seed=config.seed), GPT2LMHeadModel(theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, p in model.transformer.named_parameters():
            p.copy_(as_theirs(name, ours.get_parameter(name), shape.vocab_size))
    assert next(model.parameters()).dtype == torch.float64
    return model


def as_theirs(name: str, p: Tensor, vocab_size: int) -> Tensor:
    """Their linear layers lie the other way, their embedding has no padding."""
    if name == "wte.weight":
        return p[:vocab_size]
    return p.T if name.startswith("h.") and p.dim() == 2 else p


def loss_of(model: Any, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())


def digest_of(windows: Tensor) -> str:
    """The sum of 64 bits of BLAKE2 of each window with its place before it."""
    whole = 0
    for place, window in enumerate(windows.tolist()):
        data = b"".join(n.to_bytes(2, "little") for n in window)
        whole += int.from_bytes(hashlib.blake2b(place.to_bytes(8, "little") + data, digest_size=8).digest(), "little")
    return f"{whole % 2**64:016x}"


def plainly_trained(config: RunConfig, data: Path) -> tuple[Any, Curves]:
    """The same run in one loop: an update's gradient from all its windows at once, or in the pieces of its dropout."""
    model, curves, optim = transformers_model(config), Curves(), config.optim
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    others = [p for p in model.parameters() if not any(p is e for e in embeddings)]
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "weight_decay": optim.weight_decay},
        {"params": [p for p in others if p.dim() == 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, eps=optim.eps, foreach=False, fused=False)
    T = config.batch.seq_len
    held_out = shard_tokens(data, "val")
    val_windows = torch.tensor([held_out[w * T : w * T + T + 1] for w in range(config.evals.val_tokens // T)])

    def evaluate(step: int) -> None:
        model.eval()
        with torch.no_grad():
            curves.val_loss[step] = float(loss_of(model, val_windows))
        model.train()

    evaluate(0)
    for step, windows in enumerate(updates_of(shard_tokens(data, "train"), config), start=1):
        pieces = windows.split(config.batch.micro_batch) if config.model.dropout else [windows]
        model.zero_grad()
        losses = []
        for i, piece in enumerate(pieces):
            torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + i)
            loss = loss_of(model, piece) / len(pieces)
            loss.backward()
            losses.append(loss.detach())
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, optim.grad_clip / (norm + 1e-6))
        lr = rate(config, step)
        for group, ratio in zip(optimizer.param_groups, (optim.embedding_lr / optim.lr, 1.0, 1.0), strict=True):
            group["lr"] = lr * ratio
        optimizer.step()
        curves.loss.append(float(sum(losses)))
        curves.grad_norm.append(norm)
        curves.lr.append(lr)
        curves.data.append(digest_of(windows))
        if step % config.eval_every == 0:
            evaluate(step)
    return model, curves


def recorded(run: Path) -> Curves:
    events = list(read_events(run / "metrics.jsonl"))
    updates = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in updates] == list(range(1, 31))
    assert not any(e["skipped"] for e in updates)
    return Curves(
        [e["loss"] for e in updates],
        [e["grad_norm"] for e in updates],
        [e["lr"] for e in updates],
        [e["data"] for e in updates],
        {e["step"]: e["loss"] for e in events if e["event"] == "eval"},
    )


def assert_equal(got: Curves, expected: Curves) -> None:
    """Sums in another order differ by 1e-16 of their size, and 30 updates let that grow: 1e-9 leaves room for it."""
    assert got.data == expected.data
    assert got.lr == pytest.approx(expected.lr, rel=1e-6)  # it may have been rounded to fp32 on its way to the record
    assert got.loss == pytest.approx(expected.loss, rel=1e-9)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)
    assert got.val_loss == pytest.approx(expected.val_loss, rel=1e-9)


def assert_weights_equal(run: Path, model: Any) -> None:
    """A checkpoint holds them in fp32: rounded once, by 2**-24 of their size."""
    ours = load_file(run / "checkpoints" / "step-00000030" / "model.safetensors")
    for name, p in model.transformer.named_parameters():
        got = as_theirs(name, ours.pop(name), model.config.vocab_size).double()
        assert torch.allclose(got, p, rtol=2**-24, atol=1e-9), name
    assert not ours


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], tuple[Any, Curves]]:
    """Each run written apart is made once."""
    folder = tmp_path_factory.mktemp("reference")
    return functools.cache(lambda order, dropout: plainly_trained(recipe_for(folder, order, dropout, "ddp"), data))


@pytest.mark.parametrize(
    ("order", "dropout", "strategy", "ranks"),
    [("shuffled", 0.0, "ddp", 1), ("sequential", 0.2, "ordered", 1), ("sequential", 0.2, "ddp", 2)],
)
def test_a_run_is_the_one_written_apart(
    order: str,
    dropout: float,
    strategy: str,
    ranks: int,
    data: Path,
    reference: Callable[[str, float], tuple[Any, Curves]],
    tmp_path: Path,
    unused_port: int,
) -> None:
    config = recipe_for(tmp_path, order, dropout, strategy)
    config = dataclasses.replace(config, data=str(data), run=str(tmp_path / "run"))
    if ranks == 1:
        train_in_fp64(config)
    else:
        spawn(rank_main, args=(ranks, unused_port, config), nprocs=ranks)
    model, expected = reference(order, dropout)
    clipped = [norm > config.optim.grad_clip for norm in expected.grad_norm]
    assert 5 < sum(clipped) < 25, "to be felt, clipping has to act in some updates and not in others"
    assert_equal(recorded(tmp_path / "run"), expected)
    assert_weights_equal(tmp_path / "run", model)
