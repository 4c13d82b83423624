"""SHELF: one file per item of gpu_check.py; the file's name is the item's. Each has `run(check)`, which keeps rows.

A row is a name and figures, the unit in the figure's name. `ok=False` in a row says that something is wrong; raising
`Skip` says why an item is not for this machine.
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
    out: Path
    device: str
    smoke: bool
    """Tiny works: only to see that everything runs."""
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
        return self.out / "items" / f"{self.item}.log"

    def read(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "items" / f"{self.item}.json").read_text()))

    def store(self, document: dict[str, Any]) -> None:
        """Written beside its place and renamed into it: a reader never sees half a file."""
        path = self.out / "items" / f"{self.item}.json"
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)

    def write(self, state: str, why: str = "", rows: list[dict[str, Any]] | None = None) -> None:
        self.store({"item": self.item, "state": state, "why": why, "rows": rows or []})

    def keep(self, name: str, **figures: Any) -> None:
        """One row, on disk at once."""
        self.write("running", rows=[*self.read()["rows"], {"name": name, **figures}])

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
