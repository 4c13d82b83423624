"""Many runs in a terminal. In: their statuses; out: a table that fits the columns."""

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from regpt2.base.console import count, duration, safe_text
from regpt2.pages.live.status import RUNNING, Status
from regpt2.pages.live.view import FAINT, state_text, steps_of

DASH = "–"
# Each column: its name, from how many columns of the terminal on it is shown.
COLUMNS = (
    ("Run", 0),
    ("State", 0),
    ("Step", 60),
    ("Loss", 0),
    ("Best", 72),
    ("Tokens/s", 84),
    ("Left", 60),
    ("Verdict", 100),
)


def table_of(statuses: Mapping[str, Status], columns: int) -> Table:
    """A row for each run, those that train first."""
    shown = [name for name, least in COLUMNS if columns >= least]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=FAINT)
    for name in shown:
        right = name in ("Step", "Loss", "Best", "Tokens/s", "Left")
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for name, status in sorted(statuses.items(), key=lambda pair: (pair[1].state != RUNNING, pair[0])):
        cells = _cells(name, status)
        table.add_row(*(cells[column] for column in shown))
    return table


def _cells(name: str, status: Status) -> dict[str, Text | str]:
    left = status.state == RUNNING and math.isfinite(status.left_s)
    return {
        "Run": Text(safe_text(name).replace("\n", " "), style="bold"),
        "State": state_text(status),
        "Step": steps_of(status),
        "Loss": f"{status.loss:.3f}" if math.isfinite(status.loss) else DASH,
        "Best": f"{status.best_loss:.4f}" if math.isfinite(status.best_loss) else DASH,
        "Tokens/s": count(status.tokens_per_s) if math.isfinite(status.tokens_per_s) else DASH,
        "Left": duration(status.left_s) if left else DASH,
        "Verdict": Text(safe_text(status.verdict).replace("\n", " ") or DASH),
    }
