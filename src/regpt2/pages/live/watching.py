"""Runs watched in a terminal. In: a run folder, or a folder of runs; out: a view that follows it, until it ends.

Where standard output is no terminal, a run gives plain lines as they come, for logs and pipes, and a folder one table.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from regpt2.base.console import LEAST_COLUMNS, say
from regpt2.base.errors import UsageError, did_you_mean
from regpt2.base.files import LOCK
from regpt2.pages.live.folders import find_runs
from regpt2.pages.live.follow import Follower
from regpt2.pages.live.lines import Lines, last_line
from regpt2.pages.live.status import Status, status_of
from regpt2.pages.live.table import table_of
from regpt2.pages.live.view import FAINT, view_of

LOOK_S = 1.0
RESIZE_S = 0.2
ROW_UPDATES = 256
"""Updates that a row of the table looks at."""
ROWS = 40
"""Of a view that is written to a file or a pipe."""


def watch(folder: Path, *, once: bool) -> None:
    """Show a run, or all runs of a folder; without `once` until the run has ended or Ctrl-C.

    Raises:
        UsageError: it is neither.
    """
    waiting = _require_runs(folder, once=once)
    try:
        if (folder / "metrics.jsonl").exists() or not find_runs(folder):
            _watch_run(folder, waiting, once=once)
        else:
            _watch_folder(folder, once=once)
    except KeyboardInterrupt:  # what is shown goes away; the run goes on
        say("Stopped watching. The run itself continues.")


def _require_runs(folder: Path, *, once: bool) -> str:
    """Refuse what cannot become a run; what to show until it begins."""
    mend = "give the folder of a run, as `regpt2 train` writes it, or a folder of runs"
    hint = did_you_mean(folder.name, find_runs(folder.parent))
    if folder.is_file():
        raise UsageError(f"{folder} is a file; {mend}.")
    if not folder.exists():
        if once:
            raise UsageError(f"{folder} does not exist; {mend}{hint}")
        return f"{folder} does not exist yet: waiting for its run to begin{hint}"
    begins = (folder / LOCK).exists() or not any(folder.iterdir())
    if not (begins or (folder / "metrics.jsonl").exists() or find_runs(folder)):
        raise UsageError(f"{folder} holds no run; {mend}{hint}")
    return f"{folder} has no record yet: waiting for its run to begin."


def _watch_run(folder: Path, waiting: str, *, once: bool) -> None:
    follower, name = Follower(folder), folder.resolve().name

    def shown(columns: int, rows: int) -> RenderableType:
        if not follower.exists:
            return Text(waiting, style=FAINT)
        return view_of(follower.record, status_of(follower), name, (columns, rows))

    def look() -> bool:
        follower.look()
        return status_of(follower).has_ended

    if not sys.stdout.isatty() and not once:
        _as_lines(follower, waiting)
    else:
        _show(shown, look, once=once)


def _watch_folder(folder: Path, *, once: bool) -> None:
    followers: dict[str, Follower] = {}
    statuses: dict[str, Status] = {}

    def look() -> bool:
        found = find_runs(folder)
        for name in followers.keys() - found.keys():
            del followers[name], statuses[name]
        for name, run in found.items():
            follower = followers.setdefault(name, Follower(run, newest=ROW_UPDATES))
            if follower.look() or name not in statuses or not statuses[name].has_ended:
                statuses[name] = status_of(follower)
        return False

    _show(lambda columns, _: table_of(statuses, columns), look, once=once or not sys.stdout.isatty())


def _show(shown: Callable[[int, int], RenderableType], look: Callable[[], bool], *, once: bool) -> None:
    """The view, looked at every second and drawn anew where it or the terminal's size has changed."""
    console = Console(file=sys.stdout, highlight=False)
    ended = look()
    if not (once or ended):
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not ended:
                live.update(shown(console.width, console.height), refresh=True)
                _wait(console)
                ended = look()
    columns = console.width if console.is_terminal else max(LEAST_COLUMNS, console.width)
    console.print(shown(columns, console.height if console.is_terminal else ROWS))


def _wait(console: Console) -> None:
    """Until the next look is due, or the size changes."""
    size, until = console.size, time.monotonic() + LOOK_S
    while time.monotonic() < until and console.size == size:
        time.sleep(RESIZE_S)


def _as_lines(follower: Follower, waiting: str) -> None:
    lines, told = Lines(), False
    while True:
        follower.look()
        status = status_of(follower)
        if follower.exists:
            for line in lines.of(follower.record, status, time.monotonic()):
                say(line)
        elif not told:
            told = True
            say(waiting)
        if status.has_ended:
            say(last_line(status))
            return
        time.sleep(LOOK_S)
