"""Dropout: at the four places where transformers' GPT-2 has it, by its masks; new masks for each micro-batch.

tests/model/test_ingredients.py has the three places of the modern model.
"""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import TINY_RECIPE, write_tokens
from regpt2.config.recipe_files import load_recipe
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels import attention
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernGPT
from regpt2.run.loop import train

P = 0.3
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=64, dropout=P)


def their_model(ours: GPT) -> Any:
    """transformers' model in fp64 with our weights: their linear layers lie the other way."""
    shape = ours.config
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "vocab_size": shape.vocab_size}
    dropout = {"embd_pdrop": P, "attn_pdrop": P, "resid_pdrop": P}
    unused: Any = {"bos_token_id": None, "eos_token_id": None}
    model: Any = GPT2LMHeadModel(
        GPT2Config(n_positions=shape.block_size, attn_implementation="eager", **sizes, **dropout, **unused)
    ).double()
    with torch.no_grad():
        for name, p in model.transformer.named_parameters():
            p.copy_(turned(name, ours.get_parameter(name)))
    return model


def turned(name: str, p: Tensor) -> Tensor:
    return p.T if name.startswith("h.") and p.dim() == 2 else p


@pytest.mark.parametrize("training", [True, False])
def test_loss_and_all_gradients_are_those_of_transformers_with_the_same_random_numbers(training: bool) -> None:
    """Embedding, attention, its projection, MLP: one mask too few, or in another order, moves every number after it."""
    ours = GPT(SHAPE, seed=3).double().train(training)
    theirs = their_model(ours).train(training)
    ids = torch.randint(0, SHAPE.vocab_size, (3, SHAPE.block_size + 1), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    loss = ours(ids[:, :-1], ids[:, 1:])
    loss.backward()
    torch.manual_seed(5)
    expected = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in theirs.transformer.named_parameters():
        assert torch.allclose(turned(name, ours.get_parameter(name).grad), p.grad, rtol=0, atol=1e-12), name
    plain = GPT(dataclasses.replace(SHAPE, dropout=0.0), seed=3).double()(ids[:, :-1], ids[:, 1:]).item()
    assert (loss.item() == pytest.approx(plain, rel=1e-6)) != training


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(256, torch.float32), (8, torch.bfloat16), (8, torch.float32)],
    ids=["one block", "several blocks", "by torch"],
)
def test_attention_drops_weights_at_the_rate_and_scales_the_others(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the identity for values what comes out are the weights themselves."""
    monkeypatch.setattr(attention, "_BLOCK", block)
    T = 32
    q, k = torch.randn(2, 2, 3, T, T, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.eye(T, dtype=dtype).expand(2, 3, T, T)
    whole = causal_attention(q, k, values)
    torch.manual_seed(1)
    first, second = (causal_attention(q, k, values, dropout_p=P) for _ in range(2))
    seen = torch.ones(T, T).tril().bool().expand_as(whole) & (whole > 1e-6)
    kept = first[seen] != 0
    rate = 1 - kept.float().mean().item()
    assert abs(rate - P) < 5 * (P * (1 - P) / kept.numel()) ** 0.5  # five standard deviations of so many draws
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5  # bf16 has 8 bits, and rounds twice
    assert torch.allclose(first[seen][kept], whole[seen][kept] / (1 - P), rtol=tolerance)
    assert not first[~torch.ones(T, T).tril().bool().expand_as(first)].any()
    # Masks of heads, of sequences and of calls have nothing to do with each other: they agree as often as chance.
    by_chance = P**2 + (1 - P) ** 2
    for a, b in ((first[0, 0], first[0, 1]), (first[0, 0], first[1, 0]), (first[0, 0], second[0, 0])):
        both = (whole.amin(dim=(0, 1)) > 1e-6) & torch.ones(T, T).tril().bool()
        assert abs(((a != 0) == (b != 0))[both].float().mean().item() - by_chance) < 0.15


@pytest.mark.parametrize("Model", [GPT, ModernGPT])
def test_every_micro_batch_of_every_update_has_masks_of_its_own_and_after_a_resume_the_same(
    Model: type[LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All windows are alike and no weight moves, so losses differ by their masks alone."""
    alike = np.full(1000, 97, dtype=np.uint16)
    data = write_tokens(tmp_path / "data", [alike], alike)
    recipe = tmp_path / "tiny.toml"
    text = TINY_RECIPE.replace("lr = 3e-3", "lr = 1e-30").replace("save_every = 4", "save_every = 2")
    if Model is ModernGPT:  # a head of zeros would hide the masks
        text = text.replace("dropout = 0.1", 'dropout = 0.1\narchitecture = "modern"\nzero_init = false')
    recipe.write_text(text)
    losses: list[float] = []
    forward = Model.forward

    def noting(self: LanguageModel, *arguments: Any, **named: Any) -> Tensor:
        loss = forward(self, *arguments, **named)
        if loss.requires_grad:
            losses.append(loss.item())
        return loss

    def run(folder: str, max_steps: int) -> list[float]:
        losses.clear()
        config = load_recipe(str(recipe))
        train(dataclasses.replace(config, data=str(data), run=str(tmp_path / folder), max_steps=max_steps))
        return losses[1:]  # the first is thrown away: the rehearsal

    monkeypatch.setattr(Model, "forward", noting)
    monkeypatch.setattr("regpt2.run.ending.write_report", lambda run: run)
    straight = run("straight", 4)
    assert len(straight) == 4 * 4, "four micro-batches in each of four updates"
    apart = sorted(straight)
    assert min(b - a for a, b in pairwise(apart)) > 1e-6
    assert run("stopped", 2) + run("stopped", 4) == straight
