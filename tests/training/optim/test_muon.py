"""Muon against torch's own and against the SVD; Q, K, V apart; ranks that share the work; AdamW for the rest."""

import importlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rank_processes import spawn
from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optim import muon
from regpt2.training.optimizer import MuonConfig, OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import ParallelConfig, make_trainable, whole
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPES = {"h.0.square": (8, 8), "h.0.tall": (32, 8), "h.0.wide": (8, 32), "h.1.square": (8, 8), "h.1.wide": (8, 32)}
A, B, C = MuonConfig.ns_coefficients


def random_matrix(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    found = {
        f"{name}.weight": random_matrix(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
    }
    return {**found, "ln_f.weight": torch.ones(8, dtype=dtype)}


def give_gradients(named: dict[str, Tensor], step: int) -> None:
    for i, p in enumerate(named.values()):
        p.grad = random_matrix(*p.shape, seed=1000 * step + i, dtype=p.dtype)


def build(named: dict[str, Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    return muon.build(list(named.items()), config, ALONE, False)


# The iteration multiplies small singular values, and rounding with them, by up to 3.4445 a step: 3.4445**5 = 485. In
# ten updates of lr 0.02 that makes 485 * 0.2 = 100 roundings of 1e-16 or 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_updates_are_those_of_torchs_muon(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, weight_decay: float, nesterov: bool
) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())  # torch's rounds here: keep all digits
    named, theirs = parameters(dtype), parameters(dtype)
    config = MuonConfig(lr=0.02, weight_decay=weight_decay, nesterov=nesterov)
    ours = build(named, OptimConfig(muon=config))
    matrices = [p for name, p in theirs.items() if name.startswith("h.")]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=weight_decay, momentum=0.95, nesterov=nesterov)
    for step in range(10):
        give_gradients(named, step)
        give_gradients(theirs, step)
        ours.step()
        reference.step()
        for name in SHAPES:
            difference = (named[f"{name}.weight"] - theirs[f"{name}.weight"]).abs().max()
            assert difference < tolerance, f"{name}, update {step}"


def test_what_is_in_no_block_and_every_vector_is_adamws_to_the_bit() -> None:
    config = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-10, embedding_lr=0.3)
    model, other = (GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=57), seed=1) for _ in "ab")
    ours = build_optimizer(model, config)
    by_name = dict(other.named_parameters())
    groups = [
        {"params": [by_name[name] for name in ("wte.weight", "wpe.weight")], "lr": 0.3, "weight_decay": 0.1},
        {"params": [p for p in by_name.values() if p.dim() < 2], "lr": 1e-2, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    for step in range(3):
        give_gradients(dict(model.named_parameters()), step)
        give_gradients(by_name, step)
        ours.step()
        reference.step()
    for name, p in model.named_parameters():
        in_a_block = name.startswith("h.") and p.dim() == 2
        assert torch.equal(p, by_name[name]) != in_a_block, name


def iterated(s: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    return s


# fp64: 485 roundings of 1e-16; bf16: of 2**-9, but most of them at singular values near 1, where the slope is small
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (1, 8)])
def test_the_iteration_makes_its_polynomial_of_each_singular_value(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    stack = random_matrix(3, *shape, seed=0)
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    expected = u @ torch.diag_embed(iterated(s / s.norm(dim=1, keepdim=True), 5)) @ vh
    got = muon.newton_schulz(stack.to(dtype), 5, (A, B, C))
    assert got.dtype == dtype
    assert (got - expected).abs().max() < tolerance


def test_five_steps_come_as_near_to_the_polar_factor_as_the_coefficients_allow() -> None:
    """p(s) = a s + b s^3 + c s^5 has its hill and its valley where p'(s) = a + 3 b s^2 + 5 c s^4 is 0.

    What is between p(valley) and p(hill) stays there. Below, p is above a s / 2 up to s = 0.48, so a singular value of
    0.48 / 1.72^4 = 0.06 of the norm needs four steps at the very most to get there.
    """
    root = math.sqrt(9 * B * B - 20 * A * C)
    hill, valley = (math.sqrt((-3 * B - sign * root) / (10 * C)) for sign in (1, -1))
    low, high = (A * s + B * s**3 + C * s**5 for s in (valley, hill))
    assert (low, high) == (pytest.approx(0.682, abs=1e-3), pytest.approx(1.202, abs=1e-3))
    matrix = random_matrix(1, 24, 96, seed=1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (s / s.norm(dim=1)).min() > 0.06
    got = muon.newton_schulz(matrix, 5, (A, B, C))
    left = torch.linalg.svdvals(got)
    assert low < left.min() and left.max() < high
    assert torch.linalg.matrix_norm(got - u @ vh, 2).max() <= max(1 - low, high - 1)
    exact = muon.newton_schulz(matrix, 12, (2.0, -1.5, 0.5))  # p(1) = 1, p'(1) = 0: these go all the way
    assert torch.linalg.matrix_norm(exact - u @ vh, 2).max() < 1e-9


def test_a_matrix_without_a_gradient_stays_where_it_is() -> None:
    """Zero-initialised projections give such ones in the first update."""
    named = parameters(torch.float32)
    before = {name: p.clone() for name, p in named.items()}
    optimizer = build(named, OptimConfig(muon=MuonConfig(weight_decay=0.0)))
    give_gradients(named, 0)
    named["h.0.tall.weight"].grad = torch.zeros(32, 8)
    optimizer.step()
    assert [name for name, p in named.items() if torch.equal(p, before[name])] == ["h.0.tall.weight"]


def test_queries_keys_and_values_are_three_matrices() -> None:
    fused = parameters(torch.float64, {"h.0.attn.c_attn": (24, 8), "h.0.attn.c_proj": (8, 8)})
    apart = parameters(torch.float64, {"h.0.q": (8, 8), "h.0.k": (8, 8), "h.0.v": (8, 8), "h.0.attn.c_proj": (8, 8)})
    one_piece = parameters(torch.float64, {"h.0.not_split": (24, 8), "h.0.attn.c_proj": (8, 8)})
    name = "h.0.attn.c_attn.weight"
    for p, rows in zip(list(apart.values())[:3], fused[name].chunk(3), strict=True):
        p.copy_(rows)
    optimizers = [build(named, OptimConfig()) for named in (fused, apart, one_piece)]
    for step in range(3):
        for named in (fused, one_piece):
            give_gradients(named, step)
        for p, rows in zip(list(apart.values())[:3], fused[name].grad.chunk(3), strict=True):
            p.grad = rows.clone()
        apart["h.0.attn.c_proj.weight"].grad = fused["h.0.attn.c_proj.weight"].grad
        apart["ln_f.weight"].grad = fused["ln_f.weight"].grad
        for optimizer in optimizers:
            optimizer.step()
    joined = torch.cat(list(apart.values())[:3])
    assert torch.allclose(fused[name], joined, atol=1e-13, rtol=0)
    assert not torch.allclose(fused[name], one_piece["h.0.not_split.weight"], atol=1e-3)


def test_matrices_of_one_shape_go_through_as_one_stack() -> None:
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=57))
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, muon.Muon)
    sizes = {tuple(shape): len(stack) for shape, stack in optimizer._stacks.items()}
    assert sizes == {(16, 16): 3 * 4, (16, 64): 3 * 2}  # q, k, v, c_proj; c_fc and mlp.c_proj


def test_the_schedule_moves_all_learning_rates_alike() -> None:
    config = OptimConfig(name="muon", lr=0.01, embedding_lr=0.7, muon=MuonConfig(lr=0.025))
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=57))
    optimizer = build_optimizer(model, config)
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(0))
    train_step(model, optimizer, [(ids[:, :-1], ids[:, 1:])], lr=0.005, grad_clip=0, world=ALONE)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0125, 0.35, 0.005])


SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=57)


def train_a_little(world: World, name: str, strategy: str) -> tuple[dict[str, Tensor], list[int]]:
    """Weights after three updates on the same data for any number of ranks; sizes of the stacks that came through."""
    model = GPT(SHAPE, seed=3).double() if strategy == "ddp" else GPT(SHAPE, seed=3)
    dtype = next(model.parameters()).dtype
    parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    trainable = make_trainable(model, dtype, world, parallel, compiled=False)
    ordered = strategy == "ordered"
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-2), world, ordered=ordered)
    sizes: list[int] = []
    if isinstance(optimizer, muon.Muon):
        optimizer._orthogonalize = lambda stack, *how: sizes.append(len(stack)) or muon.newton_schulz(stack, *how)
    torch.set_num_threads(1)  # the same kernels in every process
    for step in range(3):
        ids = torch.randint(0, 57, (12, 9), generator=torch.Generator().manual_seed(step)).chunk(world.size)[world.rank]
        batches = [(row[None, :-1], row[None, 1:]) for row in ids]
        train_step(trainable, optimizer, batches, lr=1e-2, grad_clip=1.0, world=world, ordered=ordered)
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}, sizes


WAYS = [("muon", "ddp"), ("muon", "ordered"), ("lion", "fsdp")]
# Sums in another order, fp64; ordered sums are the same to the bit; fp32, where no sign turns.
TOLERANCE = {"muon ddp": 1e-12, "muon ordered": 0.0, "lion fsdp": 1e-7}


def rank_main(rank: int, size: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
    found = {" ".join(way): train_a_little(world, *way) for way in WAYS}
    refused = ""
    try:
        train_a_little(world, "muon", "fsdp")
    except ConfigError as error:
        refused = str(error)
    torch.save((found, refused), f"{out}/{rank}.pt")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_three_ranks_that_share_the_work_make_the_update_of_one(tmp_path: object, unused_port: int) -> None:
    """Shares of 3 and 2 out of 8 and 4 matrices: the last ones are padded."""
    spawn(rank_main, args=(3, unused_port, str(tmp_path)), nprocs=3)
    results = [torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in range(3)]
    assert all("'fsdp' cuts them" in refused for _, refused in results)
    for way, tolerance in TOLERANCE.items():
        expected, stacks_alone = train_a_little(ALONE, *way.split())
        assert stacks_alone == ([8, 4] * 3 if "muon" in way else [])
        for found, _ in results:
            weights, stacks = found[way]
            assert stacks == ([3, 2] * 3 if way == "muon ddp" else stacks_alone)
            for name, p in weights.items():
                assert torch.equal(p, results[0][0][way][0][name]), f"{way}: {name} differs between ranks"
                if way == "lion fsdp" and name.endswith("c_attn.bias"):
                    continue  # the gradient of a key's bias is rounding alone, and its sign is chance
                assert torch.allclose(p, expected[name], atol=tolerance, rtol=0), f"{way}: {name}"


def test_the_benchmark_measures_every_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--quick", "--calls", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["optimizer_step.py", *options])
    importlib.import_module("optimizer_step").main()
    found = json.loads(out.read_text())
    assert [row["update"] for row in found["updates"]] == ["AdamW", "Muon", "torch.optim.Muon and AdamW"]
    exact = [row for row in found["iterations"] if row["a, b, c"] == "2.0, -1.5, 0.5" and row["type"] == "float32"]
    assert all(row["off"] < 1e-3 and row["smallest"] == row["largest"] == 1.0 for row in exact)
