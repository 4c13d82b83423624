"""Packed and int8 matrices: rounding within its bound, the blocks wired as GPT's, every step's logits."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gpt import random_gpt
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.sampling.generate import generate
from regpt2.sampling.kv_cache import KVCache
from regpt2.sampling.twins.cpu import (
    Int8Linear,
    Layout,
    PackedGPT,
    PackedLinear,
    TransposedLinear,
    in_int8,
    packed_if_faster,
)

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257, dropout=0.3)
EXACT = replace(CONFIG, activation="gelu")  # with these weights its logits are 1e-3 to 1e-2 off those of the tanh form
either_gelu = pytest.mark.parametrize("config", [CONFIG, EXACT], ids=["tanh", "exact"])

needs_int8 = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no int8 instructions")


class ExactLinear:
    """nn.Linear: with it PackedGPT must be GPT."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_ids(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def logits_step_by_step(model: GPT, ids: Tensor, n_prompt: int) -> Tensor:
    """(B, T, V): those of the prompt at once, then one token at a time."""
    B, T = ids.shape
    cache = KVCache(model.config, B, T, device=torch.device("cpu"), dtype=torch.float32)
    found = []
    for start, end in zip([0, *range(n_prompt, T)], range(n_prompt, T + 1), strict=True):
        found.append(model.head(model.hidden(ids[:, start:end], cache.layers, position=start)))
        cache.advance(end - start)
    return torch.cat(found, dim=1)


@needs_int8
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 64, 192), (3, 96, 64), (8, 768, 3072), (40, 3072, 768)])
def test_int8_products_stay_within_the_bound_of_their_rounding(rows: int, n_in: int, n_out: int) -> None:
    """Weights err by half a step of their row, activations by half of theirs: both, times what they multiply."""
    x, w, b = normal(rows, n_in), normal(n_out, n_in, seed=1), normal(n_out, seed=2)
    x *= torch.logspace(-3, 3, rows).view(-1, 1)  # rows of very different size
    x[:, 5] *= 30  # and an outlier in each, as GPT-2 has them
    w *= torch.logspace(-3, 1, n_out).view(-1, 1)
    found = Int8Linear(w, b)(x)
    exact = F.linear(x.double(), w.double(), b.double())
    x_half, w_half = (z.abs().amax(1, keepdim=True).double() / 254 for z in (x, w))
    x_sum, w_sum = (z.double().abs().sum(1, keepdim=True) for z in (x, w))
    bound = x_sum * w_half.T + x_half * w_sum.T + n_in * x_half * w_half.T
    bound += 2**-20 * (x.double().abs() @ w.double().abs().T + b.double().abs())  # fp32 around the integers
    assert found.dtype == torch.float32
    assert ((found.double() - exact).abs() <= bound).all()


@needs_int8
def test_int8_sums_are_exact_at_their_largest() -> None:
    """All products 127 x 127: sums of pairs in 16 bits, as older instructions make them, would saturate."""
    x, w = torch.ones(2, 3072), torch.ones(64, 3072)
    x[1], w[::2] = -1, -1
    assert torch.equal(Int8Linear(w)(x), x @ w.T)


@needs_int8
def test_a_row_does_not_depend_on_its_neighbors_and_zero_is_exact() -> None:
    x, linear = normal(5, 64), Int8Linear(normal(128, 64), normal(128, seed=1))
    x[2] = 0
    together = linear(x)
    for row in range(5):
        assert torch.equal(linear(x[row : row + 1]), together[row : row + 1])
    assert torch.equal(together[2], linear.bias)


@either_gelu
@pytest.mark.parametrize(("batch", "n_prompt"), [(1, 1), (1, 40), (3, 17)])
def test_every_step_of_the_packed_blocks_is_that_of_gpt_without_a_cache(
    config: GPTConfig, batch: int, n_prompt: int
) -> None:
    model, ids = random_gpt(config).eval(), some_ids(batch, 64)
    found = logits_step_by_step(PackedGPT(model, ExactLinear), ids, n_prompt)  # type: ignore[arg-type]
    with torch.no_grad():
        assert (found - model(ids)).abs().max() < 1e-4  # fp32: 2**-24 a rounding, logits of some 10


@either_gelu
@pytest.mark.parametrize("batch", [1, 8])
def test_transposed_matrices_in_fp32_give_the_logits_of_gpt(config: GPTConfig, batch: int) -> None:
    model, ids = random_gpt(config).eval(), some_ids(batch, 64)
    found = logits_step_by_step(packed_if_faster(model, 100, rows=batch), ids, 17)  # type: ignore[arg-type]
    with torch.no_grad():
        assert (found - model(ids)).abs().max() < 1e-4  # fp32: 2**-24 a rounding, logits of some 10


def bf16_twin(model: GPT) -> GPT:
    twin = packed_if_faster(model.bfloat16(), 100, rows=1)
    if not isinstance(twin, PackedGPT):
        pytest.skip("this processor or torch packs no bf16 matrices")
    return twin


# Roundings are 2**-9 of a value in bf16, up to 1/254 of the largest of a row in int8, independent, some ten in a row.
@pytest.mark.parametrize(("twin_of", "share"), [(bf16_twin, 0.015), pytest.param(in_int8, 0.03, marks=needs_int8)])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_step_of_a_rounded_twin_is_near_fp32(twin_of: Callable[[GPT], GPT], share: float, batch: int) -> None:
    model, ids = random_gpt(CONFIG).eval(), some_ids(batch, 64)
    with torch.no_grad():
        exact = model(ids)
    found = logits_step_by_step(twin_of(model), ids, 17).float()
    error = (found - exact).square().mean(dim=(0, 2)).sqrt() / exact.std()  # (T,)
    assert found.shape == exact.shape
    assert error.mean() < share
    assert error.max() < 2 * share


@pytest.mark.parametrize("layout", [TransposedLinear, pytest.param(Int8Linear, marks=needs_int8)])
def test_a_twin_computes_the_models_own_gelu(layout: Layout) -> None:
    """At a value where the forms differ, -0.0455 or -0.0454: in logits the roundings of int8 would hide it."""
    x, seen = torch.full((1, 64), -2.0), []
    for config, expected in ((CONFIG, F.gelu(x, approximate="tanh")), (EXACT, F.gelu(x))):
        block: Any = PackedGPT(random_gpt(config), layout).h[0]
        block.attn_proj = block.c_fc = lambda _: x
        block.mlp_proj = lambda y: seen.append(y) or y
        block(torch.zeros(1, 1, 64))
        assert torch.equal(seen[-1], expected)


@either_gelu
def test_greedy_generation_takes_the_likeliest_tokens_of_gpt(config: GPTConfig) -> None:
    """60 tokens: enough for the packed twin."""
    model, ids = random_gpt(config).eval(), some_ids(1, 4)
    found = generate(model, ids, 60, temperature=0)
    with torch.no_grad():
        assert torch.equal(found[:, 4:], model(found[:, :-1]).argmax(-1)[:, 3:])


@needs_int8
def test_an_int8_model_generates_and_the_fp32_one_is_left_alone() -> None:
    model, ids = random_gpt(CONFIG), some_ids(2, 9)
    before, expected = [p.clone() for p in model.parameters()], generate(model, ids, 50, temperature=0)
    twin = in_int8(model)
    rows = generate(twin, ids, 50, temperature=0)
    assert torch.equal(rows, generate(twin, ids, 50, temperature=0))
    assert torch.equal(rows[:1], generate(twin, ids[:1], 50, temperature=0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(generate(model, ids, 50, temperature=0), expected)


@needs_int8
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "h.0.attn.c_attn.bias", "wte.weight"])
def test_an_int8_twin_of_a_broken_model_is_refused(name: str) -> None:
    """Rounding must not hide it: NaN as an integer is a number."""
    model = random_gpt(CONFIG)
    with torch.no_grad():
        model.get_parameter(name)[3] = float("nan")
    with pytest.raises(CheckpointError, match="logits are not finite"):
        generate(in_int8(model), some_ids(1, 5), 3)


def test_int8_says_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="int8 is for CPUs, the model is on meta; use bf16, or --device cpu"):
        in_int8(GPT(CONFIG).to("meta"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UsageError, match="int8 needs a processor with AVX512-VNNI"):
        in_int8(GPT(CONFIG))


def test_generating_in_bf16_leaves_no_copy_behind() -> None:
    model, threads = random_gpt(CONFIG).bfloat16(), torch.get_num_threads()
    before = [p.clone() for p in model.parameters()]
    generate(model, some_ids(1, 4), 60, temperature=0)
    assert not any(type(thing) is PackedLinear for thing in gc.get_objects())
    assert torch.get_num_threads() == threads
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_packed_only_where_it_pays() -> None:
    model = random_gpt(CONFIG)
    assert packed_if_faster(model, 100, rows=32) is model
    assert packed_if_faster(model, 10, rows=1) is model
    assert isinstance(packed_if_faster(model, 100, rows=1), PackedGPT)
    twin = bf16_twin(model)
    assert packed_if_faster(twin, 100, rows=1) is twin
    assert packed_if_faster(model, 10, rows=1) is model
    assert packed_if_faster(model.double(), 100, rows=1) is model
