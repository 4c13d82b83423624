"""What came out, for a person and for a machine. In: DIR/items/*.json; out: summary.md, summary.json, the exit code."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def write(out: Path, items: list[str]) -> None:
    """Of every item that was ever done in this folder: several calls add up."""
    paths = (out / "items" / f"{item}.json" for item in items)
    done = [json.loads(path.read_text()) for path in paths if path.exists()]
    files = {
        "summary.json": json.dumps(done, indent=1) + "\n",
        "summary.md": "\n".join([*head(done), *(line for found in done for line in section(found))]) + "\n",
    }
    for name, text in files.items():
        (out / f"{name}.tmp").write_text(text)
        (out / f"{name}.tmp").replace(out / name)


def publish(out: Path, results: Path, about: Found) -> None:
    """A copy beside the project's other results, under this day's and this card's name."""
    card = re.sub(r"\W+", "_", about["gpu"].lower()) or "gpu"
    if os.access(results, os.W_OK):
        shutil.copy(out / "summary.json", results / f"{about['date'][:10]}_{card}_check.json")


def exit_code(states: dict[str, str]) -> int:
    """1 where something is wrong or broken, or correctness was asked for and not shown to its end."""
    broken = {"wrong", "failed"} & set(states.values())
    return int(bool(broken) or states.get("correctness", "done") != "done")


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
    """One column per figure that any row has; lists (every single time) stay in the JSON."""
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
