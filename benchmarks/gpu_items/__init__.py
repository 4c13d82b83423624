"""SHELF: one file per item of gpu_check.py. In: a `Check`; out: its rows in a JSON file, and a log.

The file's name is the item's; files that begin with an underscore are what several items share. Each item has
`run(check)`, which keeps rows. A row is a name and figures, the unit in the figure's name. `ok=False` in a row says
that something is wrong; raising `Skip` says why an item is not for this machine.
"""

import importlib
import json
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Skip(Exception):
    """Why an item cannot be done here."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """An item at work: what it may use, where its rows go, until when."""

    item: str
    folder: Path
    """Where the rows, the logs and all other files of the items go."""
    device: str
    smoke: bool
    """Tiny works: only to see that everything runs."""
    dry: bool = False
    """The GPU is a pretended one, whose values and times mean nothing: no value is compared."""
    until: float
    """On the clock of time.time()."""
    data: Path | None = None
    recipe: str = ""
    peers: Path | None = None

    @property
    def left_s(self) -> float:
        return self.until - time.time()

    @property
    def log(self) -> Path:
        return self.folder / f"{self.item}.log"

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.item}.json"

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self.rows.read_text()))

    def store(self, document: dict[str, Any]) -> None:
        """Written beside its place and renamed into it: a reader never sees half a file."""
        part = self.rows.with_suffix(".tmp")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.rows)

    def write(self, state: str, why: str = "", rows: list[dict[str, Any]] | None = None) -> None:
        self.store({"item": self.item, "state": state, "why": why, "rows": rows or []})

    def keep(self, name: str, **figures: Any) -> None:
        """One row, on disk at once, in the place of an earlier one of the same name."""
        rows = {row["name"]: row for row in self.read()["rows"]}
        self.write("running", rows=list((rows | {name: {"name": name, **figures}}).values()))

    def judge(self, name: str, *, ok: bool, why: str = "", **figures: Any) -> None:
        """One row whose verdict comes from values; a pretended GPU has none."""
        verdict: dict[str, Any] = {"not_compared": True} if self.dry else {"ok": ok, "why": why}
        self.keep(name, **figures, **verdict)

    def finish(self, state: str, why: str = "") -> None:
        self.write(state, why, self.read()["rows"])


def perform(check: Check) -> None:
    """The life of an item's process."""
    os.setpgid(0, 0)  # so that all that it starts can be ended with it
    signal.alarm(max(1, int(check.left_s) + 5))  # should nobody be left to end it
    log = os.open(check.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        importlib.import_module(f"gpu_items.{check.item}").run(check)
    except Skip as why:
        check.finish("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        check.finish("failed", f"{type(error).__name__}: {error}"[:500])
    else:
        wrong = [row["name"] for row in check.read()["rows"] if not row.get("ok", True)]
        check.finish("wrong" if wrong else "done", ", ".join(wrong))
