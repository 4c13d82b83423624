"""Rows that join and leave: each text is the one that it is alone, turn by turn, without threads."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gpt import random_gpt, transformers_twin
from test_writing import GREEDY, MODELS, SHAPE, Endless, model_of, naive, some_prompts, written
from torch import Tensor

from conftest import needs_bf16
from regpt2.base.errors import CheckpointError
from regpt2.model.gpt import GPTConfig
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.batching.batch import Batch, Job
from regpt2.sampling.batching.events import Event, Failed, Piece, Prompt, Ticket
from regpt2.sampling.batching.slots import Slots
from regpt2.sampling.draw import Choice
from regpt2.sampling.writing import Request

DRAWN = Choice(1.5, 20, 0.9, 0.01, 1.2)


class Heard:
    """A request in the line, and what its listener got."""

    def __init__(self, request: Request, *, context: int = 64, **how: bool) -> None:
        self.events: list[Event] = []
        self.ticket = Ticket(self.events.append)
        self.job = Job(request, self.ticket, context, **how)

    def tokens(self, index: int = 0) -> list[int]:
        pieces = [event for event in self.events if isinstance(event, Piece) and event.index == index]
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        return [token for piece in pieces for token in piece.tokens]

    @property
    def error(self) -> str:
        """Of a request that failed: nothing comes behind it."""
        last = self.events[-1]
        assert isinstance(last, Failed)
        return str(last.error)

    @property
    def is_complete(self) -> bool:
        done = [event for event in self.events if isinstance(event, Piece) and event.finish_reason]
        return len(done) == self.job.request.n


def batch_of(model: LanguageModel, *line: Heard, slots: int = 8, context: int = 64, chunk: int = 64) -> Batch:
    waiting = deque(line)

    def take() -> Job | None:
        while waiting and waiting[0].ticket.is_over:
            waiting.popleft()
        return waiting.popleft().job if waiting else None

    batch = Batch(Slots(model, slots, context), Endless(), take)
    batch.chunk = chunk
    return batch


def finish(batch: Batch) -> int:
    """How many turns it takes."""
    n_idle = 0
    for n in range(1, 1000):
        turns(batch, 1)
        n_idle = 0 if batch.is_busy else n_idle + 1
        if n_idle == 2:  # the line was empty too
            return n - 1
    raise AssertionError("it never ends")


def turns(batch: Batch, n: int) -> None:
    with torch.no_grad():
        for _ in range(n):
            batch.turn()


class Passes:
    """The shapes (rows, tokens) of all passes through the model of a batch."""

    def __init__(self, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        hidden = batch.slots.decoder.hidden

        def counted(ids: Tensor, *rest: Any, **more: Any) -> Tensor:
            self.shapes.append(tuple(ids.shape))
            return hidden(ids, *rest, **more)

        monkeypatch.setattr(batch.slots.decoder, "hidden", counted)

    @property
    def steps(self) -> list[int]:
        return [rows for rows, tokens in self.shapes if tokens == 1]


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(name: str, dtype: torch.dtype) -> None:
    model = model_of(name) if name == "int8" else model_of(name).to(dtype)
    (ids,) = some_prompts(50)
    slots = Slots(model, 3, 64)
    with torch.no_grad():
        for start in range(0, 50, 7):
            x = slots.prepare(torch.tensor(ids[start : start + 7]), start)
        expected = model.head(model.hidden(torch.tensor([ids])))[0, -1]
    got = slots.decoder.head(x[-1])
    # int8 rounds activations to 1 part in 254, bf16 to 1 in 256, fp32 sums in another order
    most = 1e-4 if dtype == torch.float32 and name != "int8" else 0.1
    torch.testing.assert_close(got.float(), expected.float(), atol=most, rtol=most)


def test_greedy_texts_are_those_of_transformers() -> None:
    model, twin = random_gpt(GPTConfig(**SHAPE)), transformers_twin(random_gpt(GPTConfig(**SHAPE)))
    asked = [(3, 20), (12, 52), (1, 9), (33, 31), (12, 1), (40, 24), (7, 40)]
    heard = [
        Heard(Request(ids, n_new, choice=GREEDY))
        for ids, (_, n_new) in zip(some_prompts(*(length for length, _ in asked)), asked, strict=True)
    ]
    finish(batch_of(model, *heard, slots=3, chunk=16))
    for one in heard:
        request = one.job.request
        ids = torch.tensor([request.ids])
        expected = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert one.tokens() == expected[0, len(request.ids) :].tolist()


@needs_bf16
@pytest.mark.parametrize("name", ["gpt2", "documents"])
def test_in_bf16_each_token_has_the_probability_that_the_whole_text_gives_it(name: str) -> None:
    """Greedy texts may differ where two tokens are equally likely within bf16's rounding, so this looks deeper."""
    model = model_of(name).to(torch.bfloat16)
    heard = [Heard(Request(ids, 20, choice=GREEDY, logprobs=0)) for ids in some_prompts(3, 25, 9, 14)]
    finish(batch_of(model, *heard, slots=3, chunk=8))
    for one in heard:
        ids = [*one.job.request.ids, *one.tokens()]
        with torch.no_grad():
            log_p = model(torch.tensor([ids]))[0].float().log_softmax(dim=1)
        kept = [logprob for event in one.events if isinstance(event, Piece) for logprob in event.logprobs]
        own = [float(row[token]) for row, token in zip(log_p[-21:], one.tokens(), strict=False)]
        assert [each.logprob for each in kept] == pytest.approx(own, abs=0.2)  # 6 steps of bf16 at a logit of 8


@pytest.mark.parametrize("choice", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("context", [64, 9, 1])
@pytest.mark.parametrize("name", MODELS)
def test_each_text_is_the_one_that_it_is_alone(name: str, context: int, choice: Choice) -> None:
    """Also beyond the context, with rows that end while others grow, so that the last ones move into their slots."""
    model = model_of(name)
    asked = [(9, 30), (2, 54), (30, 5), (9, 12), (64, 7), (1, 60), (33, 1), (5, 3)]
    heard = [
        Heard(Request(ids, n_new, choice=choice, seed=n_new), context=context)
        for ids, (_, n_new) in zip(some_prompts(*(length for length, _ in asked)), asked, strict=True)
    ]
    finish(batch_of(model, *heard, slots=3, context=context, chunk=10))
    for one in heard:
        assert one.tokens() == written(model, [one.job.request], context)[0].tokens
    if choice == GREEDY and name != "int8":
        assert heard[0].tokens() == naive(model, heard[0].job.request.ids, 30, context)


def test_each_continuation_draws_with_the_seed_of_its_index_and_the_prompt_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (ids,) = model_of("gpt2"), some_prompts(20)
    for slots, n_prompt_ids in ((8, 20), (3, 20)):
        one = Heard(Request(ids, 12, 7, DRAWN, seed=5))
        batch = batch_of(model, one, slots=slots)
        passes = Passes(batch, monkeypatch)
        finish(batch)
        alone = [written(model, [replace(one.job.request, n=1, seed=5 + i)])[0].tokens for i in range(7)]
        assert [one.tokens(i) for i in range(7)] == alone and one.is_complete
        assert len({*map(tuple, alone)}) > 1
        assert sum(tokens for _, tokens in passes.shapes if tokens > 1) == n_prompt_ids * (1 if slots == 8 else 3)


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("documents", [(1, 9), (1, 4), (1, 30)]),
        ("documents in a window", [(1, 9), (1, 4), (1, 30), (1, 30)]),  # the first one has overwritten its prompt
    ],
)
def test_continuations_that_begin_later_copy_the_prompt_of_one_that_runs(
    name: str, prompts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three slots are busy; one becomes free while the first continuation runs."""
    model, (a, b, c) = model_of(name), some_prompts(9, 4, 30)
    short, long = Heard(Request(a, 5, choice=GREEDY)), Heard(Request(b, 40, choice=GREEDY))
    twice = Heard(Request(c, 20, 2, DRAWN, seed=1))
    batch = batch_of(model, short, long, twice, slots=3)
    passes = Passes(batch, monkeypatch)
    finish(batch)
    assert [shape for shape in passes.shapes if shape[1] > 1] == prompts
    monkeypatch.undo()
    for index in range(2):
        expected = written(model, [replace(twice.job.request, n=1, seed=1 + index)])[0].tokens
        assert twice.tokens(index) == expected


def test_a_step_computes_only_the_rows_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = [Heard(Request(ids, n, choice=GREEDY)) for ids, n in zip(some_prompts(4, 5, 6), (3, 6, 4), strict=True)]
    batch = batch_of(model_of("gpt2"), *heard)
    passes = Passes(batch, monkeypatch)
    assert finish(batch) == 5
    assert passes.steps == [3, 3, 2, 1, 1]  # the first token of each comes with its prompt


def test_rows_may_come_to_one_place_and_part_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at one place need no mask; the one of before would hide the newest keys."""
    model, places = model_of("gpt2"), list[bool]()
    heard = [
        Heard(Request(ids, n, choice=GREEDY)) for ids, n in zip(some_prompts(3, 5, 5, 9), (9, 3, 30, 9), strict=True)
    ]
    batch = batch_of(model, *heard, slots=2)
    step = batch.slots.step
    monkeypatch.setattr(batch.slots, "step", lambda ids, at: places.append(len(set(at)) == 1) or step(ids, at))
    finish(batch)
    assert places[:9] == [False, False, *[True] * 6, False]
    for one in heard:
        assert one.tokens() == naive(model, one.job.request.ids, one.job.request.max_new_tokens, 64)


def test_a_long_prompt_does_not_stop_the_rows_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (Heard(Request(ids, 30, choice=GREEDY)) for ids in some_prompts(3, 30))
    batch = batch_of(model_of("gpt2"), short, chunk=8)
    passes = Passes(batch, monkeypatch)
    turns(batch, 1)
    batch.job = long.job
    turns(batch, 3)
    assert len(short.tokens()) == 5 and len(long.tokens()) == 0
    assert [tokens for _, tokens in passes.shapes if tokens > 1] == [3, 8, 8, 8]
    turns(batch, 1)
    assert len(short.tokens()) == 6 and len(long.tokens()) == 2


def test_requests_that_come_together_begin_together() -> None:
    heard = [Heard(Request(ids, 9, choice=GREEDY)) for ids in some_prompts(20, 20, 20, 20)]
    batch = batch_of(model_of("gpt2"), *heard, chunk=25)
    turns(batch, 1)
    assert [len(one.tokens()) for one in heard] == [2, 2, 2, 2]


def test_first_come_first_served() -> None:
    order: list[int] = []
    heard = [Heard(Request(ids, 5 + n, 1 + n % 3, choice=GREEDY)) for n, ids in enumerate(some_prompts(9, 3, 20, 8, 2))]
    for n, one in enumerate(heard):
        one.ticket._on_event = lambda event, n=n, one=one: (order.append(n), one.events.append(event))
    finish(batch_of(model_of("gpt2"), *heard, slots=2))
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3, 4] and all(one.is_complete for one in heard)


def test_a_cancelled_row_leaves_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    heard = [Heard(Request(ids, 30, choice=GREEDY)) for ids in some_prompts(4, 9, 6, 5)]
    batch = batch_of(model, *heard, slots=3)
    turns(batch, 2)
    heard[0].ticket.cancel()
    n_events = len(heard[0].events)
    turns(batch, 1)
    assert batch.n_active == 3 and len(heard[3].tokens()) == 2, "the next one has its slot at once"
    finish(batch)
    assert len(heard[0].events) == n_events == 3
    for one in heard[1:]:
        assert one.tokens() == naive(model, one.job.request.ids, 30, 64)


def test_a_request_can_be_cancelled_in_the_line_and_while_its_prompt_is_computed() -> None:
    model = model_of("gpt2")
    heard = [Heard(Request(ids, 9, choice=GREEDY)) for ids in some_prompts(30, 30, 5)]
    batch = batch_of(model, *heard, slots=1, chunk=3)
    turns(batch, 2)
    assert batch.n_active == 1 and not batch.rows
    heard[0].ticket.cancel()
    heard[1].ticket.cancel()
    turns(batch, 1)
    assert [len(one.events) for one in heard] == [0, 0, 2]
    finish(batch)
    assert heard[2].tokens() == naive(model, heard[2].job.request.ids, 9, 64)


def test_log_probabilities_are_those_of_write() -> None:
    model, prompts = model_of("gpt2"), some_prompts(4, 9, 6)
    requests = [Request(ids, 9, choice=DRAWN, logprobs=most) for ids, most in zip(prompts, (2, None, 4), strict=True)]
    heard = [Heard(request) for request in requests]
    finish(batch_of(model, *heard))
    for one in heard:
        kept = [logprob for event in one.events if isinstance(event, Piece) for logprob in event.logprobs]
        expected = written(model, [one.job.request])[0].logprobs
        assert [(each.token, [token for token, _ in each.top]) for each in kept] == [
            (each.token, [token for token, _ in each.top]) for each in expected
        ]
        assert [each.logprob for each in kept] == pytest.approx([each.logprob for each in expected], abs=1e-4)


@pytest.mark.parametrize("chunk", [64, 7, 1])
def test_a_scored_prompt_has_the_log_probabilities_of_transformers(chunk: int) -> None:
    model, (ids, other) = random_gpt(GPTConfig(**SHAPE)), some_prompts(41, 5)
    with torch.no_grad():
        log_p = transformers_twin(model)(torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
    request = Request(ids, 3, 2, GREEDY, logprobs=4)
    runs = Heard(Request(other, 30, choice=GREEDY))
    writes, only_scored = Heard(request, scores_prompt=True), Heard(request, scores_prompt=True, writes=False)
    finish(batch_of(model, runs, writes, only_scored, chunk=chunk))
    assert len(only_scored.events) == 1 and len(writes.events) == 7 and writes.is_complete
    assert runs.tokens() == naive(model, other, 30, 64)
    for one in (writes, only_scored):
        first = one.events[0]
        assert isinstance(first, Prompt) and first.logprobs[0] is None and len(first.logprobs) == 41
        for kept, token, own in zip(first.logprobs[1:], ids[1:], log_p, strict=False):
            assert kept is not None and kept.token == token
            assert kept.logprob == pytest.approx(float(own[token]), abs=1e-4)
            assert [each for each, _ in kept.top] == own.topk(4).indices.tolist()


def test_logits_of_a_scored_prompt_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Heard(Request(some_prompts(60)[0], 1), scores_prompt=True)
    batch = batch_of(model_of("gpt2"), one, chunk=16)
    head, rows = batch.slots.decoder.head, []
    monkeypatch.setattr(batch.slots.decoder, "head", lambda x: rows.append(len(x)) or head(x))
    finish(batch)
    assert max(rows) == 16


def broken_at(batch: Batch, monkeypatch: pytest.MonkeyPatch, name: str, calls: Sequence[int]) -> None:
    """The given calls (from 0 on) of a method of the slots find no memory."""
    method, n_calls = getattr(batch.slots, name), iter(range(10_000))

    def broken(*arguments: Any) -> Tensor:
        if next(n_calls) in calls:
            raise torch.OutOfMemoryError("no memory")
        found: Tensor = method(*arguments)
        return found

    monkeypatch.setattr(batch.slots, name, broken)


def test_a_prompt_that_fails_ends_only_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    heard = [Heard(Request(ids, 9, choice=GREEDY)) for ids in some_prompts(3, 8, 5)]
    batch = batch_of(model, *heard)
    broken_at(batch, monkeypatch, "prepare", [1])
    finish(batch)
    assert heard[1].error == "no memory" and len(heard[1].events) == 1
    for one in (heard[0], heard[2]):
        assert one.tokens() == naive(model, one.job.request.ids, 9, 64)


def test_a_step_that_fails_ends_the_rows_in_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    heard = [Heard(Request(ids, 9, n, GREEDY)) for ids, n in zip(some_prompts(3, 8, 5), (1, 2, 1), strict=True)]
    batch = batch_of(model, *heard, slots=2)
    broken_at(batch, monkeypatch, "step", [3])
    finish(batch)
    assert [one.error for one in heard[:2]] == ["no memory"] * 2 and [len(one.events) for one in heard[:2]] == [5, 5]
    assert heard[2].tokens() == naive(model, heard[2].job.request.ids, 9, 64)


def test_a_row_whose_logits_are_not_finite_ends_alone_and_leaves_nothing_behind() -> None:
    """NaN times zero is NaN, so what a broken row left in its slot would reach the next one through a mask."""
    model = model_of("gpt2")
    heard = [Heard(Request(ids, n, choice=GREEDY)) for ids, n in zip(some_prompts(30, 5, 20), (9, 25, 20), strict=True)]
    batch = batch_of(model, *heard, slots=2)
    turns(batch, 2)
    batch.slots.cache.v[1, 0] = float("nan")
    finish(batch)
    assert "not finite" in heard[0].error and len(heard[0].tokens()) == 3
    for one in heard[1:]:
        assert one.tokens() == naive(model, one.job.request.ids, one.job.request.max_new_tokens, 64)


def test_a_broken_model_is_refused() -> None:
    model = random_gpt(GPTConfig(**SHAPE))
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    heard = [Heard(Request(ids, 9), scores_prompt=True) for ids in some_prompts(3, 70)]
    finish(batch_of(model, *heard))
    for one in heard:
        assert [type(event) for event in one.events] == [Failed] and "not finite" in one.error
        assert isinstance(one.events[0], Failed) and isinstance(one.events[0].error, CheckpointError)


def test_rows_that_choose_alike_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    from regpt2.sampling.batching import pens

    candidates = pens.candidates
    monkeypatch.setattr(pens, "candidates", lambda x, choice: sizes.append(len(x)) or candidates(x, choice))
    choices = [GREEDY, Choice(0.5), Choice(0, 7), Choice(0.5), Choice(0.7)]
    heard = [Heard(Request(ids, 2, choice=one)) for ids, one in zip(some_prompts(*range(3, 8)), choices, strict=True)]
    finish(batch_of(model_of("gpt2"), *heard))
    assert sorted(sizes) == [1] * 5 + [1, 2, 2]
