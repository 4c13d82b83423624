"""Many clients at once, well-behaved and not. In: a port, known texts; out: what was served, how fast, what was wrong.

A client sends one request after the other: streams and whole answers, greedy and drawn, with stop texts and
log-probabilities. Some leave in mid stream or while they wait, some send nonsense. A client that is refused with 429
waits as long as Retry-After says. All choices follow from a seed.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from crowd.http_client import DONE, NO_ANSWER, Answer, ask
from crowd.known import Known

COMPLETIONS = "/v1/completions"
BUSY = 429
REFUSED = {400, 404, 413, 415, 422}
LONGEST_BACK_OFF_S = 30.0

# Bodies that must be refused, and never end more than their own request.
NONSENSE: tuple[bytes | dict[str, Any], ...] = (
    b"",
    b"{",
    b"[1, 2]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    {"prompt": {"text": "a"}},
    {"prompt": [-1]},
    {"prompt": [1 << 40]},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": "ten"},
    {"prompt": "a", "max_tokens": 1 << 40},
    {"prompt": "a" * 60_000, "max_tokens": 1},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "top_p": 2},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 100_000},
    {"prompt": "a", "stop": [1]},
    {"prompt": "a", "logprobs": -1},
    {"prompt": "a", "logprobs": 1 << 30},
    {"prompt": "a", "seed": "x"},
    {"prompt": "a", "stream": "yes"},
    {"prompt": "a", "model": "no such model"},
)


@dataclass(frozen=True)
class Served:
    """A request that was answered to its end."""

    client: int
    waited_s: float
    """From the first attempt to the first token, refusals included."""
    first_token_s: float | None
    """From the attempt that was taken to the first token; None: not a stream."""
    between_tokens_s: tuple[float, ...]
    tokens: int


@dataclass
class Seen:
    """What all clients saw."""

    served: list[Served] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    greedy_checked: int = 0
    drawn_checked: int = 0
    drawn_equal: int = 0
    left: int = 0
    elapsed_s: float = 0.0


class Traffic:
    """Clients of one model."""

    def __init__(self, port: int, model: str, known: list[Known], *, seed: int = 0) -> None:
        self.port, self.model, self.known, self.seed = port, model, known, seed
        self.seen = Seen()

    async def run(self, clients: int, seconds: float) -> Seen:
        """All clients, until the time is over and each has its last answer."""
        began_at = time.perf_counter()
        await asyncio.gather(*(self._client(number, began_at + seconds) for number in range(clients)))
        self.seen.elapsed_s = time.perf_counter() - began_at
        return self.seen

    async def _client(self, number: int, until: float) -> None:
        chosen = random.Random(f"{self.seed}/{number}")
        deeds: list[tuple[float, str, Callable[[int, random.Random, float], Awaitable[None]]]] = [
            (0.60, "stream", self._stream),
            (0.18, "whole", self._whole),
            (0.08, "leaves in mid stream", self._leave_in_mid_stream),
            (0.04, "leaves while it waits", self._leave_early),
            (0.08, "nonsense", self._nonsense),
            (0.02, "looks", self._look),
        ]
        weights = [weight for weight, _, _ in deeds]
        while time.perf_counter() < until:
            _, kind, act = chosen.choices(deeds, weights)[0]
            self.seen.kinds[kind] += 1
            await act(number, chosen, until)

    async def _stream(self, number: int, chosen: random.Random, until: float) -> None:
        known, body = self._body(chosen)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began_at = time.perf_counter()
        answer = await self._patiently(body, chosen, until)
        if answer is None or not self._is_whole(answer, body):
            return
        streamed = read_stream(answer)
        if streamed.problem:
            self.seen.problems.append(f"{streamed.problem}: {brief(body)}")
            return
        self._check(known, body, streamed.texts, streamed.reasons)
        if streamed.usage != streamed.tokens:
            self.seen.problems.append(f"{streamed.tokens} tokens came, usage is {streamed.usage}: {brief(body)}")
        first_at = streamed.token_times[0]
        gaps = tuple(b - a for a, b in pairwise(streamed.token_times)) if body.get("n", 1) == 1 else ()
        self.seen.served.append(Served(number, first_at - began_at, first_at - answer.sent_at, gaps, streamed.tokens))

    async def _whole(self, number: int, chosen: random.Random, until: float) -> None:
        known, body = self._body(chosen)
        began_at = time.perf_counter()
        answer = await self._patiently(body, chosen, until)
        if answer is None or not self._is_whole(answer, body):
            return
        content = answer.json
        if not isinstance(content, dict) or "choices" not in content:
            self.seen.problems.append(f"not an answer: {answer.body[:100]!r}: {brief(body)}")
            return
        texts = {choice["index"]: choice["text"] for choice in content["choices"]}
        self._check(known, body, texts, {choice["index"]: choice["finish_reason"] for choice in content["choices"]})
        tokens = content["usage"]["completion_tokens"]
        self.seen.served.append(Served(number, answer.ended_at - began_at, None, (), tokens))

    async def _leave_in_mid_stream(self, number: int, chosen: random.Random, until: float) -> None:
        _, body = self._body(chosen)
        answer = await self._ask(body | {"stream": True}, leave_after=chosen.randint(1, 6))
        self.seen.left += answer.status == 200

    async def _leave_early(self, number: int, chosen: random.Random, until: float) -> None:
        _, body = self._body(chosen)
        await ask(self.port, COMPLETIONS, body | {"stream": chosen.random() < 0.5}, leave_after_s=chosen.random() * 0.3)
        self.seen.left += 1

    async def _nonsense(self, number: int, chosen: random.Random, until: float) -> None:
        bad = chosen.choice(NONSENSE)
        if isinstance(bad, dict):
            bad = {"model": self.model} | bad
        answer = await self._ask(bad)
        if answer.status == BUSY:
            return
        content = answer.json
        message = content.get("error", {}).get("message") if isinstance(content, dict) else None
        if answer.status not in REFUSED or not isinstance(message, str) or "Traceback" in message:
            self.seen.problems.append(f"{answer.status} {answer.body[:100]!r} to nonsense: {brief(bad)}")

    async def _look(self, number: int, chosen: random.Random, until: float) -> None:
        path = chosen.choice(["/v1/models", "/health"])
        answer = await self._ask(None, path)
        if answer.status != 200:
            self.seen.problems.append(f"{answer.status} to GET {path}")

    async def _ask(
        self, body: bytes | dict[str, Any] | None, path: str = COMPLETIONS, *, leave_after: int | None = None
    ) -> Answer:
        answer = await ask(self.port, path, body, leave_after=leave_after)
        self.seen.statuses[answer.status] += 1
        return answer

    async def _patiently(self, body: dict[str, Any], chosen: random.Random, until: float) -> Answer | None:
        """Asks again after each refusal; None: the time was over first."""
        while True:
            answer = await self._ask(body)
            if answer.status != BUSY:
                return answer
            try:
                pause_s = float(answer.headers["retry-after"])
            except (KeyError, ValueError):
                self.seen.problems.append(f"429 with Retry-After {answer.headers.get('retry-after')!r}")
                pause_s = 1.0
            await asyncio.sleep(min(pause_s, LONGEST_BACK_OFF_S) * (1 + 0.25 * chosen.random()))
            if time.perf_counter() > until:
                return None

    def _body(self, chosen: random.Random) -> tuple[Known, dict[str, Any]]:
        """A known request, at times with options that do not change its text."""
        known = chosen.choice(self.known)
        body = {"model": self.model} | known.body
        if chosen.random() < 0.25:
            body["logprobs"] = chosen.randint(0, 5)
        if known.is_greedy and chosen.random() < 0.15:
            body["n"] = 2
        return known, body

    def _is_whole(self, answer: Answer, body: dict[str, Any]) -> bool:
        if answer.status == 200 and answer.is_whole:
            return True
        what = "no answer" if answer.status == NO_ANSWER else f"{answer.status}, whole: {answer.is_whole}"
        self.seen.problems.append(f"{what}, {answer.body[-200:]!r}: {brief(body)}")
        return False

    def _check(self, known: Known, body: dict[str, Any], texts: dict[int, str], reasons: dict[int, str]) -> None:
        n = body.get("n", 1)
        expected = {index: known.text for index in range(n)}
        is_right = texts == expected and reasons == dict.fromkeys(range(n), known.finish_reason)
        if known.is_greedy:
            self.seen.greedy_checked += 1
            if not is_right:
                got = {index: (texts[index], reasons.get(index)) for index in sorted(texts)}
                self.seen.problems.append(
                    f"wrong text {got}, expected {known.text!r}, {known.finish_reason}: {brief(body)}"
                )
        else:
            self.seen.drawn_checked += 1
            self.seen.drawn_equal += is_right


@dataclass
class Streamed:
    """A stream, put together."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    token_times: list[float] = field(default_factory=list)
    usage: int | None = None
    problem: str = ""

    @property
    def tokens(self) -> int:
        """Those that came."""
        return len(self.token_times)


def read_stream(answer: Answer) -> Streamed:
    """Puts the events of a stream together. One event holds one token."""
    streamed = Streamed()
    if not answer.events or answer.events[-1][1] != DONE:
        streamed.problem = f"the stream ends with {answer.events[-1][1][:200] if answer.events else 'nothing'!r}"
        return streamed
    for came_at, data in answer.events[:-1]:
        try:
            content = json.loads(data)
            usage, choices = content.get("usage"), content["choices"]
            for choice in choices:
                index = choice.get("index", 0)
                streamed.texts[index] = streamed.texts.get(index, "") + choice["text"]
                streamed.token_times.append(came_at)
                if choice["finish_reason"] is not None:
                    streamed.reasons[index] = choice["finish_reason"]
            if usage is not None:
                streamed.usage = usage["completion_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            streamed.problem = f"{type(error).__name__} in the event {data[:200]!r}"
    if not streamed.token_times:
        streamed.problem = "a stream without a token"
    return streamed


def brief(body: bytes | dict[str, Any]) -> str:
    """A request for a message."""
    return repr(body)[:200]


async def until_idle(port: int, *, within_s: float = 10.0) -> tuple[float, dict[str, Any]]:
    """Seconds until no slot is taken and nothing waits, and the last state; past `within_s` it gives up."""
    began_at = time.perf_counter()
    while True:
        content = (await ask(port, "/health")).json or {}
        elapsed_s = time.perf_counter() - began_at
        models = content.get("models", {})
        if models and all(each["active"] == 0 and each["waiting"] == 0 for each in models.values()):
            return elapsed_s, content
        if elapsed_s > within_s:
            return elapsed_s, content
        await asyncio.sleep(0.02)


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def fairness(seen: Seen, clients: int) -> dict[str, float]:
    """How alike clients were served: the worst beside the median one."""
    requests = Counter(each.client for each in seen.served)
    counts = [requests[number] for number in range(clients)]
    waits: dict[int, list[float]] = {}
    for each in seen.served:
        if each.first_token_s is not None:
            waits.setdefault(each.client, []).append(each.waited_s)
    means = [statistics.mean(found) for found in waits.values()] or [float("nan")]
    return {
        "requests_min": min(counts),
        "requests_median": statistics.median(counts),
        "requests_max": max(counts),
        "mean_wait_max_of_median": max(means) / statistics.median(means),
        "longest_wait_s": max((each.waited_s for each in seen.served), default=float("nan")),
    }
