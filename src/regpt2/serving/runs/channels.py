"""The channels of runs. In: the runs folder; out: one channel for the list, and one for each run that is watched."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from regpt2.pages.live.folders import find_runs
from regpt2.pages.live.follow import Follower
from regpt2.pages.live.snapshot import charts_data, facts_data, status_data, texts_data, to_json, validations_data
from regpt2.pages.live.status import status_of
from regpt2.serving.runs.channel import Budget, Channel, Part

CHARTS_EVERY_S = 2.0
LIST_EVERY_S = 2.0
SLICE_S = 0.1
"""The list of many long runs comes in pieces, each after so much reading."""
ROW_UPDATES = 256
"""Updates that a row of the list looks at."""
MOST_KEPT = 16
"""Runs whose record stays in memory when nobody watches."""
MOST_CLIENTS = 64

T = TypeVar("T")


class RunChannel(Channel):
    """One run: its status every second, its charts every few seconds."""

    def __init__(self, run: Path, executor: ThreadPoolExecutor, budget: Budget) -> None:
        super().__init__(executor, budget)
        self._follower = Follower(run)
        self._charts: dict[Part, str] = {}
        self._texts: dict[Part, str] = {}
        self._tokens = "null"
        self._charts_of: object = None
        self._texts_of: object = None
        self._charted_at = -CHARTS_EVERY_S

    def look(self, *, spend: bool) -> dict[Part, str]:
        """Status and facts; charts if they are due; texts."""
        follower, now = self._follower, time.monotonic()
        follower.look()
        record = follower.record
        if record is not self._texts_of:
            self._texts, self._texts_of = {("texts", ""): to_json(texts_data(record))}, record
        first = self._charts_of is None
        due = first or (spend and now - self._charted_at >= CHARTS_EVERY_S)
        if record is not self._charts_of and due:
            data = charts_data(record)
            charts = {("panel", panel["name"]): to_json(panel) for panel in data["panels"]}
            self._tokens, names = to_json(data["tokens"]), to_json([panel["name"] for panel in data["panels"]])
            self._charts = {**charts, ("axis", ""): f'{{"panels":{names},"tokens":{self._tokens}}}'}
            self._charts_of, self._charted_at = record, now
        line = status_data(status_of(follower)) | {"n_damaged": follower.n_damaged}
        status = {("status", ""): to_json(line), ("facts", ""): to_json(facts_data(record))}
        return {**status, **self._charts, **self._texts}

    def panels(self) -> str:
        """All charts, as one answer; in a thread."""
        self.refresh()
        drawn = ",".join(data for (kind, _), data in self._charts.items() if kind == "panel")
        return f'{{"panels":[{drawn}],"tokens":{self._tokens}}}'


class ListChannel(Channel):
    """The list: a row for each run."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor, budget: Budget) -> None:
        super().__init__(executor, budget)
        self._folder = folder
        self._followers: dict[str, Follower] = {}
        self._rows: dict[str, str] = {}
        self._ended: set[str] = set()
        self._listed_at = -LIST_EVERY_S

    def look(self, *, spend: bool) -> dict[Part, str]:
        """A row for each run, in pieces if they are many; a run that is not read yet has its name alone."""
        now = time.monotonic()
        unread = [name for name, follower in self._followers.items() if not follower.exists]
        if unread or now - self._listed_at >= LIST_EVERY_S:
            self._find()
            names = [*(name for name in self._followers if name not in self._rows), *self._rows]
            self._listed_at = now
            for name in names:
                self._update(name)
                if time.monotonic() - now > SLICE_S:
                    break
        whole = {"n_runs": len(self._followers), "n_read": len(self._rows)}
        rows: dict[Part, str] = {("run", name): row for name, row in self._rows.items()}
        return {("names", ""): to_json(list(self._followers)), **rows, ("list", ""): to_json(whole)}

    def _find(self) -> None:
        found = find_runs(self._folder)
        self._followers = {
            name: self._followers.get(name) or Follower(run, newest=ROW_UPDATES) for name, run in found.items()
        }
        self._rows = {name: row for name, row in self._rows.items() if name in found}

    def _update(self, name: str) -> None:
        follower = self._followers[name]
        if not follower.look() and name in self._ended and name in self._rows:
            return
        status = status_of(follower)
        (self._ended.add if status.has_ended else self._ended.discard)(name)
        record = follower.record
        whole = {"name": name, "changed_at": follower.changed_at, "validations": validations_data(record)}
        row = status_data(status) | facts_data(record) | whole
        self._rows[name] = to_json(row)


class Channels:
    """All channels of a server. They share one thread, so that they never take more than a core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.executor = ThreadPoolExecutor(1, "runs")
        self._budget = Budget()
        self._list: ListChannel | None = None
        self._runs: OrderedDict[Path, RunChannel] = OrderedDict()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of work in the thread that all channels share."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def list(self) -> ListChannel:
        """The channel of the list."""
        if self._list is None:
            self._list = ListChannel(self.folder, self.executor, self._budget)
        return self._list

    def run(self, run: Path) -> RunChannel:
        """The channel of a run; those that were not watched for longest are forgotten."""
        channel = self._runs.get(run) or RunChannel(run, self.executor, self._budget)
        self._runs[run] = channel
        self._runs.move_to_end(run)
        idle = [path for path, one in self._runs.items() if not one.n_clients and one is not channel]
        for path in idle[: max(0, len(self._runs) - MOST_KEPT)]:
            del self._runs[path]
        return channel

    @property
    def n_clients(self) -> int:
        """How many streams are open."""
        of_list = self._list.n_clients if self._list else 0
        return of_list + sum(channel.n_clients for channel in self._runs.values())
