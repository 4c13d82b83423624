"""SHELF: one file per item of gpu_check.py. In: a `Check`; out: its rows in a JSON file, and a log.

The file's name is the item's; several items share the files that begin with an underscore. Each item has
`run(check)`, which keeps rows. A row is a name and figures, with the unit in the figure's name. `ok=False` in a row
means that something is wrong; raise `Skip` with the reason if an item cannot run on this machine.
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
    """Why an item cannot run here."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A running item: what it may use, where its rows go, until when."""

    item: str
    folder: Path
    """The folder for the rows, the logs and all other files of the items."""
    device: str
    smoke: bool
    """Tiny works, only to check that everything runs."""
    dry: bool = False
    """The GPU is pretended and its values and times mean nothing, so no value is compared."""
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
        """Written under another name and renamed, so a reader never sees half a file."""
        part = self.rows.with_suffix(".tmp")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.rows)

    def write(self, state: str, why: str = "", rows: list[dict[str, Any]] | None = None) -> None:
        self.store({"item": self.item, "state": state, "why": why, "rows": rows or []})

    def keep(self, name: str, **figures: Any) -> None:
        """One row, on disk at once; it replaces an earlier one of the same name."""
        rows = {row["name"]: row for row in self.read()["rows"]}
        self.write("running", rows=list((rows | {name: {"name": name, **figures}}).values()))

    def judge(self, name: str, *, ok: bool, why: str = "", **figures: Any) -> None:
        """One row whose verdict comes from values, which a pretended GPU does not have."""
        verdict: dict[str, Any] = {"not_compared": True} if self.dry else {"ok": ok, "why": why}
        self.keep(name, **figures, **verdict)

    def finish(self, state: str, why: str = "") -> None:
        self.write(state, why, self.read()["rows"])


def perform(check: Check) -> None:
    """The life of an item's process."""
    os.setpgid(0, 0)  # so that every process that it starts can be ended with it
    signal.alarm(max(1, int(check.left_s) + 5))  # in case nobody is left to end it
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
