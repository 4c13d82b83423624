"""A GPT with a part of its own is never computed as plain GPT-2: the reference is its own forward."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gpt import random_gpt
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.errors import UsageError
from regpt2.base.ranks.world import World
from regpt2.evals.scoring.context import EvalContext
from regpt2.model.gpt import GPT, MLP, Block, GPTConfig, LayerNorm, Linear
from regpt2.model.language_model import LayerCache
from regpt2.sampling.generate import generate
from regpt2.sampling.twins import cpu as packed
from regpt2.sampling.twins import cuda_graph as replay
from regpt2.sampling.twins import twin
from regpt2.training.ranks.strategy import in_compute_type

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257)
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


class OwnBlock(Block):
    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.mlp(self.ln_2(x)).roll(1, dims=-1)
        return x + self.attn(self.ln_1(x), cache)


class OwnMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.relu(self.c_fc(x)))
        return y


class OwnLinear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class OwnNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class OwnHidden(GPT):
    def hidden(self, *args: Any, **options: Any) -> Tensor:
        return super().hidden(*args, **options).flip(-1)


class OwnHead(GPT):
    def head(self, x: Tensor) -> Tensor:
        return super().head(x).roll(7, dims=-1)


class OwnBlocks(GPT):
    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.h = nn.ModuleList(OwnBlock(config) for _ in range(config.n_layer))


def _of(kind: type[GPT]) -> GPT:
    model = kind(CONFIG)
    model.load_state_dict(random_gpt(CONFIG).state_dict())
    return model


def _with(name: str, part: nn.Module) -> GPT:
    """The part at `name` replaced, its weights kept."""
    model = random_gpt(CONFIG)
    part.load_state_dict(model.get_submodule(name).state_dict())
    model.set_submodule(name, part)
    return model


def _hooked() -> GPT:
    model = random_gpt(CONFIG)
    model.h[1].register_forward_hook(lambda block, given, x: x.flip(-1))
    return model


def _patched() -> GPT:
    model = random_gpt(CONFIG)
    block: Any = model.h[0]
    block.forward = lambda x, cache=None: Block.forward(block, x, cache).flip(-1)
    return model


VARIANTS: dict[str, Callable[[], GPT]] = {
    "a subclass with its own blocks": lambda: _of(OwnBlocks),
    "a subclass with its own hidden": lambda: _of(OwnHidden),
    "a subclass with its own head": lambda: _of(OwnHead),
    "a swapped block": lambda: _with("h.1", OwnBlock(CONFIG)),
    "a swapped mlp": lambda: _with("h.0.mlp", OwnMLP(CONFIG)),
    "a swapped matrix": lambda: _with("h.1.attn.c_attn", OwnLinear(64, 192)),
    "a swapped last norm": lambda: _with("ln_f", OwnNorm(64)),
    "a hook": _hooked,
    "a patched forward": _patched,
}
each_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    twin.warn_once.cache_clear()
    yield
    twin.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def bf16_packs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that packs no bf16 matrices, a plain product is in their place."""
    try:
        packed.PackedLinear(torch.zeros(64, 64))
    except RuntimeError:
        monkeypatch.setattr(packed.PackedLinear, "__init__", _keep)
        monkeypatch.setattr(packed.PackedLinear, "__call__", lambda self, x: F.linear(x, self.weight, self.bias))


def _keep(self: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    self.weight, self.bias = weight.detach().to(torch.bfloat16), bias


def some_ids(batch: int = 1, length: int = 4) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def likeliest(model: GPT, found: Tensor) -> Tensor:
    """What the model's own forward finds likeliest at each new place, in one pass without a cache."""
    return model.eval()(found[:, :-1]).argmax(-1)[:, 3:]


@each_variant
def test_generation_runs_the_models_own_parts(make: Callable[[], GPT], capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    found = generate(model, some_ids(), 60, temperature=0)
    assert torch.equal(found[:, 4:], likeliest(model, found))
    assert not torch.equal(found, generate(random_gpt(CONFIG), some_ids(), 60, temperature=0))
    generate(model, some_ids(), 60, temperature=0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not plain GPT-2" in said


@each_variant
@torch.no_grad()
def test_evaluation_runs_the_models_own_parts(make: Callable[[], GPT]) -> None:
    """In bf16, where evaluation packs: its roundings are a hundredth of the logits, another part is as large."""
    model, ids = make().eval(), some_ids(2, 30)
    context = EvalContext(
        model=in_compute_type(model, torch.bfloat16), world=ALONE, data=None, seq_len=32, batch=2, val_tokens=1
    )
    gpt = context.scoring_gpt()
    found, exact = gpt.head(gpt.hidden(ids, dtype=torch.bfloat16)).float(), model(ids)
    assert (found - exact).square().mean().sqrt() < 0.05 * exact.std()


@each_variant
def test_no_graph_is_recorded_and_no_int8_made_of_it(make: Callable[[], GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "RecordedStep", lambda *_: "recorded")
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert replay.recorded_if_faster(GPT(CONFIG), on_gpu, on_gpu, 1, 100) == "recorded"  # type: ignore[comparison-overlap]
    assert replay.recorded_if_faster(make(), on_gpu, on_gpu, 1, 100) is None
    with pytest.raises(UsageError, match="int8 is for plain GPT-2"):
        packed.in_int8(make())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_with_other_logits_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a wrong kernel would give them, for which no type differs."""
    model = random_gpt(CONFIG).to(dtype)
    for layout in (packed.TransposedLinear, packed.PackedLinear):
        right = layout.__call__
        monkeypatch.setattr(layout, "__call__", lambda self, x, right=right: right(self, x).roll(1, dims=-1))
    expected = generate(model, some_ids(), 40, temperature=0)  # too few tokens for a twin
    assert torch.equal(generate(model, some_ids(), 60, temperature=0)[:, :44], expected)
    assert "other logits" in capsys.readouterr().err
    assert packed.packed_if_faster(model, 100, rows=1) is model
    assert not capsys.readouterr().err


def test_a_recorded_step_with_other_logits_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(replay.StaticStep):
        def run(self) -> Tensor:
            return super().run().roll(1, dims=-1)

    model, ids = random_gpt(CONFIG), some_ids(2)
    expected = generate(model, ids, 40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("regpt2.sampling.generate.recorded_if_faster", lambda model, k, v, *_: Wrong(model, k, v))
    assert torch.equal(generate(model, ids, 40, generator=torch.Generator().manual_seed(0)), expected)
    assert "other logits" in capsys.readouterr().err


@pytest.mark.parametrize("training", [False, True])
def test_the_comparison_leaves_mode_and_random_numbers_alone(training: bool) -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257, dropout=0.3)).train(training)
    before = torch.get_rng_state()
    assert isinstance(packed.packed_if_faster(model, 100, rows=1), packed.PackedGPT)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training == training for part in model.modules())
