"""The engine's thread: random traffic from several others, cancels, a bounded queue, an end in time."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_gpt import random_gpt
from test_writing import GREEDY, SHAPE, Endless, model_of, naive, some_prompts, written
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.batching.engine import Engine, EngineClosed, Event, Failed, Piece, Prompt, QueueFull, Ticket
from regpt2.sampling.draw import Choice
from regpt2.sampling.writing import Request

WAIT_S = 60  # a test that waits longer has failed


class Listener:
    """Keeps the events of one request, and knows when the last one has come."""

    def __init__(self, request: Request, *, until: Callable[["Listener"], bool] | None = None) -> None:
        self.request, self.events, self.until = request, list[Event](), until
        self.is_over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        n_done = sum(isinstance(one, Piece) and one.finish_reason is not None for one in self.events)
        if isinstance(event, Failed) or n_done == self.request.n or (self.until and self.until(self)):
            self.is_over.set()

    def wait(self) -> "Listener":
        assert self.is_over.wait(WAIT_S), "its last event never came"
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Piece) for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture
def engine_of() -> Any:
    engines: list[Engine] = []

    def make(model: LanguageModel, **how: Any) -> Engine:
        engines.append(Engine(model, Endless(), **{"context": 64, "slots": 4, **how}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0)


def wrote(engine: Engine, request: Request, **how: Any) -> Listener:
    """A request, complete."""
    listener = Listener(request)
    engine.submit(request, listener, **how)
    return listener.wait()


class Held:
    """Holds the engine's thread between two steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.may_go = engine, threading.Event()

    def __enter__(self) -> "Held":
        is_held = threading.Event()
        self.engine.between_steps(lambda: (is_held.set(), self.may_go.wait(WAIT_S)))
        assert is_held.wait(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.may_go.set()


def some_request(dice: random.Random) -> Request:
    length = dice.choice([1, 3, 10, 30, 50])
    ids = tuple(dice.randrange(256) for _ in range(length))
    choice = dice.choice([GREEDY, GREEDY, Choice(1.0), Choice(0.7, 5, 0.9), Choice(0, repetition_penalty=1.3)])
    stop_ids = (dice.randrange(256),) if dice.random() < 0.3 else ()
    return Request(
        ids, dice.randint(1, 80), 1, choice, dice.randrange(99), stop_ids=stop_ids, logprobs=dice.choice([None, 2])
    )


@pytest.mark.parametrize("name", ["gpt2", "documents"])
def test_in_random_traffic_each_text_is_the_one_that_it_is_alone(name: str, engine_of: Any) -> None:
    """In fp64: the threads decide who meets whom, so in fp32 two tokens could now and then be equally likely."""
    model = model_of(name).double()
    engine = engine_of(model, most_waiting=100)
    n_finished, n_left = 0, 0

    def client(seed: int) -> list[Listener]:
        dice, finished = random.Random(seed), []
        for _ in range(8):
            listener = Listener(some_request(dice))
            ticket = engine.submit(listener.request, listener)
            if dice.random() < 0.3:
                listener.is_over.wait(dice.random() * 0.05)
                ticket.cancel()
                n_events = len(listener.events)
                wrote(engine, Request((1,), 3))
                assert len(listener.events) == n_events, "it got something after it had left"
            elif dice.random() < 0.7:
                finished.append(listener.wait())
            else:
                finished.append(listener)
        return finished

    with ThreadPoolExecutor(4) as pool:
        for listeners in pool.map(client, range(4)):
            for listener in listeners:
                alone = written(model, [listener.wait().request])[0]
                assert (listener.tokens, listener.text) == (alone.tokens, alone.text)
                n_finished, n_left = n_finished + 1, n_left + (alone.finish_reason == "stop")
    assert n_finished > 12 and n_left > 0
    engine.between_steps(lambda: None).result(WAIT_S)
    load = engine.load()
    assert (load.slots, load.active, load.waiting) == (4, 0, 0) and load.tokens > 100


def test_the_memory_is_taken_at_once_and_its_size_is_known(engine_of: Any) -> None:
    engine = engine_of(model_of("gpt2"))
    assert engine.cache_bytes == 2 * 2 * 4 * 64 * 32 * 4  # keys and values, layers, slots, tokens, width, bytes
    with pytest.raises(UsageError, match=r"slots = 1,000,000,000,000 x context = 64 tokens: there is no memory"):
        Engine(model_of("gpt2"), Endless(), context=64, slots=10**12)


def test_more_memory_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would give it, and end the process when it is written."""
    monkeypatch.setattr("regpt2.sampling.batching.slots.free_bytes", lambda device: 131_071)
    with pytest.raises(UsageError, match=r"there is no memory for their keys and values: 0\.00 GB, 0\.00 GB are free"):
        Engine(model_of("gpt2"), Endless(), context=64, slots=4)
    monkeypatch.setattr("regpt2.sampling.batching.slots.free_bytes", lambda device: 131_072)
    assert Engine(model_of("gpt2"), Endless(), context=64, slots=4).close(0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"slots": 0}, "slots = 0 "),
        ({"most_waiting": 0}, "waiting requests = 0 must be at least 1"),
        ({"context": 65}, "context = 65 must be from 1 to block_size = 64"),
    ],
)
def test_an_impossible_engine_is_refused(how: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(model_of("gpt2"), Endless(), **{"context": 64, **how})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt has no tokens"),
        (Request((1, 257), 3), "outside the model's vocabulary of 257"),
        (Request((-1,), 3), "outside the model's vocabulary"),
        (Request((1,), 3, logprobs=258), "logprobs = 258 must be from 0"),
        (Request((1,) * 65, 3), "65 tokens cannot be scored: the context is 64"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(request_: Request, message: str, engine_of: Any) -> None:
    with pytest.raises(UsageError, match=message):
        engine_of(model_of("gpt2")).submit(request_, print, score_prompt=True)


def test_more_requests_than_may_wait_are_refused_until_one_is_cancelled(engine_of: Any) -> None:
    engine = engine_of(model_of("gpt2"), slots=1, most_waiting=2)
    request = Request((1, 2), 5, choice=GREEDY)
    listeners = [Listener(request) for _ in range(3)]
    with Held(engine):
        tickets = [engine.submit(request, listener) for listener in listeners[:2]]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit(request, print)
        assert engine.load().waiting == 2
        tickets[0].cancel()
        assert engine.load().waiting == 1
        engine.submit(request, listeners[2])
    assert listeners[1].wait().tokens == listeners[2].wait().tokens == naive(engine.model, (1, 2), 5, 64)
    assert not listeners[0].events


def test_a_listener_may_cancel_and_gets_nothing_more(engine_of: Any) -> None:
    engine, tickets, events = engine_of(model_of("gpt2")), list[Ticket](), list[Event]()

    def listen(event: Event) -> None:
        events.append(event)
        if len(events) == 5:
            tickets[0].cancel()

    with Held(engine):
        tickets.append(engine.submit(Request((1,), 60, choice=GREEDY), listen))
    wrote(engine, Request((1, 2), 60, choice=GREEDY))
    assert len(events) == 5 and engine.load().active == 0


def test_a_bug_in_a_listener_ends_its_request_alone(engine_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine, n_calls = engine_of(model_of("gpt2")), []

    def broken(event: Event) -> None:
        n_calls.append(event)
        raise KeyError("a bug")

    with Held(engine):
        engine.submit(Request((1,), 60, choice=GREEDY), broken)
        beside = Listener(Request((1, 2), 20, choice=GREEDY))
        engine.submit(beside.request, beside)
    assert beside.wait().tokens == naive(engine.model, (1, 2), 20, 64) and len(n_calls) == 1
    assert "what listens to it failed: KeyError: 'a bug'" in capsys.readouterr().err


def test_a_bug_of_ours_ends_what_it_meets_and_not_the_engine(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model_of("gpt2"))
    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "_prepare", lambda: 1 // 0)
        with Held(engine):
            running = Listener(Request((1,), 9), until=lambda one: True)
            engine.submit(running.request, running)
            engine._batch.job = engine._take_job()
        last = running.wait().events[-1]
        assert isinstance(last, Failed) and isinstance(last.error, ZeroDivisionError)
    assert len(wrote(engine, Request((1,), 9)).tokens) == 9


def test_work_between_steps_runs_in_the_engines_thread_without_gradients(engine_of: Any) -> None:
    engine = engine_of(model_of("gpt2").train())
    done = engine.between_steps(
        lambda: (threading.current_thread().name, torch.is_grad_enabled(), engine.model.training)
    )
    assert done.result(WAIT_S) == ("engine", False, False)
    with pytest.raises(ZeroDivisionError):
        engine.between_steps(lambda: 1 // 0).result(WAIT_S)
    assert wrote(engine, Request((1,), 3)).tokens


def test_an_idle_engine_does_nothing(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, n_turns = engine_of(model_of("gpt2")), []
    turn = engine._batch.turn
    monkeypatch.setattr(engine._batch, "turn", lambda: n_turns.append(turn()))
    wrote(engine, Request((1,), 3))
    engine.between_steps(lambda: None).result(WAIT_S)
    n_before = len(n_turns)
    threading.Event().wait(0.2)
    assert len(n_turns) <= n_before + 1  # that of the work between


def test_a_prompt_is_scored_beside_others(engine_of: Any) -> None:
    engine, (ids,) = engine_of(model_of("gpt2")), some_prompts(30)
    with torch.no_grad():
        log_p = engine.model(torch.tensor([ids]))[0].double().log_softmax(dim=1)
    scored = Listener(Request(ids, 1), until=lambda one: True)
    engine.score(ids, scored, logprobs=1)
    listener = wrote(engine, Request(ids, 4, choice=GREEDY, logprobs=1), score_prompt=True)
    assert scored.wait().events == listener.events[:1] and len(listener.events) == 5
    (prompt,) = scored.events
    assert isinstance(prompt, Prompt)
    own = [float(row[token]) for row, token in zip(log_p, ids[1:], strict=False)]
    assert [one.logprob for one in prompt.logprobs if one] == pytest.approx(own, abs=1e-4)


def test_closing_finishes_what_was_taken_and_takes_no_more(engine_of: Any) -> None:
    engine = engine_of(model_of("gpt2"), slots=2)
    listeners = [Listener(Request(ids, 30, choice=GREEDY)) for ids in some_prompts(*range(2, 8))]
    with Held(engine) as held:
        for listener in listeners:
            engine.submit(listener.request, listener)
        threading.Timer(0.1, held.may_go.set).start()
        assert engine.close(WAIT_S)
    for listener in listeners:
        assert listener.is_over.is_set() and listener.tokens == naive(engine.model, listener.request.ids, 30, 64)
    with pytest.raises(EngineClosed):
        engine.submit(listeners[0].request, print)
    with pytest.raises(EngineClosed):
        engine.between_steps(lambda: None).result(WAIT_S)
    assert engine.close(0)


def test_what_is_not_done_in_time_fails(engine_of: Any) -> None:
    engine = engine_of(model_of("gpt2"), slots=1)
    running, waiting = (Listener(Request(ids, 1_000_000, choice=GREEDY)) for ids in some_prompts(2, 3))
    running.until = lambda one: len(one.events) == 3
    for listener in (running, waiting):
        engine.submit(listener.request, listener)
    running.wait()
    assert not engine.close(0)
    for listener in (running, waiting):
        last = listener.wait().events[-1]
        assert isinstance(last, Failed) and isinstance(last.error, EngineClosed)


LEFT_OPEN = """
import threading
from regpt2.data.tokenizer import BytesTokenizer
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.sampling.batching.engine import Engine
from regpt2.sampling.writing import Request
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257))
engine, runs = Engine(model, BytesTokenizer(), context=64), threading.Event()
engine.submit(Request((1,), 1_000_000, 8), lambda event: runs.set())
runs.wait()
"""


@pytest.mark.seconds
def test_python_may_end_while_an_engine_writes() -> None:
    """A thread that is within torch when Python ends would abort it."""
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=WAIT_S)
    assert (ended.returncode, ended.stderr) == (0, "")


def own_model() -> LanguageModel:
    class Own(GPT):
        def hidden(self, *args: Any, **options: Any) -> Tensor:
            return super().hidden(*args, **options)

    return Own(GPTConfig(**SHAPE))


def test_models_with_parts_of_their_own_write_one_request_after_another(engine_of: Any) -> None:
    hooked = random_gpt(GPTConfig(**SHAPE))
    hooked.h[1].register_forward_hook(lambda block, given, x: x * 1.5)
    for model in (hooked, own_model()):
        engine, order = engine_of(model), list[int]()
        listeners = [Listener(Request(ids, 9, 2, Choice(), logprobs=1)) for ids in some_prompts(3, 9, 6)]
        for number, listener in enumerate(listeners):
            engine.submit(
                listener.request,
                lambda event, number=number, listener=listener: (order.append(number), listener(event)),
                score_prompt=True,
            )
        scored = Listener(Request((1,), 1), until=lambda one: True)
        engine.score((1, 2, 3), scored)
        scored.wait()
        assert order == [0] * 19 + [1] * 19 + [2] * 19
        for listener in listeners:
            for index in range(2):
                request = Request(listener.request.ids, 9, 1, Choice(), seed=42 + index)
                pieces = [one for one in listener.events[1:] if isinstance(one, Piece) and one.index == index]
                assert [piece.tokens[0] for piece in pieces] == written(model, [request])[0].tokens
            first, own = listener.events[0], model(torch.tensor([listener.request.ids]))[0].log_softmax(dim=1)
            assert isinstance(first, Prompt) and first.logprobs[0] is None
            expected = own[:-1].gather(1, torch.tensor(listener.request.ids[1:])[:, None])[:, 0].tolist()
            assert [one.logprob for one in first.logprobs if one] == pytest.approx(expected, abs=1e-4)


def test_such_a_model_s_requests_can_be_cancelled_and_fail_alone(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(own_model())
    running = Listener(Request((1,), 1_000_000, choice=GREEDY), until=lambda one: len(one.events) == 3)
    ticket = engine.submit(running.request, running)
    running.wait()
    ticket.cancel()
    n_events = len(running.events)
    assert len(wrote(engine, Request((1, 2), 4)).tokens) == 4 and len(running.events) == n_events
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "head", lambda x: x[..., :257] * float("nan"))
        assert isinstance(wrote(engine, Request((1, 2), 4)).events[-1], Failed)
    assert len(wrote(engine, Request((1, 2), 4)).tokens) == 4
