"""The report as Markdown. In: `Record`s; out: text for a README or a pull request, its results first."""

import re
from collections.abc import Sequence
from urllib.parse import quote

from regpt2.base.console import safe_text
from regpt2.pages.charts.panels import compared_on, panels
from regpt2.pages.published import Sources
from regpt2.pages.record import Record
from regpt2.pages.report.certificate import certificate_json
from regpt2.pages.report.core import WARNING, core_table
from regpt2.pages.report.page import subtitle, title
from regpt2.pages.report.results import DATA_DIFFER, headline, side_by_side
from regpt2.pages.report.scores import scores
from regpt2.pages.report.verdicts import after_state, checks_of, state_of

MOST_CHARACTERS = 300


def markdown(records: Sequence[Record], picture: str) -> str:
    """The whole text; `picture` is the name of the file beside it."""
    sources, alone = Sources(), len(records) == 1
    result = headline(records[0]) if alone else "side by side"
    runs = table(["", *(record.name for record in records)], side_by_side(records))
    parts = [f"# {text(title(records))}: {text(result)}", text(subtitle(records)), runs]
    parts += [] if compared_on(records) else [DATA_DIFFER]
    parts += [f"![Curves: {text(result)}]({quote(picture)})"]
    lines = _lines(records, sources)
    parts += [f"Lines: {text('; '.join(lines), 1000)}."] if lines else []
    for record in records:
        heading = [] if alone else [f"## {text(record.name)}"]
        parts += [*heading, *_verdict(record, sources), *_scores(record, sources), *_core(record, sources)]
    for record in records:
        content = certificate_json(record, sources.named)
        summary = f"Certificate{'' if alone else f' of {text(record.name)}'}"
        parts.append(f"<details>\n<summary>{summary}</summary>\n\n```json\n{content}\n```\n\n</details>")
    parts += ["\n".join(f"{n}. {text(named)}" for n, named in enumerate(sources.named, 1))] if sources.named else []
    return "\n\n".join(parts) + "\n"


def _lines(records: Sequence[Record], sources: Sources) -> list[str]:
    return [
        f"{panel.title.split(', ')[0]} of {rule.label} {panel.tick(rule.value)} [{sources.mark(rule.source)}]"
        for panel in panels(records)
        for rule in panel.rules
        if rule.source
    ]


def _verdict(record: Record, sources: Sources) -> list[str]:
    if not record.verdicts:
        return []
    last = record.verdicts[-1]
    source = f" [{sources.mark(str(last['source']))}]" if last.get("source") else ""
    rest = after_state(last) + source
    parts = [f"**{text(state_of(last))}**{' ' * rest.startswith(' ')}{text(rest)}"]
    checks = [f"{n}. {text(check)}" for n, check in enumerate(checks_of(last), 1)]
    return [*parts, "\n".join(checks)] if checks else parts


def _scores(record: Record, sources: Sources) -> list[str]:
    rows = []
    for score in scores(record):
        beside = [f"{value} [{sources.mark(source)}]" if source else value for value, source in score.against]
        rows.append([score.eval, score.metric.replace("_", " "), score.value, score.count, "; ".join(beside)])
    return [table(["evaluation", "metric", "value", "count", "reference"], rows)] if rows else []


def _core(record: Record, sources: Sources) -> list[str]:
    found = core_table(record)
    if found is None:
        return []
    marks = ", ".join(
        f"{model} [{sources.mark(source)}]" for model, source in zip(found.models, found.sources, strict=True)
    )
    return [table(found.head, found.rows), f"{text(WARNING)} {text(marks)}."]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else text(cell) for cell in line)} |" for line in lines)


def text(raw: str, most: int = MOST_CHARACTERS) -> str:
    """Text on one line that Markdown shows as it is: no markup, no link, no cell of its own."""
    raw = " ".join(safe_text(raw[:most]).split())
    raw = raw.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    raw = raw.replace("://", ":&#47;/").replace("@", "&#64;").replace("www.", "www&#46;")
    return re.sub(r"([\\`*_{}\[\]!|~$])", r"\\\1", raw)
