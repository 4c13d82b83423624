"""The way from the engine's thread to the event loop: what comes at once, what comes together, what wakes the loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from regpt2.sampling.batching.engine import Piece
from regpt2.serving.api.writing import _Inbox

A_TOKEN, THE_LAST = Piece(0, "a", (97,), (), None), Piece(0, "z", (122,), (), "length")
SOON_S = 0.15  # on a busy machine


def with_inbox(pace_s: float, test: Callable[[_Inbox], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(_Inbox(lambda: None, 100, pace_s)), timeout=20)

    asyncio.run(run())


async def put(inbox: _Inbox, *events: Piece) -> None:
    """From another thread, as the engine does."""
    await asyncio.to_thread(lambda: [inbox.put(0, event) for event in events])


def test_the_first_event_comes_at_once_and_later_ones_together_after_the_pace() -> None:
    async def test(inbox: _Inbox) -> None:
        first = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0.05)  # it waits already
        began_at = time.monotonic()
        await put(inbox, A_TOKEN)
        assert await first == (0, A_TOKEN) and time.monotonic() - began_at < SOON_S

        following = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0)
        await put(inbox, A_TOKEN)
        await put(inbox, A_TOKEN)
        await following
        assert time.monotonic() - began_at >= 0.4
        assert len(inbox) == 1  # the other one came with it

    with_inbox(0.4, test)


def test_an_end_is_not_kept_waiting() -> None:
    async def test(inbox: _Inbox) -> None:
        await put(inbox, A_TOKEN)
        await inbox.get()
        following = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0.05)
        began_at = time.monotonic()
        await put(inbox, A_TOKEN, THE_LAST)
        assert await following == (0, A_TOKEN) and await inbox.get() == (0, THE_LAST)
        assert time.monotonic() - began_at < 5

    with_inbox(60.0, test)


def test_no_event_is_missed_between_two_looks() -> None:
    """A thread that puts as fast as it can, and a loop that sleeps whenever nothing waits."""
    n = 20_000

    async def test(inbox: _Inbox) -> None:
        putting = asyncio.ensure_future(asyncio.to_thread(lambda: [inbox.put(k, A_TOKEN) for k in range(n)]))
        assert [(await inbox.get())[0] for _ in range(n)] == list(range(n))
        await putting

    async def run() -> None:
        await asyncio.wait_for(test(_Inbox(lambda: None, float("inf"), 0.0)), timeout=60)

    asyncio.run(run())
