"""Ctrl-C and SIGTERM as a wish. In: signals; out: a flag that the loop looks at between updates."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from regpt2.base.console import warn


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM sets `received`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        warn(f"{signal.Signals(number).name}: leaving after this update; Ctrl-C again leaves at once.")
