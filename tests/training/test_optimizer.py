"""The optimizer: decay groups, state by name and back, and every entry of the shelf keeps the contract."""

import pytest
import torch

from regpt2.base import plugins
from regpt2.base.errors import CheckpointError, ConfigError, UsageError
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer, load_state_tensors, state_tensors

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


@pytest.mark.parametrize("name", plugins.entries("training.optim"))
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


@pytest.mark.parametrize("name", plugins.entries("training.optim"))
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
    with pytest.raises(CheckpointError, match="of another model"):
        load_state_tensors(build_optimizer(model, OptimConfig()), model, state_tensors(optimizer, larger))
    state = state_tensors(optimizer, larger)
    state["wte.weight/exp_avg"] = state["wte.weight/exp_avg"][:3]
    with pytest.raises(CheckpointError, match=r"wte.weight/exp_avg' is \(3, 16\), expected"):
        load_state_tensors(build_optimizer(larger, OptimConfig()), larger, state)


def test_impossible_options_are_refused() -> None:
    for wrong in ({"lr": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"lr": float("nan")}):
        with pytest.raises(ConfigError):
            OptimConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no 'adam'; did you mean 'adamw'"):
        OptimConfig(name="adam")
