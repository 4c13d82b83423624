"""LoRA against peft (logits, gradients, updates, files, merging), and what must stay as it was."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpt import random_gpt, transformers_twin
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.ranks.world import World
from regpt2.config.run import RunConfig
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig, is_plain
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig
from regpt2.training.lora import (
    LoraConfig,
    LoraLinear,
    adapter_files,
    adapters,
    load_adapters,
    merged,
    read_adapters,
    with_adapters,
)
from regpt2.training.optimizer import OptimConfig, build_optimizer, state_tensors, unused_options
from regpt2.training.ranks.strategy import ParallelConfig, make_trainable
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64)
GPT2 = GPTConfig(**SHAPE)
LORA = LoraConfig(rank=4, alpha=6.0)
IDS = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(0))
X, Y = IDS[:, :-1], IDS[:, 1:]
PEFT_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@torch.no_grad()
def random_model(shape: GPTConfig) -> LanguageModel:
    """The modern one begins with a head of zeros, through which no gradient comes."""
    model = build_model(shape, seed=3)
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@torch.no_grad()
def trained(model: LanguageModel, config: LoraConfig = LORA) -> LanguageModel:
    """A view whose B is not zero."""
    view = with_adapters(model, config, seed=5)
    for name, p in adapters(view).items():
        if name.endswith("lora_B"):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return view


def peft_twin(view: LanguageModel) -> Any:
    """peft's model with the same weights and adapters, put in by hand: not through the code under test."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    twin = peft.get_peft_model(transformers_twin(random_gpt(GPT2)), settings)
    theirs = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert len(theirs) == len(adapters(view))
    with torch.no_grad():
        for name, p in adapters(view).items():
            theirs[f"base_model.model.transformer.{name}.default.weight"].copy_(p)
    return twin


def close(ours: Tensor, theirs: Tensor, within: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= within * theirs.abs().max())


@PEFT_WARNS
def test_logits_gradients_and_updates_are_pefts() -> None:
    """In fp64: AdamW divides gradients near zero by themselves, and their roundings would decide the updates."""
    view = trained(random_gpt(GPT2)).double()
    twin = peft_twin(view).double()
    theirs = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    settings: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = [build_optimizer(view, OptimConfig(lr=1e-2)), torch.optim.AdamW(theirs.values(), **settings)]
    for _ in range(3):
        assert close(view(X), twin(X).logits, 1e-9)
        view(X, Y).backward()
        torch.nn.functional.cross_entropy(twin(X).logits.flatten(0, 1), Y.flatten()).backward()
        pairs = [
            (p, theirs[f"base_model.model.transformer.{name}.default.weight"]) for name, p in adapters(view).items()
        ]
        for ours, their in pairs:
            assert ours.grad is not None
            assert close(ours.grad, their.grad, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for ours, their in pairs:
            assert close(ours, their, 1e-9)
    assert close(merged(view).double()(X), twin.merge_and_unload()(X).logits)


@PEFT_WARNS
def test_peft_loads_our_files_and_merges_to_our_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers_twin(random_gpt(GPT2))
    view = trained(random_gpt(GPT2))
    for name, data in adapter_files(view, LORA).items():
        (tmp_path / name).write_bytes(data)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert close(view(X), loaded(X).logits)
    theirs = loaded.merge_and_unload().state_dict()
    for name, p in merged(view).named_parameters():
        their = theirs[f"transformer.{name}"][: GPT2.vocab_size]
        assert close(p[: GPT2.vocab_size], their.T if name.startswith("h.") and p.dim() == 2 else their), name


@PEFT_WARNS
def test_we_load_what_peft_saves(tmp_path: Path) -> None:
    view = trained(random_gpt(GPT2))
    peft_twin(view).save_pretrained(tmp_path)
    fresh = with_adapters(random_gpt(GPT2), LORA, seed=6)
    load_adapters(fresh, read_adapters(tmp_path))
    for name, p in adapters(view).items():
        assert torch.equal(p, adapters(fresh)[name])
    ours, theirs = (
        json.loads(adapter_files(view, LORA)["adapter_config.json"]),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    for name, value in ours.items():
        theirs_value = sorted(theirs[name]) if name == "target_modules" else theirs[name]
        assert value == theirs_value or name == "base_model_name_or_path"


SHAPES = [GPTConfig(**SHAPE, dropout=0.1), ModernConfig(**SHAPE, document_mask=True)]


@pytest.mark.parametrize(
    ("shape", "dtype", "strategy", "name"),
    [
        (SHAPES[0], torch.float32, "ddp", "adamw"),
        (SHAPES[0], torch.bfloat16, "ordered", "lion"),
        (SHAPES[1], torch.bfloat16, "ddp", "adamw"),
        (SHAPES[1], torch.float32, "ordered", "adamw"),
    ],
    ids=["gpt2", "gpt2 in bf16 with lion", "modern in bf16", "modern"],
)
def test_only_the_adapters_change_and_have_gradients_and_state(
    shape: GPTConfig, dtype: torch.dtype, strategy: Any, name: str
) -> None:
    model = random_model(shape)
    before = copy.deepcopy(model.state_dict())
    view = with_adapters(model, LORA, seed=3)
    at_first = {name: p.detach().clone() for name, p in adapters(view).items()}
    trainable = make_trainable(view, dtype, ALONE, ParallelConfig(strategy=strategy), compiled=False)
    optimizer = build_optimizer(view, OptimConfig(name=name, lr=1e-2, weight_decay=0.1))
    stats = [
        train_step(
            trainable, optimizer, [(X, Y)] * 2, lr=1e-2, grad_clip=1.0, world=ALONE, ordered=strategy == "ordered"
        )
        for _ in range(3)
    ]
    assert stats[2].loss < stats[0].loss
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    learned = {name for name, p in adapters(view).items() if not torch.equal(p, at_first[name])}
    assert learned == at_first.keys()
    assert {key.rpartition("/")[0] for key in state_tensors(optimizer, view)} == at_first.keys()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert len(at_first) == 2 * 4 * shape.n_layer
    assert all(p.dtype == torch.float32 for p in view.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=["gpt2", "modern"])
def test_a_view_shares_the_weights_begins_as_the_model_and_merges_to_itself(shape: GPTConfig) -> None:
    model = random_model(shape).eval()
    view = with_adapters(model, LORA, seed=3)
    for name, p in model.named_parameters():
        assert view.get_parameter(name) is p
    assert torch.equal(view(X), model(X))
    view = trained(model)
    plain = merged(view)
    assert type(plain) is type(model)
    assert not plain.training
    assert plain.config == shape
    assert close(plain(X), view(X))
    assert not close(plain(X), model(X))
    assert {name for name, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(name))} == {
        name.removesuffix("lora_A") + "weight" for name in adapters(view) if name.endswith("lora_A")
    }
    if shape.architecture == "gpt2":
        assert is_plain(plain)
    assert with_adapters(model, LoraConfig(), seed=3) is model


def test_a_begins_as_kaiming_uniform_and_b_at_zero() -> None:
    """Var of kaiming_uniform_(a = sqrt(5)): 2 / (1 + 5) / in = 1 / (3 in); the bound is sqrt(3) deviations."""
    model = build_model(GPTConfig(**{**SHAPE, "n_embd": 64}))
    first, again, other = (adapters(with_adapters(model, LoraConfig(rank=64), seed=seed)) for seed in (1, 1, 2))
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if name.endswith("lora_B"):
            assert not p.any()
            continue
        assert not torch.equal(p, other[name])
        width = p.shape[1]
        p = p.detach()
        assert float(p.std()) == pytest.approx(1 / math.sqrt(3 * width), rel=0.05)
        assert float(p.abs().max()) == pytest.approx(1 / math.sqrt(width), rel=0.01)


def test_with_enough_updates_it_learns_a_batch_by_heart() -> None:
    """The frozen head has to be able to express it: rows of length 5 or so, as those of a trained model are."""
    model = random_gpt(GPT2)
    with torch.no_grad():
        model.wte.weight *= 8
    view = with_adapters(model, LoraConfig(rank=16, alpha=32), seed=1)
    optimizer = build_optimizer(view, OptimConfig(lr=1e-2, weight_decay=0.0))
    losses = [float(train_step(view, optimizer, [(X, Y)], lr=1e-2, grad_clip=1.0, world=ALONE).loss) for _ in range(80)]
    assert losses[0] > 4
    assert losses[-1] < 0.1


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiler_gets_one_graph_with_the_same_gradients() -> None:
    """Without its code generator, as in tests/model/test_gpt.py."""
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        view = trained(random_gpt(dataclasses.replace(GPT2, n_layer=1)))
        wrap(view)(X, Y, dtype=torch.bfloat16).backward()
        results.append([p.grad for p in adapters(view).values()])
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-6)


def test_the_scale_is_alpha_over_rank() -> None:
    view = trained(random_gpt(GPT2))
    layer: Any = view.h[1]
    part = layer.mlp.c_fc
    assert isinstance(part, LoraLinear)
    assert close(part.delta(), 1.5 * part.lora_B @ part.lora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=-1), "lora.rank = -1 must be at least 0"),
        (dict(alpha=0.0), "lora.alpha = 0.0 must be above 0 and finite"),
        (dict(alpha=math.inf), "lora.alpha = inf must be above 0"),
        (dict(alpha=math.nan), "lora.alpha = nan must be above 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_what_does_not_go_with_adapters_is_refused() -> None:
    good = RunConfig(lora=LoraConfig(rank=8))
    with pytest.raises(ConfigError, match=r"lora\.rank = 769 must be at most model\.n_embd = 768"):
        dataclasses.replace(good, lora=LoraConfig(rank=769))
    with pytest.raises(ConfigError, match=r"optim\.name = 'muon' is for whole matrices"):
        dataclasses.replace(good, optim=OptimConfig(name="muon"))
    with pytest.raises(ConfigError, match="'fsdp' cannot shard a model with adapters"):
        dataclasses.replace(good, parallel=ParallelConfig(strategy="fsdp"))
    view = with_adapters(random_gpt(GPT2), LORA, seed=1)
    assert unused_options(OptimConfig(), view) == []
    (unused,) = unused_options(OptimConfig(embedding_lr=1e-3), view)
    assert "optim.embedding_lr has no effect: the model's own weights are frozen" in unused


def test_adapters_of_another_model_are_refused() -> None:
    view = with_adapters(random_gpt(GPT2), LORA, seed=1)
    tensors = {name: p.detach() + 1 for name, p in adapters(view).items()}
    first = min(tensors)
    for wrong in ({}, {**tensors, "x": tensors[first]}, {**tensors, first: torch.zeros(3, 16)}):
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            load_adapters(view, wrong)
        assert not any(torch.equal(p, tensors[name]) for name, p in adapters(view).items())
