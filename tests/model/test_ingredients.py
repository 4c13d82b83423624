"""What long windows brought to the modern page: where it begins, what is switched off, its types, its window, dropout.

tests/model/test_modern.py has every logit and gradient against NumPy.
"""

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.errors import ConfigError
from regpt2.model.files.fill_model import give_memory, load_into, tensors_of
from regpt2.model.flops import adapter_numbers, flops_per_token, keys_per_query, n_weights
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.rotary import qk_norm, rotated, rotation_of
from regpt2.model.language_model import has_token_rows
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.training.lora import LoraConfig, adapters, merged, with_adapters
from regpt2.training.optimizer import AdamW

# B sequences, T tokens, C = n_embd, D = head width

PLAIN = ModernConfig(n_layer=5, n_head=2, n_embd=32, block_size=24, vocab_size=61)
SWITCHES: dict[str, Any] = {
    "weightless_norms": True,
    "half_rotary": True,
    "value_embeddings": True,
    "unet_skips": True,
    "x0_mixing": True,
    "mlp_only_layer": 3,
    "window": 7,
}
LONG = dataclasses.replace(PLAIN, **SWITCHES)
IDS = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(1))
X, Y = IDS[:, :-1], IDS[:, 1:]


@torch.no_grad()
def stirred(config: ModernConfig, dtype: torch.dtype = torch.float32) -> ModernGPT:
    """No weight is 0 or 1, as `zero_init`, norms and scalars begin."""
    model = ModernGPT(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
        if has_token_rows(name):
            p[config.vocab_size :] = 0.0
    return model.to(dtype)


def plain_pass(model: ModernGPT, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The pass of the page as it was before this file's ingredients, of its parts."""
    config = model.config
    x = model.wte(ids)
    rotation = rotation_of(0, ids.shape[1], config.n_embd // config.n_head, x)
    x = model.ln_emb(x).to(dtype)
    for block in model.h:
        B, T, C = x.shape
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=2)
        q, k, v = (z.view(B, T, config.n_head, -1).transpose(1, 2) for z in (q, k, v))
        y = causal_attention(qk_norm(q, rotation), qk_norm(k, rotation), v)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + block.mlp.c_proj(F.relu(block.mlp.c_fc(block.ln_2(x))).square())
    return model.head(model.ln_f(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_they_change_no_bit(dtype: torch.dtype) -> None:
    model = stirred(PLAIN)
    logits = model.head(model.hidden(X, dtype=dtype))
    expected = plain_pass(model, X, dtype)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    expected.square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, model.parameters(), strict=True))


def test_the_other_weights_begin_as_without_them() -> None:
    before, after = dict(ModernGPT(PLAIN, seed=5).named_parameters()), dict(ModernGPT(LONG, seed=5).named_parameters())
    same = [name for name in before if name in after]
    assert len(same) == len(before) - (5 + 5 + 2) - 2, "without 12 norms, and 2 matrices of attention"
    early = [
        name for name in same if not name.startswith(("h.3", "h.4", "lm_head"))
    ]  # before the block without attention
    assert all(torch.equal(before[name], after[name]) for name in early)
    without = dataclasses.replace(LONG, value_embeddings=False)
    fewer = dict(ModernGPT(without, seed=5).named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in fewer.items())


def test_parameters_have_the_names_and_shapes_of_the_record() -> None:
    """Tables 0, 1, 2 in blocks 0, 1, 2 and 9, 10, 11 of 12; six skips; nothing of attention in block 7."""
    with torch.device("meta"):
        model = ModernGPT(ModernConfig(**SWITCHES | {"mlp_only_layer": 7}))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert [name for name in shapes if name.startswith("wve")] == [f"wve.{k}.weight" for k in range(3)]
    assert shapes["wve.0.weight"] == (50304, 768)
    assert shapes["skips"] == (6,)
    assert {i: shapes[f"h.{i}.attn.value_mix"][0] for i in range(12) if i != 7} == {
        i: 2 if i in (0, 1, 2, 9, 10, 11) else 1 for i in range(12) if i != 7
    }
    assert all(shapes[f"h.{i}.mix"] == (2,) for i in range(12))
    assert [name for name in shapes if name.startswith("h.7.")] == [
        "h.7.mix",
        "h.7.mlp.c_fc.weight",
        "h.7.mlp.c_proj.weight",
    ]
    assert not any("ln_" in name for name in shapes)
    assert [model.config.table_of(i) for i in range(12)] == [0, 1, 2, *[None] * 6, 0, 1, 2]


def test_they_begin_where_the_record_begins() -> None:
    model = ModernGPT(dataclasses.replace(LONG, n_embd=128, vocab_size=257, mlp_only_layer=-1, n_layer=8))
    for name, p in model.named_parameters():
        if name.endswith(".mix"):
            assert p.tolist() == [1.0, 0.0]
        elif name.endswith("value_mix"):
            assert set(p.tolist()) == {0.5}
        elif name == "skips":
            assert set(p.tolist()) == {1.0}
        elif name.startswith("wve"):
            assert abs(p[:257].std().item() - 1) < 0.03 and abs(p[:257].mean().item()) < 0.03
            assert not p[257:].any()
    with torch.no_grad():
        assert abs(float(model(X, Y)) - math.log(257)) < 1e-6, "a head of zeros knows nothing"


@pytest.mark.parametrize("name", [*SWITCHES, "all"])
def test_bf16_computes_the_same_with_8_bits(name: str) -> None:
    config = LONG if name == "all" else dataclasses.replace(PLAIN, **{name: SWITCHES[name]})
    rounded, exact = stirred(config), stirred(config, torch.float64)
    loss, wanted = rounded(X, Y, dtype=torch.bfloat16), exact(X, Y)
    loss.backward(), wanted.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / wanted.item() - 1) < 0.02
    for (name, p), q in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.float32
        if p.numel() > 2:  # tests/model/kernels/test_mixing.py has the scalars, whose gradient may nearly cancel
            assert F.cosine_similarity(p.grad.flatten().double(), q.grad.flatten(), dim=0) > 0.98, name


def test_every_parameter_learns_and_padding_stays_zero() -> None:
    model = stirred(LONG)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(X, Y).backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert (p != q[1]).any(), name
        assert not (has_token_rows(name) and p[61:].any()), name


def test_a_new_model_reaches_as_far_as_its_configuration() -> None:
    assert ModernGPT(PLAIN).window == 0
    assert ModernGPT(LONG).window == 7


def test_setting_the_window_changes_what_a_token_sees_and_nothing_else() -> None:
    model = stirred(PLAIN).eval()
    with torch.no_grad():
        whole = model(X)
        model.set_window(5)
        near = model(X)
        fixed = stirred(dataclasses.replace(PLAIN, window=5)).eval()(X)
        model.set_window(0)
        again = model(X)
    assert torch.equal(near, fixed) and torch.equal(again, whole)
    assert torch.allclose(near[:, :5], whole[:, :5], atol=1e-6), "their window is whole"
    assert (near[:, 5:] - whole[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_the_window_moves_with_the_weights_and_into_copies() -> None:
    with torch.device("meta"):
        model = ModernGPT(LONG)
    assert model._window is not None and model._window.is_meta
    give_memory(model, "cpu")
    load_into(model, tensors_of(stirred(LONG)))
    assert model._window.device == model.wte.weight.device
    model.set_window(3)
    twin = copy.deepcopy(model)
    twin.set_window(9)
    assert (model.window, int(model._window), twin.window, int(twin._window)) == (3, 3, 9, 9)
    assert not list(model.buffers()) and set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_pass_is_not_compiled_again_when_its_window_grows() -> None:
    """Without the code generator. What a pass is given is counted, and each window gives the eager numbers."""
    model, graphs = stirred(dataclasses.replace(LONG, document_mask=True, n_layer=2, mlp_only_layer=-1)), []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    for window in (3, 5, 12, 24, 0):
        model.set_window(window)
        with torch.no_grad():
            assert torch.allclose(compiled(X, Y), model(X, Y), atol=1e-5), window
    assert len(graphs) == 1


def reference_with_dropout(model: ModernGPT, ids: Tensor, p: float) -> Tensor:
    """Dropout after the embedding and on each branch's output, in this order; fp64."""
    config = model.config

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    x = unit(model.wte.weight[ids]) * model.ln_emb.weight
    rotation = rotation_of(0, ids.shape[1], config.n_embd // config.n_head, x)
    x = F.dropout(x, p)
    for block in model.h:
        B, T, C = x.shape
        q, k, v = (unit(x) * block.ln_1.weight @ block.attn.c_attn.weight.T).split(C, dim=2)
        q, k, v = (z.view(B, T, config.n_head, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(rotated(unit(q), rotation), rotated(unit(k), rotation), v, is_causal=True)
        x = x + F.dropout(y.transpose(1, 2).reshape(B, T, C) @ block.attn.c_proj.weight.T, p)
        inner = (unit(x) * block.ln_2.weight @ block.mlp.c_fc.weight.T).clamp(min=0).square()
        x = x + F.dropout(inner @ block.mlp.c_proj.weight.T, p)
    return unit(x) * model.ln_f.weight


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_after_the_embedding_and_on_what_each_branch_gives(training: bool) -> None:
    """With the same random numbers: one mask too few, or in another order, moves every number after it."""
    model = stirred(dataclasses.replace(PLAIN, dropout=0.3), torch.float64).train(training)
    torch.manual_seed(5)
    got = model.hidden(X)
    torch.manual_seed(5)
    wanted = reference_with_dropout(model, X, 0.3 if training else 0.0)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-10)
    plain = stirred(PLAIN, torch.float64).hidden(X)
    assert torch.allclose(got, plain, rtol=0, atol=1e-10) != training


def test_without_dropout_no_random_number_is_drawn() -> None:
    model, before = stirred(LONG).train(), torch.random.get_rng_state()
    model(X, Y).backward()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_are_counted_for_every_combination() -> None:
    names = ("weightless_norms", "half_rotary", "value_embeddings", "unet_skips", "x0_mixing")
    for on in itertools.product((False, True), repeat=len(names)):
        for layer, n_layer, untied, rms_norm in ((-1, 5, True, True), (1, 8, False, True), (2, 3, True, on[0])):
            config = dataclasses.replace(
                PLAIN,
                **dict(zip(names, on, strict=True)),
                mlp_only_layer=layer,
                n_layer=n_layer,
                untied_head=untied,
                rms_norm=rms_norm,
            )
            with torch.device("meta"):
                model = ModernGPT(config)
            assert n_weights(config) == sum(p.numel() for p in model.parameters()), config
            assert n_weights(dataclasses.replace(config, vocab_multiple=1)) == model.n_params(), config


def test_a_window_and_a_block_without_attention_take_fewer_flops() -> None:
    """The mean of min(position, window): by hand, but for half a key, as the half of the square has it."""
    for window, T in ((1, 24), (7, 24), (24, 24), (100, 24), (0, 24), (1792, 65536)):
        config = dataclasses.replace(PLAIN, window=window, block_size=65536)
        by_hand = sum(min(q + 1, window or T) for q in range(T)) / T
        assert abs(keys_per_query(config, T) - by_hand) <= 0.5
    C, T = 32, 24
    full, without = (flops_per_token(dataclasses.replace(PLAIN, mlp_only_layer=layer), T) for layer in (-1, 3))
    assert full - without == 24 * C * C + 6 * C * T
    assert full - flops_per_token(dataclasses.replace(PLAIN, window=6), T) == 5 * 12 * C * (12 - 6 * (1 - 6 / 48))


def test_adapters_go_round_a_block_without_attention() -> None:
    model = stirred(LONG)
    model.set_window(4)
    with torch.no_grad():
        expected = model(X)
    view = with_adapters(model, LoraConfig(rank=4), seed=1)
    assert sum(p.numel() for p in adapters(view).values()) == adapter_numbers(LONG, 4)
    assert [name for name in adapters(view) if name.startswith("h.3.attn")] == []
    assert torch.equal(view(X), expected)
    for p in adapters(view).values():
        nn.init.normal_(p, std=0.1)
    plain = merged(view)
    assert plain.window == view.window == 4
    with torch.no_grad():
        assert torch.allclose(plain(X), view(X), atol=1e-4) and not torch.allclose(plain(X), expected, atol=1e-2)
    view(X, Y).backward()
    assert all(p.grad is not None for p in adapters(view).values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weightless_norms": True, "rms_norm": False}, "model.weightless_norms = true needs model.rms_norm = true"),
        ({"value_embeddings": True, "n_layer": 1}, "model.value_embeddings = true needs model.n_layer of at least 2"),
        ({"unet_skips": True, "n_layer": 1}, "model.unet_skips = true needs model.n_layer of at least 2"),
        ({"half_rotary": True, "rotary": False}, "model.half_rotary = true needs model.rotary = true"),
        ({"half_rotary": True, "n_embd": 36}, "model.n_embd / model.n_head = 36 / 6 = 6 must be a multiple of 4"),
        ({"mlp_only_layer": 12}, "model.mlp_only_layer = 12 must be a block below model.n_layer = 12, or -1"),
        ({"mlp_only_layer": -2}, "model.mlp_only_layer = -2 must be a block"),
        ({"window": -1}, "model.window = -1 must be at least 0"),
        ({"dropout": 1.0}, "model.dropout = 1.0 must be at least 0 and below 1."),
    ],
    ids=str,
)
def test_impossible_switches_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModernConfig(**fields)
    assert message in str(refused.value)
