"""ModernGPT against NumPy written from the papers: logits, loss, every gradient, for each switch on and off."""

import dataclasses
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regpt2.base.errors import ConfigError
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels import attention, recompute
from regpt2.model.kernels.rotary import qk_norm, rotation_of
from regpt2.model.language_model import has_token_rows
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.kv_cache import KVCache

numpy_modern = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "independent" / "numpy_modern.py")))

ON = ModernConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, softcap=3.0)  # 3: its bend is seen
OFF_SWITCHES = {name: False for name in ("rotary", "qk_norm", "relu_squared", "untied_head", "rms_norm")}
OFF_SWITCHES |= {"softcap": 0.0}  # zero_init is not here: it changes no formula
OFF = dataclasses.replace(ON, **OFF_SWITCHES)
CONFIGS = {"all": ON, "none": OFF}
CONFIGS |= {f"all but {name}": dataclasses.replace(ON, **{name: off}) for name, off in OFF_SWITCHES.items()}
CONFIGS["none, exact GELU"] = dataclasses.replace(OFF, activation="gelu")
CONFIGS |= {f"only {name}": dataclasses.replace(OFF, **{name: getattr(ON, name)}) for name in OFF_SWITCHES}
# Those of long windows: 5 blocks have a middle one without value embedding, and no partner across the U.
LATER: dict[str, Any] = {
    "weightless_norms": True,
    "half_rotary": True,
    "value_embeddings": True,
    "unet_skips": True,
    "x0_mixing": True,
    "mlp_only_layer": 3,
    "window": 4,
}
FIVE = dataclasses.replace(ON, n_layer=5)
CONFIGS |= {f"with {name}": dataclasses.replace(FIVE, **{name: on}) for name, on in LATER.items()}
CONFIGS["with all of long windows"] = dataclasses.replace(FIVE, **LATER)
CONFIGS["with three value embeddings"] = dataclasses.replace(ON, n_layer=8, value_embeddings=True, mlp_only_layer=0)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def random_model(config: ModernConfig, seed: int = 1) -> ModernGPT:
    """In fp64, with random norms too, so that nothing is hidden behind a zero or a one."""
    model = ModernGPT(config).double()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        around_one = name.endswith((".mix", "skips")) or ("ln" in name and name.endswith("weight"))
        p.normal_(mean=1.0 if around_one else 0.0, std=0.3, generator=generator)
        if has_token_rows(name):
            p[config.vocab_size :] = 0.0
    return model.eval()


def batch(config: GPTConfig, seed: int = 2) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (3, config.block_size + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def numpy_weights(model: ModernGPT) -> dict[str, Any]:
    unpadded = {n: p[: model.config.vocab_size] if has_token_rows(n) else p for n, p in model.named_parameters()}
    return {name: p.detach().numpy().copy() for name, p in unpadded.items()}


def numpy_loss(weights: dict[str, Any], config: ModernConfig, ids: Tensor, targets: Tensor) -> float:
    rows = zip(ids.tolist(), targets.tolist(), strict=True)
    return float(np.mean([numpy_modern.loss(weights, config, row, next_ids) for row, next_ids in rows]))


@every_config
def test_logits_and_loss_match_numpy_from_the_papers(config: ModernConfig) -> None:
    model = random_model(config)
    weights, (ids, targets) = numpy_weights(model), batch(config)
    with torch.no_grad():
        got, loss = model(ids).numpy(), model(ids, targets)
    for row, logits in zip(ids.tolist(), got, strict=True):
        assert np.abs(logits - numpy_modern.logits(weights, config, row)).max() < 1e-12
    assert abs(float(loss) - numpy_loss(weights, config, ids, targets)) < 1e-12


@every_config
def test_every_gradient_matches_the_slope_of_numpys_loss(config: ModernConfig) -> None:
    """For each parameter along a random direction, by central differences: their error is of order step squared."""
    model = random_model(config)
    weights, (ids, targets) = numpy_weights(model), (tokens[:1, :7] for tokens in batch(config))
    model(ids, targets).backward()
    numbers, step = np.random.default_rng(3), 1e-5
    for name, p in model.named_parameters():
        along = numbers.standard_normal(weights[name].shape)
        above, below = (
            numpy_loss(weights | {name: weights[name] + s * along}, config, ids, targets) for s in (step, -step)
        )
        assert p.grad is not None, name
        got = (p.grad.numpy()[: len(along)] * along).sum()
        assert abs(got - (above - below) / (2 * step)) < 1e-6 * max(1e-3, abs(got)), name
        assert not p.grad[len(along) :].any(), name  # padding rows


def test_with_all_switches_off_only_the_biases_of_linear_layers_are_missing() -> None:
    """With the same weights, and zeros for these biases, GPT-2's page gives the same logits."""
    model, gpt = random_model(OFF), GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11))
    ours, theirs = dict(model.named_parameters()), dict(gpt.double().named_parameters())
    assert theirs.keys() - ours.keys() == {
        f"h.{layer}.{linear}.bias"
        for layer in range(2)
        for linear in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    gpt.load_state_dict({name: ours.get(name, torch.zeros_like(p)) for name, p in theirs.items()})
    ids, _ = batch(OFF)
    with torch.no_grad():
        assert (model(ids) - gpt(ids)).abs().max() < 1e-12


@every_config
def test_tokens_one_at_a_time_with_a_cache_give_the_logits_of_all_at_once(config: ModernConfig) -> None:
    model, (ids, _) = random_model(config), batch(config)
    cache = KVCache(config, len(ids), config.block_size, device=torch.device("cpu"), dtype=torch.float64)
    logits = []
    with torch.no_grad():
        for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            logits.append(model.head(model.hidden(part, cache.layers, position=cache.length)))
            cache.advance(part.shape[1])
        assert (torch.cat(logits, dim=1) - model(ids)).abs().max() < 1e-12


@pytest.mark.parametrize("config", [ON, dataclasses.replace(ON, rotary=False)], ids=["rotary", "learned"])
def test_only_rotary_positions_are_relative(config: ModernConfig) -> None:
    """The same tokens further on: what a token sees of another depends on how far they are apart, or on where it is."""
    model, (ids, _) = random_model(config), batch(config)
    with torch.no_grad():
        difference = (model.hidden(ids[:, :6]) - model.hidden(ids[:, :6], position=6)).abs().max()
    assert difference < 1e-12 if config.rotary else difference > 0.1


def test_no_token_sees_a_later_one() -> None:
    model, (ids, _) = random_model(ON), batch(ON)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % ON.vocab_size
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


SMALL = ModernConfig(n_layer=6, n_head=2, n_embd=64, block_size=64, vocab_size=257)


@pytest.mark.parametrize("zero_init", [True, False])
def test_initialization_is_gpt2s_but_for_what_starts_at_zero(zero_init: bool) -> None:
    model = ModernGPT(config := dataclasses.replace(SMALL, zero_init=zero_init), seed=4)
    for name, p in model.named_parameters():
        p = p[:257] if has_token_rows(name) else p
        if p.dim() == 1:
            assert p.eq(1).all(), name
        elif zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
            assert not p.any(), name
        else:  # a sample of 64 x 64 numbers and more: its std is within 2 %
            expected = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
    assert not model.wte.weight[257:].any() and not model.lm_head.weight[257:].any()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), ModernGPT(config, seed=4).parameters(), strict=True)
    )
    assert not torch.equal(model.wte.weight, ModernGPT(config, seed=5).wte.weight)


def test_with_zeros_at_the_end_the_loss_starts_at_ln_vocabulary() -> None:
    with torch.no_grad():
        loss = ModernGPT(SMALL)(*batch(SMALL))
    assert abs(float(loss) - math.log(257)) < 1e-6


@pytest.mark.parametrize("untied_head", [True, False])
def test_padding_rows_stay_zero_under_training(untied_head: bool) -> None:
    model = ModernGPT(dataclasses.replace(ON, untied_head=untied_head))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = model.head_weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch(ON)).backward()
        optimizer.step()
    for weight in (model.wte.weight, model.head_weight):
        assert len(weight) == 64 and not weight[11:].any()
    assert (model.head_weight[:11] != before[:11]).all()
    assert model(batch(ON)[0]).shape == (3, 12, 11)


def test_parameters_are_counted_without_padding() -> None:
    """12 blocks of 12 C^2, 26 norms, and two matrices of 50,257 rows; tied and with learned positions one."""
    with torch.device("meta"):
        model, tied = ModernGPT(ModernConfig()), ModernGPT(ModernConfig(untied_head=False, rotary=False))
    assert model.n_params() == 12 * 12 * 768**2 + 26 * 768 + 2 * 50257 * 768 == 162_149_376
    assert tied.n_params() == model.n_params() - 50257 * 768 + 1024 * 768


def test_bf16_computes_over_fp32_weights() -> None:
    """The loss is near fp32's, bf16 having 8 bits; gradients are fp32; the residual stream is bf16."""
    model, exact = random_model(ON).float(), random_model(ON)
    loss = model(*batch(ON), dtype=torch.bfloat16)
    loss.backward()
    assert model.hidden(batch(ON)[0], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    exact_loss = exact(*batch(ON))
    exact_loss.backward()
    assert abs(loss.item() / exact_loss.item() - 1) < 0.02
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten().float(), dim=0) > 0.99, name


def heads(dtype: torch.dtype, T: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    sizes = torch.tensor([1.0, 1e-3], dtype=torch.float64)[:, None, None]  # of two heads: near zero the 1e-6 counts
    return (sizes * torch.randn(2, 2, T, 8, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("is_rotary", [True, False])
def test_the_gradient_of_qk_norm_is_its_slope(is_rotary: bool) -> None:
    x = heads(torch.float64)
    rotation = rotation_of(3, 5, 8, x) if is_rotary else None
    assert torch.autograd.gradcheck(lambda x: qk_norm(x, rotation), (x,), eps=1e-8, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("is_rotary", [True, False])
def test_qk_norm_in_bf16_rounds_once_and_keeps_its_output_alone(is_rotary: bool) -> None:
    """Which is 2**-9.2 of the length; rounded twice, before the rotation too, it would be 2**-8.5."""
    x, kept = heads(torch.bfloat16, T=64), []
    rotation, exact_rotation = (rotation_of(0, 64, 8, z) if is_rotary else None for z in (x, x.double()))
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):  # type: ignore[func-returns-value]
        y = qk_norm(x, rotation)
    assert sum(z.nbytes for z in kept) == y.nbytes + 4 * y.shape[:3].numel()
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    exact_x = x.detach().double().requires_grad_()
    exact = qk_norm(exact_x, exact_rotation)
    with torch.no_grad():
        assert (y - exact).norm() < 2**-9 * exact.norm()
        assert (qk_norm(x, rotation) - exact).norm() < 2**-9 * exact.norm()
    (d_x,), (wanted,) = torch.autograd.grad(y, x, d_y), torch.autograd.grad(exact, exact_x, d_y.double())
    assert (d_x - wanted).norm() < 2**-9 * wanted.norm()


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiler_gets_one_graph_with_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its code generator, whose work differs by device: what it is given, forward and backward.

    The norms' derivatives, which are written out where nothing is compiled, are other fp32 sums: some of them round to
    the next number of bf16, 2**-8 away.
    """
    monkeypatch.setattr(attention, "_BLOCK", 4)
    monkeypatch.setattr(recompute, "_WORTH", 1)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        model = random_model(dataclasses.replace(ON, n_layer=1)).float()
        loss = wrap(model)(*batch(ON), dtype=torch.bfloat16)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, compiled in zip(*results, strict=True):
        assert (plain - compiled).norm() <= 2**-7 * compiled.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"softcap": -1.0}, "model.softcap = -1.0 must be 0 (off) or more; 15 is usual."),
        ({"softcap": math.nan}, "model.softcap = nan must be 0"),
        ({"n_embd": 18}, "model.n_embd / model.n_head = 18 / 6 = 3 must be even"),
        ({"n_layer": 0}, "model.n_layer = 0 must be at least 1."),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModernConfig(**fields)
    assert message in str(refused.value)


def test_more_tokens_than_block_size_are_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size = 12"):
        ModernGPT(ON)(torch.zeros(1, 13, dtype=torch.long))
