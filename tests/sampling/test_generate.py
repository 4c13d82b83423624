"""Generation: the cache changes nothing, no id is outside the vocabulary, draws follow a NumPy reference."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_gpt import random_gpt, transformers_twin
from torch import Tensor

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.sampling.draw import next_token
from regpt2.sampling.generate import generate
from regpt2.sampling.kv_cache import KVCache
from regpt2.sampling.twins.cpu import in_int8
from regpt2.sampling.twins.cuda_graph import StaticStep

numpy_gpt2 = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "independent" / "numpy_gpt2.py")))

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=48, block_size=24, vocab_size=50)  # 14 padding rows


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 23])
def test_cached_logits_equal_uncached_ones_at_every_length(batch: int, length: int) -> None:
    model, ids = random_gpt(CONFIG), prompt(batch, CONFIG.block_size)
    cache = KVCache(CONFIG, batch, CONFIG.block_size, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        whole = model(ids)
        for start, end in zip([0, *range(length, 24)], range(length, 25), strict=True):
            x = model.hidden(ids[:, start:end], cache.layers, position=start)
            cache.advance(end - start)
            assert (model.head(x) - whole[:, start:end]).abs().max() < 1e-5
    assert cache.length == CONFIG.block_size


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 0, "top_p": 0.9, "temperature": 0.7}])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 9), (3, 9)])
def test_cached_text_equals_uncached_text(batch: int, length: int, options: dict[str, Any]) -> None:
    model, ids, n = random_gpt(CONFIG), prompt(batch, length), 24 - length
    cached = generate(model, ids, n, generator=seeded(), **options)
    uncached = generate(model, ids, n, generator=seeded(), use_cache=False, **options)
    assert cached.shape == (batch, 24)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[:, :length], ids)


def test_greedy_text_is_that_of_transformers() -> None:
    model, ids = random_gpt(CONFIG), prompt(3, 4)
    twin = transformers_twin(model)
    expected = twin.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generate(model, ids, 20, temperature=0), expected)


def test_same_generator_same_text_and_another_seed_another() -> None:
    model, ids = random_gpt(CONFIG), prompt(2, 3)
    first, again, other = (generate(model, ids, 20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padding_ids_are_never_drawn() -> None:
    """10,000 draws from an untrained model with all tokens allowed: 14 of 64 rows are padding, of average logit."""
    model = GPT(CONFIG)
    rows = generate(model, prompt(500, 4), 20, top_k=0, temperature=5.0, generator=seeded())
    drawn = rows[:, 4:]
    assert drawn.numel() == 10_000
    assert int(drawn.max()) == CONFIG.vocab_size - 1
    assert len(drawn.unique()) == CONFIG.vocab_size


@pytest.mark.seconds
@pytest.mark.parametrize("path", ["uncached", "cached", "transposed", "bf16", "int8", "static"])
def test_ids_that_are_never_to_be_drawn_are_not_on_any_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this model would draw most, greedily and at random; in fp32 the rest is what a plain loop draws."""
    model, ids = random_gpt(replace(CONFIG, block_size=64)), prompt(2, 4)
    never = generate(model, ids, 50, generator=seeded(), top_k=8)[:, 4:].flatten().bincount().topk(9).indices.tolist()
    if path == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no int8 instructions")
    if path == "static":
        static = lambda model, k, v, *_: StaticStep(model, k, v)  # noqa: E731
        monkeypatch.setattr("regpt2.sampling.generate.recorded_if_faster", static)
    twin = {"int8": in_int8, "bf16": lambda model: model.bfloat16()}.get(path, lambda model: model)(
        random_gpt(model.config)
    )
    n = 60 if path == "transposed" else 40  # from 50 on the matrices are transposed
    for options in ({"temperature": 0.0}, {"temperature": 3.0, "top_k": 5}, {"top_k": 0}, {"top_k": 0, "top_p": 0.9}):
        new = generate(twin, ids, n, never=never, generator=seeded(), use_cache=path != "uncached", **options)[:, 4:]
        assert new.shape == (2, n) and not torch.isin(new, torch.tensor(never)).any()
        if "temperature" in options and options["temperature"] == 0 and path not in ("bf16", "int8"):
            expected = ids
            for _ in range(n):
                logits = model(expected)[:, -1].detach()
                logits[:, never] = -torch.inf
                expected = torch.cat([expected, logits.argmax(1, keepdim=True)], dim=1)
            assert torch.equal(new, expected[:, 4:])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (2.0, 8, 0.7), (1.0, 99, 0.9), (1.0, 4, 0.01)],
)
def test_draws_follow_the_distribution_of_the_numpy_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(20, generator=seeded(3)) * 2
    expected = numpy_gpt2.sampling_probabilities(logits.double().numpy(), temperature, top_k, top_p)
    n = 20_000
    drawn = next_token(logits.expand(n, -1), temperature, top_k, top_p, seeded(4)).numpy()
    frequency = np.bincount(drawn, minlength=20) / n
    assert ((frequency > 0) <= (expected > 0)).all()  # nothing outside of the allowed set
    # Five standard deviations of a frequency: about one false alarm in 10^5 such tests.
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


def test_zero_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(30, 20, generator=seeded(5))
    assert torch.equal(next_token(logits, 0.0, 50, 1.0), logits.argmax(dim=1))
    assert torch.equal(next_token(logits, 1.0, 1, 1.0), logits.argmax(dim=1))
    assert torch.equal(next_token(logits, 1.0, 0, 1e-9), logits.argmax(dim=1))  # top_p keeps one


@pytest.mark.parametrize("options", [(0, 1.0), (50, 1.0), (0, 0.9), (5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(
    temperature: float, dtype: torch.dtype, options: tuple[int, float]
) -> None:
    logits = (torch.randn(8, 60, generator=seeded()) * 40).to(dtype)
    logits[:, 7] = -torch.inf  # as one that is never to be drawn
    assert torch.equal(next_token(logits, temperature, *options, seeded()), logits.argmax(dim=1))


def test_of_equal_logits_a_small_temperature_draws_any() -> None:
    logits = torch.tensor([3.0, 5.0, 5.0, -torch.inf]).repeat(400, 1)
    drawn = next_token(logits, 1e-40, 0, 1.0, seeded()).bincount(minlength=4)
    assert drawn[0] == drawn[3] == 0 and 140 < drawn[1] < 260  # 200 of 400; 6 deviations are 60


def test_a_stopped_row_is_filled_and_the_end_of_all_ends_generation() -> None:
    model, ids = random_gpt(CONFIG), prompt(8, 2)
    free = generate(model, ids, 20, generator=seeded())[:, 2:]
    stop_id = int(free[0, 3])
    rows = generate(model, ids, 20, generator=seeded(), stop_id=stop_id)[:, 2:]
    for row in rows.tolist():
        if stop_id in row:
            assert set(row[row.index(stop_id) :]) == {stop_id}
    assert torch.equal(rows[:, :4], free[:, :4].where(~(free[:, :4] == stop_id).cummax(dim=1)[0], stop_id))
    alone = generate(model, ids[:1], 20, temperature=0)
    first = int(alone[0, 2])
    assert generate(model, ids[:1], 20, temperature=0, stop_id=first).tolist() == [[*ids[0].tolist(), first]]


def test_new_ids_are_handed_over_as_they_are_drawn() -> None:
    heard: list[Tensor] = []
    rows = generate(random_gpt(CONFIG), prompt(2, 3), 5, generator=seeded(), on_token=heard.append)
    assert torch.equal(torch.stack(heard, dim=1), rows[:, 3:])


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_is_off(training: bool) -> None:
    model = random_gpt(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=50, dropout=0.5))
    model.train(training)
    rows = [generate(model, prompt(1, 2), 10, temperature=0) for _ in range(2)]
    assert torch.equal(*rows)
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt(1, 2), 10, temperature=0, on_token=lambda _: 1 // 0)
    assert model.training == training


def test_generating_leaves_weights_and_the_global_random_state_alone() -> None:
    model = random_gpt(CONFIG)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    generate(model, prompt(2, 3), 10, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_returned_ids_can_be_trained_on() -> None:
    model = random_gpt(CONFIG)
    ids = generate(model, prompt(2, 3), 10, generator=seeded())
    model(ids[:, :-1], ids[:, 1:]).backward()


def test_bf16_model_generates() -> None:
    rows = generate(random_gpt(CONFIG).bfloat16(), prompt(2, 3), 10, generator=seeded())
    assert rows.shape == (2, 13)


@pytest.mark.parametrize(
    ("length", "n", "options", "message"),
    [
        (
            20,
            5,
            {},
            "a prompt of 20 tokens plus 5 to write is 25 tokens, and the model's context is 24. Ask for at most 4 new",
        ),
        (
            24,
            1,
            {},
            "a prompt of 24 tokens plus 1 to write is 25 tokens, and the model's context is 24. Shorten the prompt.",
        ),
        (0, 1, {}, "a prompt of 1 sequences x 0 tokens is empty"),
        (3, 0, {}, "max_new_tokens = 0 must be at least 1."),
        (3, 1, {"temperature": -1.0}, "temperature = -1.0 must be 0"),
        (3, 1, {"temperature": float("nan")}, "temperature = nan must be 0"),
        (3, 1, {"top_k": -1}, "top_k = -1 must be 0"),
        (3, 1, {"top_p": 0.0}, "top_p = 0.0 must be above 0 and at most 1"),
        (3, 1, {"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
    ],
)
def test_impossible_requests_are_refused(length: int, n: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        generate(GPT(CONFIG), prompt(1, length), n, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [50, 63, -1])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(UsageError, match=f"token id {bad} is outside the model's vocabulary of 50 tokens"):
        generate(GPT(CONFIG), torch.tensor([[1, bad]]), 3)


def test_a_broken_model_is_refused() -> None:
    model = random_gpt(CONFIG)
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    with pytest.raises(CheckpointError, match="logits are not finite"):
        generate(model, prompt(1, 2), 3)
