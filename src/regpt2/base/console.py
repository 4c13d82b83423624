"""What a person sees while work goes on: lines, a progress line with rate and time left, text made safe to show."""

import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# C0 controls but \n and \t, DEL, C1 controls: these could drive a terminal. Bidirectional marks, which show text in
# another order, and the line and paragraph separators. Half surrogate pairs, which no UTF-8 can hold.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

LEAST_COLUMNS = 40


def safe_text(text: str) -> str:
    """Text that came from a model or a file, with every control character shown as an escape instead of obeyed."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def safe_json(text: str) -> str:
    """JSON text with the same characters as JSON escapes: it stays one line, and reads back as the same value."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def set_least_width() -> None:
    """Lay help out for at least 40 columns, even in a narrower terminal: in 4 columns tyro's layout never ends."""
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)


def wrapped(lines: Iterable[str]) -> str:
    """Break lines between words to fit the terminal. What follows `  name   text` or `name: text` is indented below."""
    columns, broken = shutil.get_terminal_size().columns, []
    for line in lines:
        label = re.match(r"\s*(?:\S+\s{2,}|\w+:\s+)?", line)
        indent = " " * min(len(label[0]) if label else 0, columns // 2)
        broken += textwrap.wrap(
            line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(broken)


def say(line: str = "") -> None:
    show(line + "\n")


def show(text: str) -> None:
    """Text to standard output, at once, made safe; it need not end a line."""
    sys.stdout.write(safe_text(text))
    sys.stdout.flush()


def warn(line: str) -> None:
    """One line to standard error, at once."""
    sys.stderr.write(safe_text(f"warning: {line}\n"))
    sys.stderr.flush()


def count(number: float) -> str:
    """A number as a person reads it: 950, 12.3k, 4.56M, 10B."""
    rounded = float(f"{number:.3g}")  # 999,999 is 1M and not 1000k
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(rounded) < math.inf:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:.3g}"


def figure(number: float, digits: int = 4) -> str:
    """A measured number: 3.142, 1,234; 37.9k, as by `count`, instead of 3.79e+04."""
    shown = f"{number:,.{digits}g}"
    return count(number) if "e+" in shown else shown


def flop_rate(flop_per_s: float) -> str:
    """A rate of computing: 406 GFLOP/s, 1.2 TFLOP/s."""
    return f"{flop_per_s / 1e12:.3g} TFLOP/s" if flop_per_s >= 1e12 else f"{flop_per_s / 1e9:.3g} GFLOP/s"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m10s, 5h02m, 2d04h."""
    whole = int(max(0, seconds))
    for size, unit, smaller, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{rest}"
    return f"{whole}s"


class ProgressLine:
    """Progress of long work. A moving bar on a terminal; elsewhere a plain line every ten seconds, for logs.

    Use as a context manager; call `advance(n)` as work is done. `total` and `advance` are in `unit`.
    """

    def __init__(self, what: str, total: float, unit: str, *, every_s: float = 10.0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.every_s, self.shown = what, total, unit, every_s, shown
        self.done = 0.0
        self.started_at = self.spoke_at = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "ProgressLine":
        if self.shown and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(file=sys.stdout), transient=True)
            self._task = self._bar.add_task(f"{self.what} ({self.unit})", total=self.total or None, done="", rate="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float) -> None:
        """Add `amount` to what is done, and show it."""
        self.done += amount
        now = time.monotonic()
        rate = self.done / max(1e-9, now - self.started_at)
        so_far = count(self.done) + (f" of {count(self.total)}" if self.total else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, done=so_far, rate=f"{count(rate)} {self.unit}/s")
        elif self.shown and now - self.spoke_at >= self.every_s:
            self.spoke_at = now
            pace = ""  # unknown before anything is done
            if rate and self.total:
                left_s = max(0.0, self.total - self.done) / rate
                pace = f", {count(rate)} {self.unit}/s, {duration(left_s)} left"
            say(f"{self.what}: {so_far} {self.unit}{pace}")
