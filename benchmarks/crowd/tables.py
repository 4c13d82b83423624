"""Results as Markdown. In: JSON files of serve.py; out: the tables of docs/serving.md, between its markers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import rewrite

BEGIN, END = "<!-- made by serve.py --table: begin -->", "<!-- made by serve.py --table: end -->"
Entry = dict[str, Any]


def update(page: Path, files: list[Path]) -> None:
    """Rewrite the block between the markers."""
    rewrite(page, BEGIN, END, block(files))


def block(files: list[Path]) -> str:
    """The tables of each file; of equal measurements the last."""
    parts = []
    for path in files:
        entries = json.loads(path.read_text())
        about = entries[-1]
        parts.append(f"`benchmarks/results/{path.name}`: {about['machine']}, torch {about['torch']}")
        kinds: dict[str, tuple[str, Callable[[list[Entry]], str]]] = {
            "load": ("Under load", load),
            "batch": ("Beside a batch of eight in `regpt2 sample`", batch),
            "llama.cpp": ("Beside llama.cpp's server", llama_cpp),
        }
        for what, (title, table) in kinds.items():
            if found := [entry for entry in entries if entry["what"] == what]:
                parts += [f"### {title}", table(found)]
    return "\n\n".join(parts)


def load(entries: list[Entry]) -> str:
    """What many clients got, and what held."""
    return "\n\n".join(_load(entry) for entry in _last_of_each(entries, "model", "clients"))


def _load(entry: Entry) -> str:
    first, waited, between = entry["first_token_s"], entry["first_token_with_refusals_s"], entry["between_tokens_s"]
    share, statuses = entry["fairness"], entry["statuses"]
    failed = [name for name, held in entry["promises"].items() if not held]
    rows = [
        ("requests", f"{entry['requests']:,}, of which {entry['served']:,} were answered to their end and "
         f"{entry['left']:,} left"),
        ("statuses", ", ".join(f"{status}: {n:,}" for status, n in statuses.items())),
        ("greedy texts equal to `sample`'s", f"{entry['greedy_texts_equal']:,} of {entry['greedy_texts']:,}"),
        ("drawn texts equal to `sample`'s", f"{entry['drawn_texts_equal']:,} of {entry['drawn_texts']:,}"),
        ("tokens", f"{entry['tokens']:,}, {entry['tokens_per_s']:,.0f} per second"),
        ("first token, p50 / p95 / p99", f"{_ms(first['p50'])} / {_ms(first['p95'])} / {_ms(first['p99'])}"),
        ("first token with all refusals before it", " / ".join(_ms(waited[p]) for p in ("p50", "p95", "p99"))),
        ("between two tokens, p50 / p95", f"{_ms(between['p50'])} / {_ms(between['p95'])}"),
        ("requests of a client, min / median / max", f"{share['requests_min']:.0f} / {share['requests_median']:.0f} / "
         f"{share['requests_max']:.0f}"),
        ("mean wait of the client that waited most, beside the median one", f"{share['mean_wait_max_of_median']:.2f}x"),
        ("all slots free after the last client left", _ms(entry["idle_after_s"])),
        ("memory after the warm-up, and at the end", f"{entry['held']['warm']['rss_bytes'] / 1e6:,.0f} MB, "
         f"{entry['rss_growth_bytes'] / 1e6:+,.1f} MB"),
        ("descriptors, threads: before / at the end", f"{_pair(entry, 'descriptors')}, {_pair(entry, 'threads')}"),
        ("not kept", ", ".join(failed) or "nothing"),
    ]  # fmt: skip
    head = f"{entry['clients']} clients, {entry['elapsed_s']:.0f} s, `{entry['model']}`"
    return "\n".join([_line([head, ""]), _line(["---", "---"]), *(_line(list(row)) for row in rows)])


def batch(entries: list[Entry]) -> str:
    """Tokens per second beside `sample`."""
    lines = [_line(["model", "dtype", "`sample`", "8 streams", "8 whole answers"]), _line(["---"] * 5)]
    for entry in _last_of_each(entries, "model", "dtype", "work"):
        rates, ratio, spread = entry["tokens_per_s"], entry["ratio"], entry["ratio_spread"]
        cells = [f"{rates['sample']:,.0f} tokens/s"]
        for name in ("streams", "whole"):
            low, high = spread[name]
            cells.append(f"{rates[name]:,.0f}: **{ratio[name]:.2f}x** ({low:.2f}-{high:.2f})")
        lines.append(_line([entry["model"], entry["dtype"], *cells]))
    return "\n".join(lines)


def llama_cpp(entries: list[Entry]) -> str:
    """First tokens beside llama.cpp; above 1 in a column of ratios, we are better."""
    head = ["weights", "clients", "first token p50, ours / theirs", "p95", "sooner by (p50)", "tokens/s, ours / theirs"]
    lines = [_line([*head, "faster by"]), _line(["---"] * 7)]
    for entry in _last_of_each(entries, "work", "dtype", "clients"):
        ours, theirs, ratio = entry["regpt2"], entry["llama.cpp"], entry["ours_of_theirs"]
        cells = [f"{_ms(ours[name])} / {_ms(theirs[name])}" for name in ("first_token_p50_s", "first_token_p95_s")]
        cells += [
            f"**{1 / ratio['first_token_p50_s']:.2f}x**",
            f"{ours['tokens_per_s']:,.0f} / {theirs['tokens_per_s']:,.0f}",
        ]
        name = f"{entry['work'].partition(',')[0]}, {entry['dtype']} / {entry['their_version'].rpartition(' ')[2]}"
        lines.append(_line([name, str(entry["clients"]), *cells, f"**{ratio['tokens_per_s']:.2f}x**"]))
    return "\n".join(lines)


def _last_of_each(entries: list[Entry], *keys: str) -> list[Entry]:
    return list({tuple(entry[key] for key in keys): entry for entry in entries}.values())


def _pair(entry: Entry, name: str) -> str:
    return f"{entry['held']['before'][name]} / {entry['held']['after'][name]}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
