"""Every option of an optimizer reaches it: another value makes another update, unless the entry ignores it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from regpt2.base import shelves
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import MuonConfig, OptimConfig, build_optimizer
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=57)
LR = 1e-2
OPTIONS: list[tuple[str, Any]] = [
    ("lr", 2 * LR),  # as what the ratios of the others are of
    ("embedding_lr", 0.3),
    ("weight_decay", 0.7),
    ("betas", (0.5, 0.95)),
    ("betas", (0.9, 0.5)),
    ("eps", 1e-2),
    ("muon", MuonConfig(lr=0.5)),
    ("muon", MuonConfig(weight_decay=0.7)),
    ("muon", MuonConfig(momentum=0.3)),  # test_optimizer_ingredients.py has how it may rise
    ("muon", MuonConfig(nesterov=False)),
    ("muon", MuonConfig(ns_steps=2)),
    ("muon", MuonConfig(ns_coefficients=(2.0, -1.5, 0.5))),
]


def weights_after_three_updates(config: OptimConfig) -> dict[str, Tensor]:
    model = GPT(SHAPE, seed=1)
    optimizer = build_optimizer(model, config)
    ids = torch.randint(0, 57, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    for batch in ids:
        train_step(model, optimizer, [(batch[:, :-1], batch[:, 1:])], lr=LR, grad_clip=1.0, world=ALONE)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
@pytest.mark.parametrize(("option", "value"), OPTIONS, ids=str)
def test_an_option_changes_the_update_unless_it_is_ignored(name: str, option: str, value: Any) -> None:
    base = OptimConfig(name=name, lr=LR, embedding_lr=LR / 2)
    before = weights_after_three_updates(base)
    after = weights_after_three_updates(dataclasses.replace(base, **{option: value}))
    moved = [key for key, p in before.items() if not torch.equal(p, after[key])]
    assert bool(moved) == (option not in shelves.load("training.optim", name).IGNORES)
    if option == "embedding_lr":
        assert {"wte.weight", "wpe.weight"} <= set(moved)


def test_no_option_is_forgotten_here() -> None:
    """But those that are no optimizer's (its name, clipping, an average), and the rates of what GPT-2 has not."""
    elsewhere = {"name", "grad_clip", "ema", "head_lr", "value_embedding_lr", "scalar_lr"}
    assert {option for option, _ in OPTIONS} | elsewhere == {field.name for field in dataclasses.fields(OptimConfig)}
