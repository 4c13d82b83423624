"""Clients that each send their next request when the last is answered. In: prompts; out: tokens and times.

Every answer is a stream of the same number of tokens, so that two servers do the same work.
"""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from crowd.http_client import ask
from crowd.known import prose
from crowd.load import BUSY, COMPLETIONS, percentile, read_stream


class NotServed(Exception):
    """A server refused or broke off; the message has its answer."""


@dataclass(frozen=True)
class Steady:
    """What clients got in one turn."""

    elapsed_s: float
    tokens: int
    """Within the time."""
    first_token_s: tuple[float, ...]
    """Of each request: from its sending to its first token, refusals included."""
    between_tokens_s: tuple[float, ...]

    @staticmethod
    def joined(turns: "list[Steady]") -> "Steady":
        """Several turns as one."""
        firsts = tuple(each for turn in turns for each in turn.first_token_s)
        gaps = tuple(each for turn in turns for each in turn.between_tokens_s)
        return Steady(sum(turn.elapsed_s for turn in turns), sum(turn.tokens for turn in turns), firsts, gaps)

    @property
    def tokens_per_s(self) -> float:
        """In total."""
        return self.tokens / self.elapsed_s

    def figures(self) -> dict[str, float]:
        """For a file."""
        first, between = list(self.first_token_s), list(self.between_tokens_s)
        return {
            "requests": len(first),
            "tokens_per_s": self.tokens_per_s,
            "first_token_p50_s": percentile(first, 50),
            "first_token_p95_s": percentile(first, 95),
            "token_p50_s": statistics.median(between) if between else float("nan"),
            "token_p95_s": percentile(between, 95),
        }


def prompts(n: int, characters: int, *, seed: int) -> list[str]:
    """`n` different texts of this length."""
    chosen, text = random.Random(seed), prose()
    return [text[at : at + characters] for at in (chosen.randrange(len(text) - characters) for _ in range(n))]


async def for_seconds(
    port: int, body: dict[str, Any], characters: int, *, clients: int, seconds: float, seed: int
) -> Steady:
    """As many requests as are answered in this time; one that has begun is ended."""
    began_at = time.perf_counter()
    until = began_at + seconds
    firsts: list[float] = []
    times: list[list[float]] = []

    async def client(number: int) -> None:
        texts = iter(prompts(10_000, characters, seed=seed * 1000 + number))
        while time.perf_counter() < until:
            sent_at = time.perf_counter()
            token_times = await _streamed(port, body | {"prompt": next(texts)})
            firsts.append(token_times[0] - sent_at)
            times.append(token_times)

    await asyncio.gather(*(client(number) for number in range(clients)))
    tokens = sum(at < until for token_times in times for at in token_times)
    return Steady(seconds, tokens, tuple(firsts), _gaps(times))


async def for_rounds(
    port: int, body: dict[str, Any], texts: list[str], *, rounds: int, stream: bool
) -> tuple[float, int]:
    """Seconds and tokens of a client for each prompt, that sends it so often."""
    began_at = time.perf_counter()

    async def client(text: str) -> int:
        tokens = 0
        for _ in range(rounds):
            if stream:
                tokens += len(await _streamed(port, body | {"prompt": text}))
            else:
                tokens += await _whole(port, body | {"prompt": text})
        return tokens

    tokens = sum(await asyncio.gather(*(client(text) for text in texts)))
    return time.perf_counter() - began_at, tokens


async def _streamed(port: int, body: dict[str, Any]) -> list[float]:
    """When each token came."""
    while True:
        answer = await ask(port, COMPLETIONS, body | {"stream": True})
        if answer.status != BUSY:
            break
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
    streamed = read_stream(answer)
    if answer.status != 200 or streamed.problem:
        raise NotServed(f"{answer.status}: {streamed.problem} {answer.body[:300]!r}")
    # llama.cpp's last event has no token, ours has the last one.
    return streamed.token_times if streamed.usage is None else streamed.token_times[: streamed.usage]


async def _whole(port: int, body: dict[str, Any]) -> int:
    answer = await ask(port, COMPLETIONS, body)
    if answer.status != 200:
        raise NotServed(f"{answer.status}: {answer.body[:300]!r}")
    return int(answer.json["usage"]["completion_tokens"])


def _gaps(times: list[list[float]]) -> tuple[float, ...]:
    return tuple(b - a for each in times for a, b in pairwise(each))
