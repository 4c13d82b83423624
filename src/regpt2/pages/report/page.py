"""The page of one run or several. In: `Record`s; out: one HTML document that opens offline, in light and dark."""

import json
from collections.abc import Sequence

from regpt2.pages import PAGE_CSS
from regpt2.pages.charts.draw import Paint, painted, svg
from regpt2.pages.charts.panels import Panel, compared_on, panels
from regpt2.pages.published import Sources
from regpt2.pages.record import Record
from regpt2.pages.report.certificate import notes, provenance
from regpt2.pages.report.results import DATA_DIFFER, headline, results, side_by_side, summary
from regpt2.pages.report.samples import sample, samples
from regpt2.pages.report.scores import evaluations
from regpt2.pages.report.verdicts import verdicts
from regpt2.pages.safe_html import Html, fill, folded, join
from regpt2.pages.tables import table

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}: {headline}</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kicker">regpt2 · {kind}</p>
<h1>{title}</h1>
<p class="faint">{summary}</p>
</header>
<main>
{main}
</main>
<footer>{made}</footer>
</body>
</html>
"""
_NOTHING = Html()
_MADE = '<p>Made from metrics.jsonl of {name} with SHA-256 <span class="hash">{sha256}</span></p>'


def page(records: Sequence[Record]) -> Html:
    """The whole document. Several runs share each chart and have a column each in a table."""
    sources = Sources()
    parts = _of_one(records[0], sources) if len(records) == 1 else _of_several(records, sources)
    return document(
        title(records),
        headline=headline(records[0]) if len(records) == 1 else "side by side",
        kind="report of a run" if len(records) == 1 else "runs side by side",
        summary=subtitle(records),
        parts=parts,
        made=join(fill(_MADE, name=record.name, sha256=record.sha256) for record in records),
    )


def document(
    title: str, *, headline: str, kind: str, summary: str, parts: Sequence[Html], made: Html = _NOTHING, css: str = ""
) -> Html:
    """A page with header and footer around these parts; `css` is added to the style of every page."""
    return fill(
        _PAGE,
        title=title,
        headline=headline,
        kind=kind,
        css=Html(PAGE_CSS.read_text(encoding="utf-8") + css),
        summary=summary,
        main=join(part for part in parts if part),
        made=made,
    )


def title(records: Sequence[Record]) -> str:
    """The recipe of one run; how many there are of several."""
    return records[0].recipe if len(records) == 1 else f"{len(records)} runs"


def subtitle(records: Sequence[Record]) -> str:
    """What was run, and how far; of several runs their names."""
    return summary(records[0]) if len(records) == 1 else " · ".join(record.name for record in records)


def _of_one(record: Record, sources: Sources) -> list[Html]:
    return [
        results(record),
        section("Verdict", verdicts(record, sources)),
        section("Curves", curves([record], sources)),
        section("Samples", samples(record)),
        section("Evaluations", evaluations(record, sources)),
        section("Certificate", provenance(record, sources.named)),
        section("Notes", notes(record)),
        section("Configuration", config(record)),
        section("Sources", listed(sources)),
    ]


def _of_several(records: Sequence[Record], sources: Sources) -> list[Html]:
    parts = [table("Runs", ["", *(record.name for record in records)], side_by_side(records), "figures runs")]
    if not compared_on(records):
        parts.append(fill('<p class="remark">{text}</p>', text=DATA_DIFFER))
    written = join(sample(record, record.samples[-1], f"{record.name} · ") for record in records if record.samples)
    parts += [section("Curves", curves(records, sources)), section("Samples", written)]
    for record in records:
        inner = [
            section("Verdict", verdicts(record, sources), inner=True),
            section("Evaluations", evaluations(record, sources), inner=True),
            section("Certificate", provenance(record, sources.named), inner=True),
            section("Notes", notes(record), inner=True),
        ]
        parts.append(section(record.name, folded("Verdict, evaluations, certificate", join(filter(None, inner)))))
    return [*parts, section("Sources", listed(sources))]


def section(name: str, body: Html, *, inner: bool = False) -> Html:
    """A part of the page below its heading; empty without a body."""
    level = "h3" if inner else "h2"
    return (
        fill("<section>\n<{level}>{name}</{level}>\n{body}\n</section>", level=level, name=name, body=body)
        if body
        else Html("")
    )


def curves(records: Sequence[Record], sources: Sources) -> Html:
    """All charts that have data."""
    drawn = panels(records)
    if not drawn:
        return fill('<p class="faint">No step is recorded yet.</p>')
    resumed = fill(
        '\n<p class="remark">A dotted line marks where the run was resumed.</p>' if drawn[0].across.resumes else ""
    )
    return fill("{charts}{resumed}", charts=charts(drawn, sources), resumed=resumed)


def charts(drawn: Sequence[Panel], sources: Sources) -> Html:
    """Panels in a grid: the loss across the page, the others two in a row; one that would be left alone across it."""
    small = [panel.name for panel in drawn if panel.name != "loss"]
    wide = ["loss", *(small[-1:] if len(small) % 2 else [])]
    figures = (chart(panel, sources, wide=panel.name in wide) for panel in drawn)
    return fill('<div class="curves">\n{figures}\n</div>', figures=join(figures))


def chart(panel: Panel, sources: Sources, *, wide: bool) -> Html:
    """A chart with its title and remarks; one across the page is drawn a second time for the width of a phone."""
    if wide:
        desk, phone = (3.7, 3.5) if panel.name == "loss" else (2.4, 2.4)
        both = '<div class="on-desk">{desk}</div><div class="on-phone">{phone}</div>'
        drawing = fill(both, desk=svg(panel, (8.4, desk)), phone=svg(panel, (4.4, phone), f"{panel.name}-phone"))
    else:
        drawing = svg(panel, (4.4, 2.4))
    remarks = [fill("{note}", note=panel.note)] if panel.note else []
    lines = [
        fill("{label} {value}{mark}", label=rule.label, value=panel.tick(rule.value), mark=sources.link(rule.source))
        for rule in panel.rules
        if rule.source
    ]
    remarks += [fill("Lines: {lines}.", lines=join(lines, ", "))] if lines else []
    references = (trace for trace in panel.traces if trace.source)
    remarks += [fill("Reference: {about}{n}.", about=one.about, n=sources.link(one.source)) for one in references]
    remark = fill('\n<p class="remark">{all}</p>', all=join(remarks, " ")) if remarks else Html("")
    return fill(
        '<figure class="{width}">\n<figcaption>{title}</figcaption>\n{drawing}{remark}\n</figure>',
        width="wide" if wide else "half",
        title=panel.title,
        drawing=drawing,
        remark=remark,
    )


def drawing(paint: Paint, name: str, title: str, description: str, *, note: str = "", height: float = 3.7) -> Html:
    """A chart of its own kind across the page, drawn a second time for the width of a phone; `height` in inches."""
    return fill(
        '<figure class="wide">\n<figcaption>{title}</figcaption>\n<div class="on-desk">{desk}</div>'
        '<div class="on-phone">{phone}</div>{remark}\n</figure>',
        title=title,
        desk=painted(paint, (8.4, height), name, description),
        phone=painted(paint, (4.4, 0.95 * height), f"{name}-phone", description),
        remark=fill('\n<p class="remark">{note}</p>', note=note) if note else Html(""),
    )


def config(record: Record) -> Html:
    """The resolved configuration, folded."""
    toml = record.config_toml or json.dumps(record.start.get("config") or {}, indent=2, ensure_ascii=False)
    if toml == "{}":
        return Html("")
    return folded("config.toml, every value resolved", fill('<pre tabindex="0">{toml}</pre>', toml=toml[:100_000]))


def listed(sources: Sources) -> Html:
    """The list of sources."""
    if not sources.named:
        return Html("")
    item = '<li id="source-{n}">{named}</li>'
    items = join(fill(item, n=n, named=named) for n, named in enumerate(sources.named, start=1))
    return fill('<ol class="sources">\n{items}\n</ol>', items=items)
