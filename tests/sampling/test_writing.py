"""Texts side by side: each is the text that it is alone, whatever its neighbors; beyond the context by a plain rule."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gpt import random_gpt, transformers_twin
from torch import Tensor

from conftest import needs_bf16
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.data.tokenizer import BytesTokenizer
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.continue_text import batches
from regpt2.sampling.draw import Choice
from regpt2.sampling.generate import generate, may_differ_in_length
from regpt2.sampling.twins.cpu import in_int8
from regpt2.sampling.twins.cuda_graph import StaticStep
from regpt2.sampling.writing import Request, Row, write

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 257}
GREEDY, TEXT = Choice(temperature=0), BytesTokenizer()


class Endless(BytesTokenizer):
    """No id ends a text, so that all rows grow to their full length."""

    eot = None  # type: ignore[assignment]


def modern(**switches: Any) -> ModernGPT:
    model, random = ModernGPT(ModernConfig(**SHAPE, **switches)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.1)
        model.wte.weight[257:] = 0
    return model


MODELS = {
    "gpt2": lambda: random_gpt(GPTConfig(**SHAPE)),
    "modern": modern,
    "documents": lambda: modern(document_mask=True),
    "documents in a window": lambda: modern(window=12, document_mask=True),
    "learned positions": lambda: modern(rotary=False),
    "int8": lambda: in_int8(random_gpt(GPTConfig(**SHAPE))),
}


def model_of(name: str) -> LanguageModel:
    if name == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no int8 instructions")
    return MODELS[name]().eval()


def some_prompts(*lengths: int) -> list[tuple[int, ...]]:
    """Each with an end of text within, which a document mask minds."""
    random = torch.Generator().manual_seed(7)
    found = [torch.randint(256, (length,), generator=random).tolist() for length in lengths]
    return [tuple(256 if place == len(ids) // 2 else one for place, one in enumerate(ids)) for ids in found]


def written(model: LanguageModel, requests: Sequence[Request], context: int = 64, tokenizer: Any = None) -> list[Row]:
    return list(write(model, tokenizer or Endless(), requests, context=context))[-1]


def naive(model: LanguageModel, prompt: Sequence[int], n_new: int, context: int) -> list[int]:
    """The rule without a cache: the whole context is computed for each token."""
    seen, new = list(prompt)[-context:], []
    for _ in range(n_new):
        if len(seen) > context:
            seen = seen[-max(1, context // 2) :]
        with torch.no_grad():
            new.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
        seen.append(new[-1])
    return new


@pytest.mark.parametrize("n_new", [20, 52])  # from 50 on the matrices are transposed
def test_greedy_texts_of_unequal_prompts_are_those_of_transformers(n_new: int) -> None:
    model = random_gpt(GPTConfig(**SHAPE))
    prompts = some_prompts(3, 12, 1, 7, 12)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    expected = transformers_twin(model).generate(
        ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, longest:]
    rows = written(model, [Request(one, n_new, choice=GREEDY) for one in prompts])
    assert [row.tokens for row in rows] == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choice", [GREEDY, Choice(1.5, 20, 0.9, 0.01, 1.2)], ids=["greedy", "drawn"])
def test_each_text_is_the_one_that_it_is_alone(name: str, choice: Choice) -> None:
    model = model_of(name)
    asked = [(9, 30, 1), (2, 54, 2), (30, 5, 3), (9, 12, 1)]  # length, tokens, continuations
    requests = [
        Request(ids, n_new, n, choice, seed=n_new)
        for ids, (_, n_new, n) in zip(some_prompts(*(length for length, *_ in asked)), asked, strict=True)
    ]
    alone = [row.tokens for request in requests for row in written(model, [request])]
    assert [row.tokens for row in written(model, requests)] == alone
    assert [len(tokens) for tokens in alone] == [30, 54, 54, 5, 5, 5, 12]
    if choice == GREEDY and name != "int8":
        assert alone[0] == naive(model, requests[0].ids, 30, 64)
    else:
        assert choice == GREEDY or alone[1] != alone[2]


@pytest.mark.parametrize("name", ["gpt2", "documents", "learned positions", "documents in a window"])
@pytest.mark.parametrize("context", [1, 9, 33])
def test_beyond_the_context_the_cache_follows_the_rule(
    name: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = model_of(name), some_prompts(3, 8, 40, 5)
    expected = [naive(model, ids, 30, context) for ids in prompts]
    requests = [Request(ids, 30, choice=GREEDY) for ids in prompts]
    assert [row.tokens for row in written(model, requests, context)] == expected  # rows at places of their own
    assert written(model, requests[:1], context)[0].tokens == expected[0]  # at one place
    if name == "gpt2":
        static = lambda model, k, v, *_: StaticStep(model, k, v)  # noqa: E731
        monkeypatch.setattr("regpt2.sampling.generate.recorded_if_faster", static)
        assert written(model, requests[2:3], context)[0].tokens == expected[2]


def test_a_single_prompt_draws_what_generate_draws() -> None:
    model, ids = random_gpt(GPTConfig(**SHAPE)), torch.tensor([[1, 2, 3]] * 3)
    expected = generate(model, ids, 30, top_k=40, generator=torch.Generator().manual_seed(5))
    rows = written(model, [Request((1, 2, 3), 30, 3, Choice(top_k=40), seed=5)])
    assert [row.tokens for row in rows] == expected[:, 3:].tolist()


def test_each_request_has_its_own_options() -> None:
    model, (one, other) = random_gpt(GPTConfig(**SHAPE)), some_prompts(4, 6)
    requests = [
        Request(one, 10, choice=GREEDY),
        Request(other, 20, choice=Choice(2.0, 0), seed=1, logprobs=2),
        Request(other, 7, choice=Choice(2.0, 0, repetition_penalty=1e6), seed=2),
    ]
    rows = written(model, requests)
    assert [row.tokens for row in rows] == [written(model, [request])[0].tokens for request in requests]
    assert [len(row.logprobs) for row in rows] == [10, 20, 7] and len(rows[1].logprobs[0].top) == 2
    assert len({*rows[2].tokens, *other}) == 7 + len({*other}), "with such a penalty no id comes twice"


def test_log_probabilities_are_those_of_the_models_own_distribution() -> None:
    model, (ids,) = random_gpt(GPTConfig(**SHAPE)), some_prompts(5)
    request = Request(ids, 12, choice=Choice(0.5, 3, repetition_penalty=1.5), logprobs=4)
    (row,) = written(model, [request])
    with torch.no_grad():
        log_p = model(torch.tensor([[*ids, *row.tokens]]))[0].double().log_softmax(dim=1)
    for kept, own in zip(row.logprobs, log_p[len(ids) - 1 :], strict=False):
        assert kept.logprob == pytest.approx(float(own[kept.token]), abs=1e-4)
        assert [token for token, _ in kept.top] == own.topk(4).indices.tolist()
        assert [p for _, p in kept.top] == pytest.approx(own.topk(4).values.tolist(), abs=1e-4)
    assert [kept.token for kept in row.logprobs] == row.tokens
    (row,) = written(model, [replace(request, logprobs=0)])
    assert all(not kept.top for kept in row.logprobs)


@needs_bf16
def test_rows_of_unequal_length_are_written_in_bf16_too() -> None:
    model = model_of("gpt2").to(torch.bfloat16)
    rows = written(model, [Request(ids, 20, choice=GREEDY, logprobs=0) for ids in some_prompts(3, 25, 9)])
    for row in rows:
        with torch.no_grad():
            log_p = model(torch.tensor([[*row.request.ids, *row.tokens]]))[0].float().log_softmax(dim=1)
        own = [float(one[token]) for one, token in zip(log_p[-21:], row.tokens, strict=False)]
        assert [kept.logprob for kept in row.logprobs] == pytest.approx(own, abs=0.2)  # 6 steps of bf16 at a logit of 8


def fed(text: bytes, *stop: str, most: int = 100, stop_ids: tuple[int, ...] = ()) -> tuple[Row, list[str]]:
    row = Row(Request((256,), most, stop=stop, stop_ids=stop_ids), TEXT)
    pieces = []
    for token in [*text, 256]:
        row.take(token)
        pieces.append(row.new)
    return row, [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "reason"),
    [
        ("abc", (), ["a", "b", "c"], "end_of_text"),
        ("a\nQ: b", ("\nQ:",), ["a"], "stop"),
        ("aab", ("ab",), ["a"], "stop"),
        ("aaxaab", ("aab",), ["aax"], "stop"),
        ("xababac!", ("ababc", "abac"), ["x", "ab"], "stop"),
        ("a\nQ", ("\nQ:",), ["a", "\nQ"], "end_of_text"),
        ("a👍é", ("é",), ["a", "👍"], "stop"),
        ("abc", ("abc", "b"), ["a"], "stop"),
        ("abc", ("a",), [], "stop"),
    ],
)
def test_a_stop_text_ends_the_text_and_no_part_of_it_is_shown(
    text: str, stop: tuple[str, ...], pieces: list[str], reason: str
) -> None:
    row, shown = fed(text.encode(), *stop)
    assert row.finish_reason == reason and shown == pieces and row.text == "".join(pieces)


def test_a_stop_text_within_a_token_ends_the_text_too() -> None:
    class Words(BytesTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.id_bytes[1:4] = [b"one Q", b": two", b"Q: three"]

    row = Row(Request((0,), 9, stop=("Q:",)), Words())
    row.take(1)
    assert row.new == "one " and row.finish_reason is None
    row.take(2)
    assert row.new == "" and row.finish_reason == "stop" and row.text == "one " and row.tokens == [1, 2]
    row.take(3)
    assert row.tokens == [1, 2] and row.text == "one "


def test_what_was_held_back_is_shown_at_the_end() -> None:
    row, shown = fed(b"ab\nQ", "\nQ:", most=4)
    assert row.text == "ab\nQ" and row.finish_reason == "length" and len(row.tokens) == 4
    row, shown = fed("a👍".encode()[:3], most=3)
    assert row.text == "a\ufffd" and shown == ["a", "\ufffd"]
    row, shown = fed(b"abc", stop_ids=(98,))
    assert row.text == "a" and row.finish_reason == "stop" and row.tokens == [97, 98]


def test_a_row_that_ends_leaves_its_neighbors_alone() -> None:
    model, (one, other) = model_of("gpt2"), some_prompts(3, 8)
    free = written(model, [Request(one, 20, choice=GREEDY)])[0].tokens
    requests = [Request(one, 20, choice=GREEDY, stop_ids=(free[4],)), Request(other, 20, choice=GREEDY)]
    steps = write(model, Endless(), requests, context=64)
    rows = next(steps)
    while rows[0].finish_reason is None:
        rows = next(steps)
    assert rows[0].tokens == free[: free.index(free[4]) + 1]
    rows = list(steps)[-1]
    assert rows[1].tokens == naive(model, other, 20, 64) and rows[1].finish_reason == "length"


@pytest.mark.parametrize("training", [True, False])
def test_a_step_can_be_the_last_one(training: bool) -> None:
    model = random_gpt(GPTConfig(**SHAPE)).train(training)
    steps = write(model, Endless(), [Request((1,), 50), Request((1, 2), 50)], context=64)
    next(steps)[0].cancel()
    rows = next(steps)
    assert [len(row.tokens) for row in rows] == [1, 2] and rows[0].finish_reason == "cancelled"
    steps.close()
    assert model.training == training and next(steps, None) is None


def test_models_with_parts_of_their_own_get_prompts_of_equal_length() -> None:
    class Own(GPT):
        def hidden(self, *args: Any, **options: Any) -> Tensor:
            return super().hidden(*args, **options)

    hooked = random_gpt(GPTConfig(**SHAPE))
    hooked.h[1].register_forward_hook(lambda block, given, x: x)
    requests = {str(n): Request(ids, 5, 2) for n, ids in enumerate(some_prompts(3, 5, 3, 70, 80))}
    for model in (Own(GPTConfig(**SHAPE)), hooked):
        assert not may_differ_in_length(model)
        assert list(batches(model, requests, 16, 64)) == [["0", "2"], ["1"], ["3", "4"]]
    assert list(batches(model_of("gpt2"), requests, 4, 64)) == [["0", "1"], ["2", "3"], ["4"]]
    assert list(batches(model_of("modern"), requests, 1, 64)) == [[name] for name in requests]


def test_a_broken_model_is_refused() -> None:
    model = random_gpt(GPTConfig(**SHAPE))
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    with pytest.raises(CheckpointError, match="logits are not finite"):
        written(model, [Request((1,), 3), Request((1, 2), 3)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"n": 0}, "n = 0 must be at least 1"),
        ({"seed": -1}, "seed = -1 must be from 0"),
        ({"stop": ("a", "")}, "stop = '' is in every text"),
    ],
)
def test_impossible_requests_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(**{"ids": (1,), "max_new_tokens": 3, **values})
