"""Many clients at once: no wrong text, nothing left behind, nobody starves. benchmarks/serve.py does it for minutes."""

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regpt2.model.files.load import load_model
from regpt2.sampling.batching.engine import Ticket
from regpt2.sampling.tokenizer import tokenizer_of
from serving.tiny_server import TEXT_MODEL, Running, server_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from crowd.http_client import ask
from crowd.known import Known, known_texts
from crowd.load import BUSY, COMPLETIONS, Seen, Traffic, fairness, until_idle

pytestmark = pytest.mark.seconds
CLIENTS, MOST_NEW = 16, 48


@pytest.fixture(scope="module")
def known(model_folders: tuple[Path, Path]) -> list[Known]:
    """Requests with the texts that `regpt2 sample` writes, by a model of its own."""
    loaded = load_model(str(model_folders[0]))
    return known_texts(loaded, tokenizer_of(loaded), 30, most_new=MOST_NEW, context=128, seed=3)


@pytest.fixture(scope="module")
def small_server(model_folders: tuple[Path, Path]) -> Iterator[Running]:
    """A queue that clients fill."""
    with server_of(model_folders[0], slots=3, queue=3) as running:
        yield running


def load_of(server: Running) -> tuple[int, int, int]:
    """Active, waiting and drawn tokens of the model of text."""
    load = server.models[TEXT_MODEL].engine.load()
    return load.active, load.waiting, load.tokens


def alive(*kinds: type) -> list[Any]:
    """Objects of these kinds that are still held, but for tasks that have ended."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), kinds)]
    return [one for one in found if not (isinstance(one, asyncio.Task) and one.done())]


def threads() -> list[str]:
    """Those that run, but for the bounded pool in which prompts are encoded."""
    return sorted(one.name for one in threading.enumerate() if not one.name.startswith("asyncio_"))


def crowd(server: Running, known: list[Known], *, clients: int, seconds: float, seed: int) -> Seen:
    """What N clients see, once the server is idle again."""

    async def run() -> Seen:
        traffic = Traffic(server.port, TEXT_MODEL, known, seed=seed)
        await traffic.run(clients, seconds)
        await until_idle(server.port, within_s=5)
        return traffic.seen

    return asyncio.run(run())


def test_many_clients_get_their_own_text_and_leave_nothing_behind(server: Running, known: list[Known]) -> None:
    crowd(server, known, clients=CLIENTS, seconds=0.5, seed=1)  # what a server makes once, as its pool of threads
    tickets, tasks, before = len(alive(Ticket)), len(alive(asyncio.Task)), threads()
    seen = crowd(server, known, clients=CLIENTS, seconds=4, seed=2)
    assert seen.problems == []
    assert seen.greedy_checked >= 2 * CLIENTS and seen.left > 0 and seen.kinds["nonsense"] > 0
    assert seen.drawn_equal >= 0.9 * seen.drawn_checked > 0
    assert set(seen.statuses) <= {200, 400, 404, 413}
    assert load_of(server)[:2] == (0, 0)
    assert len(alive(Ticket)) <= tickets and len(alive(asyncio.Task)) <= tasks
    assert threads() == before
    share = fairness(seen, CLIENTS)
    assert share["mean_wait_max_of_median"] < 3
    assert share["requests_min"] * 3 >= share["requests_median"]


def test_clients_that_are_refused_come_back_and_are_served(small_server: Running, known: list[Known]) -> None:
    seen = crowd(small_server, known, clients=12, seconds=3, seed=4)
    assert seen.statuses[BUSY] > 0 and seen.problems == []
    # Those whose first token came a second, the time of Retry-After, later than the last attempt alone explains.
    assert any(each.first_token_s is not None and each.waited_s > each.first_token_s + 0.9 for each in seen.served)
    assert load_of(small_server)[:2] == (0, 0)


def test_who_leaves_frees_the_slot_long_before_the_answer_would_end(server: Running) -> None:
    _, _, drawn = load_of(server)
    body = {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 250, "temperature": 1.5, "stream": True}

    async def leave() -> None:
        await asyncio.gather(*(ask(server.port, COMPLETIONS, body | {"seed": n}, leave_after=2) for n in range(8)))

    asyncio.run(leave())
    until = time.monotonic() + 10
    while load_of(server)[:2] != (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    active, waiting, now = load_of(server)
    assert (active, waiting) == (0, 0)
    assert now - drawn < 8 * 125  # of 250 each
