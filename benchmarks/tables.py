"""Results as Markdown. In: JSON files of run.py; out: the block of README.md made from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by run.py --table: begin -->", "<!-- made by run.py --table: end -->"
TITLES = {"training": "Training step", "generation": "Generation and prefill"}
COLUMNS = ["work", "precision", "beside", "faster by (spread)", "by CPU time", "tokens/s, ours / theirs"]
COLUMNS += ["peak GB, ours / theirs"]
SHARES = "of the bare matmuls' rate, ours / theirs"


def update_readme(readme: Path, files: list[Path]) -> None:
    """Rewrite the block between the markers."""
    rewrite(readme, BEGIN, END, block(files))


def rewrite(page: Path, begin: str, end: str, block: str) -> None:
    """Put a block between two markers of a page."""
    text = page.read_text()
    page.write_text(f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}")


def block(files: Iterable[Path]) -> str:
    """A table for each kind of work in each file."""
    parts = []
    for path in files:
        document = json.loads(path.read_text())
        about, results = document["machine"], document.get("results", [])
        device = about["device"].partition(": ")[2]
        versions = f"Python {about['python']}, torch {about['torch']}"
        parts.append(f"`results/{path.name}`: {device}, {about['threads']} threads, {versions}")
        for kind in TITLES:
            if entries := [entry for entry in results if entry["kind"] == kind]:
                parts.append(table(kind, entries))
        parts += [profile(found) for found in document.get("profiles", [])]
    return "\n\n".join(parts)


def table(kind: str, entries: list[dict[str, Any]]) -> str:
    """One kind of work: a row for each rival; shares of the limit where they were measured."""
    shared = any("our_share" in entry for entry in entries)
    columns = [*COLUMNS, SHARES] if shared else COLUMNS
    rows = [[*cells(entry), share(entry)] if shared else cells(entry) for entry in entries]
    lines = [line(columns), line(["---"] * len(columns)), *map(line, rows)]
    return "\n".join([f"### {TITLES[kind]}\n", *lines])


def line(texts: list[str]) -> str:
    """A table's row."""
    return f"| {' | '.join(texts)} |"


def cells(entry: dict[str, Any]) -> list[str]:
    """The row of one rival."""
    low, high = entry["ratio_spread"]
    return [
        entry["work"],
        entry["precision"],
        entry["peer"],
        f"**{entry['ratio']:.2f}x** ({low:.2f}-{high:.2f})",
        "-" if entry["cpu_ratio"] is None else f"{entry['cpu_ratio']:.2f}x",
        " / ".join(_count(entry["tokens"] / entry[side]) for side in ("our_s", "their_s")),
        _memory(entry),
    ]


def share(entry: dict[str, Any]) -> str:
    """How near both sides come to the bare matmuls of the step, and the rate of these."""
    if "our_share" not in entry:
        return "-"
    rate = f"{entry['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    return f"{entry['our_share']:.0%} / {entry['their_share']:.0%} of {rate}"


def profile(found: dict[str, Any]) -> str:
    """Where the time of our step goes."""
    whole = sum(part["ms"] for part in found["parts"])
    rates = f"{found['best_matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s, copy {found['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    said = f"{1e3 * found['step_s']:,.0f} ms; {1e3 * found['profiled_step_s']:,.0f} ms under the profiler"
    rows = [
        line([part["part"], _count(part["ms"]), f"{part['ms'] / whole:.1%}", _floor(part["floor_ms"])])
        for part in found["parts"]
        if part["ms"] / whole >= 0.0005
    ]
    title = f"### Where our step's time goes: {found['work']}, {found['precision']}\n\n{said}. Best matmul {rates}.\n"
    return "\n".join([title, line(["part", "ms", "share", "floor, ms"]), line(["---"] * 4), *rows])


def _floor(ms: float | None) -> str:
    return "-" if ms is None else _count(ms)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _memory(entry: dict[str, Any]) -> str:
    ours, theirs = entry["our_peak_bytes"], entry["their_peak_bytes"]
    if theirs is None:
        return f"{ours / 1e9:.2f} / -"
    return f"{ours / 1e9:.2f} / {theirs / 1e9:.2f} = {ours / theirs:.2f}"
