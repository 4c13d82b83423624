"""GPT against transformers (logits, loss, all gradients), against NumPy, and against what the paper says of it."""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from regpt2.base.errors import ConfigError
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.gpt import GPT, MLP, GPTConfig
from regpt2.model.kernels import attention, recompute

numpy_gpt2 = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "independent" / "numpy_gpt2.py")))

SHAPES = [
    GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11),
    GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64),  # no padding rows
    GPTConfig(n_layer=3, n_head=4, n_embd=48, block_size=32, vocab_size=257),
    GPTConfig(n_layer=4, n_head=2, n_embd=64, block_size=24, vocab_size=1000, vocab_multiple=1),
    GPTConfig(n_layer=2, n_head=12, n_embd=96, block_size=64, vocab_size=50257),
]
EXACT = replace(SHAPES[2], activation="gelu")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def shape_name(config: GPTConfig) -> str:
    return f"L{config.n_layer}-H{config.n_head}-C{config.n_embd}-V{config.vocab_size}-{config.activation}"


@torch.no_grad()
def random_gpt(config: GPTConfig, seed: int = 1) -> GPT:
    """Random biases and norms too, so that nothing is hidden behind a zero or a one."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(mean=1.0 if "ln" in name and name.endswith("weight") else 0.0, std=0.15, generator=generator)
    model.wte.weight[config.vocab_size :] = 0.0
    return model.eval()


@torch.no_grad()
def transformers_twin(model: GPT) -> Any:
    """transformers' model with the same weights, put in by hand: not through the code under test."""
    config = model.config
    twin: Any = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.block_size,
            vocab_size=config.vocab_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        )
    ).eval()
    theirs = dict(twin.transformer.named_parameters())
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, p in ours.items():
        if name == "wte.weight":
            theirs[name].copy_(p[: config.vocab_size])
        else:
            theirs[name].copy_(p.T if name.endswith(CONV1D) else p)
    return twin


def batch(config: GPTConfig, seed: int = 2) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (3, config.block_size + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def gradient_differences(model: GPT, twin: Any, targets: Tensor | None = None) -> dict[str, float]:
    """For every parameter, |ours - theirs| relative to the largest gradient there; their loss takes plain logits."""
    ids, next_ids = batch(model.config)
    model.zero_grad()
    model(ids, next_ids if targets is None else targets).backward()
    logits = twin(ids).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), next_ids.flatten()).backward()
    theirs = dict(twin.transformer.named_parameters())
    result = {}
    for name, p in model.named_parameters():
        got, expected = p.grad, theirs[name].grad
        assert got is not None and expected is not None
        got = got[: model.config.vocab_size] if name == "wte.weight" else got
        expected = expected.T if name.endswith(CONV1D) else expected
        result[name] = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return result


@pytest.mark.parametrize("config", [*SHAPES, EXACT], ids=shape_name)
def test_logits_and_loss_match_transformers(config: GPTConfig) -> None:
    model = random_gpt(config)
    twin = transformers_twin(model)
    ids, targets = batch(config)
    with torch.no_grad():
        got, expected = model(ids), twin(ids).logits
        # transformers shifts labels by itself; given are targets, so put one id in front that it will drop.
        labels = torch.cat([ids[:, :1], targets], dim=1)[:, : ids.shape[1]]
        their_loss = twin(ids, labels=labels).loss
        our_loss = model(ids[:, :-1], targets[:, :-1])
    assert got.shape == (*ids.shape, config.vocab_size)
    assert (got - expected).abs().max() < 1e-4
    assert abs(our_loss - their_loss) < 1e-5


# 1e-4 of the largest gradient in a tensor: fp32 sums of a few thousand terms in another order differ by about 1e-6.
@pytest.mark.parametrize("config", [*SHAPES, EXACT], ids=shape_name)
def test_all_gradients_match_transformers(config: GPTConfig) -> None:
    model = random_gpt(config)
    differences = gradient_differences(model, transformers_twin(model))
    assert len(differences) == 4 + 12 * config.n_layer
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("config", [SHAPES[2], EXACT], ids=shape_name)
def test_logits_match_numpy_from_the_papers(config: GPTConfig) -> None:
    model = random_gpt(config).double()
    weights = {
        name: (p[: config.vocab_size] if name == "wte.weight" else p).detach().numpy()
        for name, p in model.named_parameters()
    }
    ids, _ = batch(config)
    with torch.no_grad():
        got = model(ids).numpy()
    for row, logits in zip(ids.tolist(), got, strict=True):
        expected = numpy_gpt2.logits(weights, config.n_layer, config.n_head, row, config.activation)
        assert np.abs(logits - expected).max() < 1e-9


def test_loss_at_the_start_is_near_ln_vocabulary() -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64)
    with torch.no_grad():
        loss = GPT(config, seed=3)(*batch(config))
    assert abs(float(loss) - math.log(50257)) < 0.05


def residual_scaling_is_right(model: GPT) -> bool:
    """Every std within 5 % of GPT-2's; at 64 x 64 numbers and more a sample's std is within 2 %."""
    depth_std = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, p in tensors_of(model).items():
        if p.dim() == 2:
            expected = depth_std if name.endswith("c_proj.weight") else 0.02
            if abs(float(p.std()) / expected - 1) > 0.05 or abs(float(p.mean())) > 0.1 * expected:
                return False
        elif not torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)):
            return False
    return True


def test_initialization_is_gpt2s() -> None:
    config = GPTConfig(n_layer=6, n_head=2, n_embd=64, block_size=64, vocab_size=257)
    model = GPT(config, seed=4)
    assert residual_scaling_is_right(model)
    assert not model.wte.weight[257:].any()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), GPT(config, seed=4).parameters(), strict=True))
    assert not torch.equal(model.wpe.weight, GPT(config, seed=5).wpe.weight)


def test_tied_head_gets_gradient_from_both_ends() -> None:
    """Even a token that is neither input nor target has a gradient, by the head; and the head has no weights."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11)
    model = random_gpt(config)
    ids = torch.tensor([[1, 2, 3]])
    model(ids, torch.tensor([[4, 5, 6]])).backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad[:11].abs().sum(dim=1).gt(0).all()
    assert len([name for name, _ in model.named_parameters() if "head" in name]) == 0


def test_no_token_sees_a_later_one() -> None:
    config = SHAPES[2]
    model = random_gpt(config)
    ids, _ = batch(config)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % config.vocab_size
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :20], b[:, :20])
    assert not torch.equal(a[:, 20:], b[:, 20:])


def test_dropout_acts_in_training_only() -> None:
    model = random_gpt(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64, dropout=0.3))
    ids, _ = batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "model.n_layer = 0 must be at least 1."),
        ({"n_embd": 770}, "model.n_embd = 770 must be a multiple of model.n_head = 12; the nearest is 768."),
        ({"dropout": 1.0}, "model.dropout = 1.0 must be at least 0 and below 1."),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        GPTConfig(**fields)


def test_more_tokens_than_positions_are_refused() -> None:
    model = GPT(SHAPES[0])
    with pytest.raises(ValueError, match="9 tokens do not fit into block_size = 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


# Planted bugs: each makes the comparison above fail by far.


def test_planted_off_by_one_targets_are_caught() -> None:
    model = random_gpt(SHAPES[2])
    ids, _ = batch(model.config)
    differences = gradient_differences(model, transformers_twin(model), targets=ids)  # the inputs as targets
    assert max(differences.values()) > 0.1


def test_planted_untied_head_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head uses a copy of wte: logits and loss are still right, but the gradient is not."""

    def untied(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        logits = nn.functional.linear(self.hidden(ids), self.wte.weight.detach())[..., : self.config.vocab_size]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = random_gpt(SHAPES[2])
    twin = transformers_twin(model)
    monkeypatch.setattr(GPT, "forward", untied)
    assert gradient_differences(model, twin)["wte.weight"] > 0.1


def test_planted_missing_residual_scaling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.model.gpt.math", SimpleNamespace(sqrt=lambda _: 1.0))
    assert not residual_scaling_is_right(GPT(GPTConfig(n_layer=6, n_head=2, n_embd=64, block_size=64, vocab_size=257)))


def test_planted_exact_gelu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The erf form in place of the tanh form moves logits by about 1e-3: the tolerance must be below that."""
    model = random_gpt(SHAPES[3])
    twin = transformers_twin(model)
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(nn.functional.gelu(self.c_fc(x))))
    ids, _ = batch(model.config)
    with torch.no_grad():
        assert (model(ids) - twin(ids).logits).abs().max() > 1e-4


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiler_gets_one_graph_with_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its code generator, whose work differs by device: what it is given, forward and backward."""
    monkeypatch.setattr(attention, "_BLOCK", 4)
    monkeypatch.setattr(recompute, "_WORTH", 1)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        model = random_gpt(SHAPES[0])
        loss = wrap(model)(*batch(SHAPES[0]), dtype=torch.bfloat16)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-6)
