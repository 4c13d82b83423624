"""The results, for a person and for a machine. In: the items' rows; out: summary.md and .json, the exit code."""

import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Found = dict[str, Any]


# What the short summary shows of a row, the most informative first.
SPEED = "tokens_per_s", "ours_faster_by", "faster_by", "gain", "tflops", "gb_per_s", "scenes_per_s", "ms_per_token"
COST = "mfu", "step_ms", "ms", "loop_waits_s", "on_disk_after_s", "peak_bytes", "planned_step_ms", "planned_peak_bytes"
RIGHT = "same_bits", "same_choice", "resumed_at", "loss_off", "gradient_off", "hidden_gradient_off", "loss", "accuracy"
REASONS = "not_compared", "not_here", "not_measured", "not_shown", "does_not_fit", "skipped", "seconds"
TELLING = ("device", "torch", "kernel", *SPEED, *COST, *RIGHT, "first_loss", "last_loss", *REASONS)
SHORT = {"ceilings": 1, "optimizers": 1}  # only the first N figures of each row are printed, several rows to a line
COLUMNS, LINES = 140, 76


def write(folder: Path, out: Path, items: list[str]) -> list[Found]:
    """The rows of every item that was ever run in this folder; several calls add up."""
    paths = (folder / f"{item}.json" for item in items)
    done = [json.loads(path.read_text()) for path in paths if path.exists()]
    files = {
        "summary.json": json.dumps(done, indent=1) + "\n",
        "summary.md": "\n".join([*head(done), *(line for found in done for line in section(found))]) + "\n",
    }
    for name, text in files.items():
        (out / f"{name}.tmp").write_text(text)
        (out / f"{name}.tmp").replace(out / name)
    return done


def brief(done: list[Found]) -> str:
    """All that matters, in lines that fit a terminal; errors come first in each item."""
    lines = [line for found in done for line in brief_item(found)]
    more = [f"... {len(lines) - LINES} lines more in summary.md"] if len(lines) > LINES else []
    return "\n".join(["SUMMARY", *lines[:LINES], *more])


def brief_item(found: Found) -> Iterable[str]:
    head = f"{found['item']}: {found['state']}, {found.get('seconds', 0):.0f} s. {found['why']}"
    yield head.rstrip()[: 2 * COLUMNS]
    yield from (f"  WRONG {row['name']}: {row.get('why', '')}"[: 2 * COLUMNS] for row in found["rows"] if is_wrong(row))
    told = {row["name"]: telling(row, SHORT.get(found["item"], 6)) for row in found["rows"] if not is_wrong(row)}
    texts = [f"{name}: {figures}" for name, figures in told.items() if figures]
    quiet = [row for row in found["rows"] if not told.get(row["name"], "row") and not is_wrong(row)]
    right = sum("ok" in row for row in quiet)
    texts += [f"{right} more that are right"] * bool(right)
    texts += [f"{len(quiet) - right} more that are not compared"] * (len(quiet) > right)
    if found["item"] in SHORT:
        texts = textwrap.wrap("; ".join(texts), COLUMNS - 2, break_on_hyphens=False)
    yield from (f"  {text}"[:COLUMNS] for text in texts)


def is_wrong(row: Found) -> bool:
    return row.get("ok") is False


def telling(row: Found, at_most: int) -> str:
    """A row's main figures; empty for a test that passed, or a comparison that a pretended GPU does not allow."""
    names = [name for name in TELLING if shown(name, row.get(name))]
    if not {*names} - ({"seconds"} if "ok" in row else {"not_compared"}):
        return ""
    return ", ".join(f"{title(name)} {shown(name, row[name])}" for name in names[:at_most])


def publish(out: Path, results: Path, about: Found) -> None:
    """A copy beside the project's other results, named after this day and this card."""
    card = re.sub(r"\W+", "_", about["gpu"].lower()) or "gpu"
    if os.access(results, os.W_OK):
        shutil.copy(out / "summary.json", results / f"{about['date'][:10]}_{card}_check.json")


def exit_code(states: dict[str, str]) -> int:
    """1 if something is wrong or broken, or the item first was asked for and did not finish. Cut off is not wrong."""
    broken = {"wrong", "failed"} & set(states.values())
    return int(bool(broken) or states.get("first", "done") != "done")


def in_a_line(states: dict[str, str]) -> str:
    found = list(states.values())
    return ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found))


def head(done: list[Found]) -> Iterable[str]:
    yield from ("# GPU check", "")
    for about in {json.dumps(found["about"]): found["about"] for found in done if "about" in found}.values():
        yield "- " + ", ".join(f"{name} {value}" for name, value in about.items() if value)
    yield ""
    yield from table(
        [
            {
                "item": found["item"],
                "state": found["state"],
                "seconds": round(found.get("seconds", 0)),
                **{name: values[1] for name, values in found.get("card", {}).items()},
                "why": found["why"].replace("\n", " "),
            }
            for found in done
        ]
    )


def section(found: Found) -> Iterable[str]:
    if found["rows"]:
        yield from ("", f"## {found['item']}", "")
        yield from table(found["rows"])


def table(rows: list[Found]) -> Iterable[str]:
    """One column per figure that any row has; lists of single times stay in the JSON."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if shown(name, value)))
    yield "| " + " | ".join(title(name) for name in names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(shown(name, row.get(name)).replace("|", "/") for name in names) + " |"


def row_in_a_line(row: Found) -> str:
    figures = [
        f"{title(name)} {text}" for name, value in row.items() if (text := shown(name, value)) and name != "name"
    ]
    return ", ".join([row["name"], *figures])


def title(name: str) -> str:
    return f"{name.removesuffix('_bytes')}_gb" if name.endswith("_bytes") else name


def shown(name: str, value: object) -> str:
    if value is None or isinstance(value, list):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "WRONG" if name == "ok" else "no"
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 1e9:.2f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
