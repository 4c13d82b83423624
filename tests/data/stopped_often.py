"""Work stopped again and again. In: what to run, and the writes after which it may stop; out: how often it did."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


def stops_until_done(
    work: Callable[[], object], places: Sequence[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Run `work` until it ends by itself. It is stopped after each fifth call, on average, of one of `places`."""
    draw, stops = random.Random(5), 0

    def stop_after(real: Callable[..., object]) -> Callable[..., object]:
        def act(*args: object, **named: object) -> object:
            result = real(*args, **named)
            if draw.random() < 0.2:
                raise Killed
            return result

        return act

    for _ in range(200):
        with monkeypatch.context() as patch:
            for holder, name in places:
                patch.setattr(holder, name, stop_after(getattr(holder, name)))
            try:
                work()
                break
            except Killed:
                stops += 1
    return stops
