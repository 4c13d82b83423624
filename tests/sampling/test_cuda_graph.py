"""The step of fixed shapes: GPT's logits, whatever lies in the places to come. Its recording needs a GPU."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gpt import random_gpt
from torch import Tensor

from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.activation import Activation
from regpt2.sampling.generate import generate
from regpt2.sampling.kv_cache import KVCache
from regpt2.sampling.twins import cuda_graph

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=48, block_size=24, vocab_size=50)


def some_ids(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize(("batch", "n_prompt"), [(1, 1), (3, 7), (2, 23)])
@torch.no_grad()
def test_every_step_is_that_of_gpt_without_a_cache(activation: Activation, batch: int, n_prompt: int) -> None:
    model, ids = random_gpt(replace(CONFIG, activation=activation)).eval(), some_ids(batch, 24)
    cache = KVCache(CONFIG, batch, 31, device=torch.device("cpu"), dtype=torch.float32)
    model.hidden(ids[:, :n_prompt], cache.layers)
    cache.k[:, :, :, n_prompt:], cache.v[:, :, :, n_prompt:] = 100.0, -100.0
    step, whole = cuda_graph.StaticStep(model, cache.k, cache.v), model(ids)
    for position in range(n_prompt, 24):
        assert (step(ids[:, position], position) - whole[:, position]).abs().max() < 1e-4


def test_places_to_come_hold_zeros() -> None:
    """A weight of zero times what memory happened to hold could be NaN."""
    torch.full((4096,), float("nan"))
    cache = KVCache(CONFIG, 1, 31, device=torch.device("cpu"), dtype=torch.float32)
    assert not cache.k.any() and not cache.v.any()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}])
def test_generation_with_it_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model, ids = random_gpt(CONFIG), some_ids(3, 5)

    def run() -> Tensor:
        return generate(model, ids, 19, generator=torch.Generator().manual_seed(0), **options)

    expected, steps = run(), []

    def static(model: GPT, k: Tensor, v: Tensor, position: int, n_tokens: int) -> cuda_graph.StaticStep:
        steps.append((position, n_tokens))
        return cuda_graph.StaticStep(model, k, v)

    monkeypatch.setattr("regpt2.sampling.generate.recorded_if_faster", static)
    assert torch.equal(run(), expected)
    assert steps == [(5, 19)]


def test_nothing_is_recorded_on_a_cpu_or_for_few_tokens() -> None:
    cache = KVCache(CONFIG, 1, 24, device=torch.device("cpu"), dtype=torch.float32)
    assert cuda_graph.recorded_if_faster(GPT(CONFIG), cache.k, cache.v, 1, 1000) is None
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert cuda_graph.recorded_if_faster(GPT(CONFIG), on_gpu, on_gpu, 1, 5) is None


def test_a_gpu_that_cannot_record_is_told_of_once_and_generation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graph, "RecordedStep", fails)
    on_gpu: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert cuda_graph.recorded_if_faster(GPT(CONFIG), on_gpu, on_gpu, 1, 100) is None
    assert "no CUDA graph here (operation not permitted)." in capsys.readouterr().err
