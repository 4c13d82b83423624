"""The optimizer: groups, state by name and back, options; and every entry of the shelf keeps the contract."""

import copy

import pytest
import torch

from regpt2.base import shelves
from regpt2.base.errors import CheckpointError, ConfigError, UsageError
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import (
    AdamW,
    MuonConfig,
    OptimConfig,
    build_optimizer,
    load_state_tensors,
    state_tensors,
    unused_options,
)
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=57)


def one_update(model: GPT, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(SHAPE)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.1 if p.dim() == 2 else 0.0), name


def test_adamw_without_learning_rates_of_its_own_is_torchs_with_two_groups() -> None:
    """The order of parameters counts: the norm of the whole gradient is summed in it, and clips."""
    model, other = GPT(SHAPE, seed=1), GPT(SHAPE, seed=1)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    groups = [
        {"params": [p for p in other.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(0))
    for step in range(1, 6):
        ours = train_step(model, optimizer, [(ids[:, :-1], ids[:, 1:])], lr=1e-3 / step, grad_clip=0.1, world=ALONE)
        theirs = train_step(other, reference, [(ids[:, :-1], ids[:, 1:])], lr=1e-3 / step, grad_clip=0.1, world=ALONE)
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("fused", "found_inf"), [(True, None), (True, 0.0), (True, 1.0), (False, None)])
def test_an_update_that_no_compiler_wraps_is_that_of_torch_to_the_bit(fused: bool, found_inf: float | None) -> None:
    shapes, options = ((3, 5), (7,)), {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": fused}
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    pair: tuple[torch.optim.Optimizer, ...] = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in pair:
            if found_inf is not None and step >= 10:
                optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
            optimizer.step()
    one, two = (optimizer.state_dict() for optimizer in pair)
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys() == {0, 1}
    for mine, other in zip(one["state"].values(), two["state"].values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[kind], other[kind]) for kind in mine)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    pair[0].zero_grad()
    assert all(p.grad is None for p in ours)


def test_embeddings_and_head_have_learning_rates_of_their_own() -> None:
    model = GPT(SHAPE)
    model.lm_head = torch.nn.Linear(16, 64, bias=False)
    config = OptimConfig(lr=1e-3, embedding_lr=0.3, head_lr=4e-3)
    rates = {id(p): group["lr"] for group in build_optimizer(model, config).param_groups for p in group["params"]}
    own = {"wte.weight": 0.3, "wpe.weight": 0.3, "lm_head.weight": 4e-3}
    for name, p in model.named_parameters():
        assert rates[id(p)] == own.get(name, 1e-3), name


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_update_leaves_weights_and_state_as_they_were(name: str, first: bool) -> None:
    model = GPT(SHAPE, seed=1)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-2))
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(0))

    def update(spike_limit: float = float("inf")) -> bool:
        batches = [(ids[:, :-1], ids[:, 1:])]
        limit = torch.tensor(spike_limit)
        stats = train_step(model, optimizer, batches, lr=1e-2, grad_clip=1.0, world=ALONE, spike_limit=limit)
        return bool(stats.accepted)

    if not first:
        assert update()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(state_tensors(optimizer, model))
    handle = model.h[1].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert not update()
    handle.remove()
    assert not update(spike_limit=0.1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    for key, value in state_tensors(optimizer, model).items():
        assert torch.equal(value, state.get(key, torch.zeros_like(value))), key
    assert update()


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
def test_an_optimizer_goes_on_bit_for_bit_from_its_saved_state(name: str) -> None:
    config = OptimConfig(name=name, lr=1e-2)
    straight = GPT(SHAPE, seed=1)
    optimizer = build_optimizer(straight, config)
    for step in range(3):
        one_update(straight, optimizer, step)
    resumed = GPT(SHAPE, seed=2)
    resumed.load_state_dict(straight.state_dict())
    other = build_optimizer(resumed, config)
    load_state_tensors(other, resumed, {k: v.clone() for k, v in state_tensors(optimizer, straight).items()})
    for step in range(3, 6):
        one_update(straight, optimizer, step)
        one_update(resumed, other, step)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
def test_an_optimizer_learns(name: str) -> None:
    model = GPT(SHAPE, seed=1)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-2))
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids[:, :-1], ids[:, 1:]).item()
    for _ in range(30):
        one_update(model, optimizer, 0)
    assert model(ids[:, :-1], ids[:, 1:]).item() < 0.5 * before


def test_state_of_another_model_is_refused() -> None:
    model, larger = GPT(SHAPE), GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=57))
    optimizer = build_optimizer(larger, OptimConfig())
    one_update(larger, optimizer, 0)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_state_tensors(build_optimizer(model, OptimConfig()), model, state_tensors(optimizer, larger))
    state = state_tensors(optimizer, larger)
    state["wte.weight/exp_avg"] = state["wte.weight/exp_avg"][:3]
    with pytest.raises(CheckpointError, match=r"wte.weight/exp_avg' is \(3, 16\), expected"):
        load_state_tensors(build_optimizer(larger, OptimConfig()), larger, state)


def test_impossible_options_are_refused() -> None:
    for wrong in ({"lr": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"lr": float("nan")}, {"head_lr": -1.0}):
        with pytest.raises(ConfigError):
            OptimConfig(**wrong)  # type: ignore[arg-type]
    nan = float("nan")
    for wrong in (
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"ns_steps": 0},
        {"ns_coefficients": (nan,) * 3},
    ):
        with pytest.raises(ConfigError, match=r"optim\.muon\."):
            MuonConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no 'adam'; did you mean 'adamw'"):
        OptimConfig(name="adam")


def test_options_that_change_nothing_are_named() -> None:
    config = OptimConfig(name="lion", eps=1e-10, head_lr=0.1, muon=MuonConfig(lr=0.1))
    eps, muon, head = unused_options(config, GPT(SHAPE))
    assert eps == "optim.eps has no effect with optim.name = 'lion'."
    assert muon == "optim.muon has no effect with optim.name = 'lion'."
    assert "this model's head is its embedding" in head
    for name in shelves.entries("training.optim"):
        assert unused_options(OptimConfig(name=name), GPT(SHAPE)) == []
    assert unused_options(OptimConfig(name="muon", eps=1e-10, muon=MuonConfig(lr=0.1)), GPT(SHAPE)) == []
