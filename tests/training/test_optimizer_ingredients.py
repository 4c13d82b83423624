"""The optimizer of a model with value embeddings and learned scalars: rates, decay, stacks, and Muon's momentum."""

import dataclasses

import pytest
import torch

from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.training.lora import LoraConfig, with_adapters
from regpt2.training.optim import muon
from regpt2.training.optimizer import MuonConfig, OptimConfig, build_optimizer, unused_options
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE = ModernConfig(n_layer=5, n_head=2, n_embd=16, block_size=8, vocab_size=57)
LONG = dataclasses.replace(SHAPE, value_embeddings=True, unet_skips=True, x0_mixing=True, mlp_only_layer=3)
RATES = OptimConfig(lr=1e-3, embedding_lr=0.3, head_lr=4e-3, value_embedding_lr=0.6, scalar_lr=0.04, weight_decay=0.2)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_value_embeddings_and_scalars_have_learning_rates_of_their_own(name: str) -> None:
    model = ModernGPT(LONG)
    groups = build_optimizer(model, dataclasses.replace(RATES, name=name)).param_groups
    rates = {id(p): (group["lr_ratio"] * RATES.lr, group["weight_decay"]) for group in groups for p in group["params"]}
    scalars = {"skips", *(f"h.{i}.mix" for i in range(5)), *(f"h.{i}.attn.value_mix" for i in (0, 1, 2, 4))}
    own = {"wte.weight": 0.3, "lm_head.weight": 4e-3} | dict.fromkeys(scalars, 0.04)
    own |= {"wve.0.weight": 0.6, "wve.1.weight": 0.6}
    assert len(rates) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        if name == "muon" and key.startswith("h.") and p.dim() == 2:
            assert rates[id(p)] == pytest.approx((MuonConfig.lr, MuonConfig.weight_decay)), key
        else:
            assert rates[id(p)] == pytest.approx((own.get(key, 1e-3), 0.2 if p.dim() == 2 else 0.0)), key


def test_muon_stacks_the_matrices_that_are_there_and_its_work_is_counted_from_them() -> None:
    optimizer = build_optimizer(ModernGPT(LONG), OptimConfig(name="muon"))
    assert isinstance(optimizer, muon.Muon)
    stacks = {tuple(shape): len(stack) for shape, stack in optimizer._stacks.items()}
    assert stacks == {(16, 16): 4 * 4, (16, 64): 5 * 2}
    products = sum(n * (4 * R * R * S + 2 * R**3) for (R, S), n in stacks.items())
    assert muon.matmul_flops(LONG, OptimConfig(), 1) == 5 * products


def test_rates_that_change_nothing_are_named() -> None:
    assert unused_options(RATES, ModernGPT(LONG)) == []
    assert unused_options(dataclasses.replace(RATES, name="muon"), ModernGPT(LONG)) == []
    values, scalars = unused_options(RATES, ModernGPT(SHAPE))
    assert (
        values == "optim.value_embedding_lr has no effect: this model has no value embeddings (model.value_embeddings)."
    )
    assert scalars.startswith("optim.scalar_lr has no effect: this model has no learned scalars")
    only_skips = ModernGPT(dataclasses.replace(SHAPE, unet_skips=True))
    assert len(unused_options(RATES, only_skips)) == 1
    head, *others = unused_options(RATES, GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=57)))
    assert "this model's head is its embedding" in head and len(others) == 2
    frozen = unused_options(RATES, with_adapters(ModernGPT(LONG), LoraConfig(rank=2), seed=1))
    assert [text.split()[0] for text in frozen] == [
        f"optim.{name}" for name in ("embedding_lr", "head_lr", "value_embedding_lr", "scalar_lr")
    ]
    assert all("frozen" in text for text in frozen)


def test_half_a_warm_up_of_momentum_is_named() -> None:
    for muon_config, text in (
        (
            MuonConfig(momentum_from=0.85),
            "optim.muon.momentum_from has no effect without optim.muon.momentum_warmup_st",
        ),
        (MuonConfig(momentum_warmup_steps=9), "optim.muon.momentum_warmup_steps has no effect without optim.muon.mome"),
    ):
        (found,) = unused_options(OptimConfig(name="muon", muon=muon_config), ModernGPT(SHAPE))
        assert found.startswith(text)
    for wrong in ({"momentum_from": 1.0}, {"momentum_from": -0.1}, {"momentum_warmup_steps": -1}):
        with pytest.raises(ConfigError, match=f"optim.muon.{next(iter(wrong))} = "):
            MuonConfig(**wrong)  # type: ignore[arg-type]


def test_momentum_rises_on_a_line_from_the_first_update_on() -> None:
    """modded-nanogpt's: min(updates made / 300, 1) of the way from 0.85 to 0.95."""
    config = MuonConfig(momentum_from=0.85, momentum_warmup_steps=300)
    for step, expected in (
        (1, 0.85),
        (2, 0.85 + 0.1 / 300),
        (151, 0.9),
        (300, 0.95 - 0.1 / 300),
        (301, 0.95),
        (9999, 0.95),
    ):
        assert config.momentum_at(step) == pytest.approx(expected, abs=1e-12)
    assert {MuonConfig().momentum_at(step) for step in (1, 2, 1000)} == {0.95}
    assert MuonConfig(momentum_from=0.99, momentum_warmup_steps=2).momentum_at(2) == pytest.approx(0.97)  # it may fall


def test_a_step_gives_muon_its_momentum_and_no_other_group() -> None:
    model = ModernGPT(LONG)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    optimizer.param_groups[1]["momentum"] = "another's"
    ids = torch.randint(0, 57, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = [(ids[:, :-1], ids[:, 1:])]
    train_step(model, optimizer, batch, lr=1e-3, momentum=0.87, grad_clip=0, world=ALONE)
    assert [group.get("momentum") for group in optimizer.param_groups][:2] == [0.87, "another's"]
    train_step(model, optimizer, batch, lr=1e-3, grad_clip=0, world=ALONE)
    assert optimizer.param_groups[0]["momentum"] == 0.87
