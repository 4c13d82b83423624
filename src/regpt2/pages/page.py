"""The page of a run. In: a `Record`; out: one HTML document that opens offline, in light and dark, and on paper."""

import json
import math
from pathlib import Path

from regpt2.base.console import count, duration
from regpt2.pages.curves import charts
from regpt2.pages.markup import Html, fill, join
from regpt2.pages.provenance import provenance
from regpt2.pages.record import Event, Record, number, smooth, spread

# A page stays small whatever the length of the run; the record keeps the rest.
MOST_ROWS = 100
MOST_SAMPLES = 24
MOST_TEXTS = 4
MOST_CHARACTERS = 2000

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{recipe}: {headline}</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kicker">regpt2 · report of a run</p>
<h1>{recipe}</h1>
<p class="faint">{summary}</p>
</header>
<main>
{main}
</main>
<footer>Made from metrics.jsonl with SHA-256 <span class="hash">{sha256}</span></footer>
</body>
</html>
"""


def page(record: Record) -> Html:
    """The whole document."""
    parts = (results(record), curves(record), samples(record), evaluations(record), provenance(record), config(record))
    return fill(
        _PAGE,
        recipe=record.recipe,
        headline=headline(record),
        css=Html(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
        summary=summary(record),
        main=join(part for part in parts if part),
        sha256=record.sha256,
    )


def headline(record: Record) -> str:
    """The run's result in a line: the last validation, else the last training loss."""
    if not record.validations:
        loss = _final_training_loss(record)
        return f"training loss {loss:.3f}" if math.isfinite(loss) else "no result yet"
    last = record.validations[-1]
    bits = number(last.get("bits_per_byte"))
    val_loss, perplexity = (_figure(key, last.get(key)) for key in ("loss", "perplexity"))
    said = f"validation loss {val_loss}, perplexity {perplexity}"
    return f"{said}, {bits:.3f} bits per byte" if math.isfinite(bits) else said


def summary(record: Record) -> str:
    """What was run, and how far: 1,200 of 1,200 steps · 1.84M tokens · 10.3M parameters · finished."""
    steps, max_steps = record.last_step, number(record.start.get("max_steps"))
    planned = f" of {max_steps:,.0f}" if math.isfinite(max_steps) else ""
    said = [f"{steps:,.0f}{planned} {'step' if steps == 1 and not planned else 'steps'}"]
    said += [f"{count(record.tokens)} tokens"] if record.tokens else []
    n_params = number(record.start.get("n_params"))
    said += [f"{count(n_params)} parameters"] if math.isfinite(n_params) else []
    return " · ".join([*said, record.status])


def results(record: Record) -> Html:
    """The row of numbers at the head."""
    last = record.validations[-1] if record.validations else {}
    training = _final_training_loss(record)
    best = min((number(event.get("loss")) for event in record.validations), default=math.nan)
    beside = f"best {best:.3f}" if best < number(last.get("loss")) else ""
    beside = beside or (f"training {training:.3f}" if math.isfinite(training) else "")
    compressor = min(record.baselines.items(), key=lambda pair: pair[1], default=None)
    step_ms, mfu, speed = (record.typical(column) for column in ("step_ms", "mfu", "tokens_per_s"))
    cells = [
        ("Validation loss", _figure("loss", last.get("loss")), "nats" if last else "", beside),
        ("Perplexity", _figure("perplexity", last.get("perplexity")), "", "per token"),
        (
            "Bits per byte",
            _figure("bits_per_byte", last.get("bits_per_byte")),
            "",
            f"{compressor[0][:40]}: {compressor[1]:.2f}" if compressor else "",
        ),
        (
            "Time",
            duration(record.elapsed_s) if math.isfinite(record.elapsed_s) else "–",
            "",
            f"{step_ms:,.0f} ms a step" if math.isfinite(step_ms) else "",
        ),
        (
            "Tokens/s",
            count(speed) if math.isfinite(speed) else "–",
            "",
            f"{100 * mfu:.0f} % of the peak (MFU)" if math.isfinite(mfu) else "median",
        ),
    ]
    cell = (
        '<div><dt>{name}</dt><dd><span class="value">{value}</span> <span class="unit">{unit}</span>'
        '<div class="remark">{remark}</div></dd></div>'
    )
    shown = (fill(cell, name=name, value=value, unit=unit, remark=remark) for name, value, unit, remark in cells)
    return fill('<dl class="results">\n{cells}\n</dl>', cells=join(shown))


def curves(record: Record) -> Html:
    """Every chart that there is something to draw for."""
    figures = []
    for chart in charts(record):
        drawing = chart.svg
        if chart.svg_phone is not None:
            both = '<div class="on-desk">{desk}</div><div class="on-phone">{phone}</div>'
            drawing = fill(both, desk=chart.svg, phone=chart.svg_phone)
        figures.append(
            fill(
                '<figure class="{width}">\n<figcaption>{title}</figcaption>\n{drawing}\n</figure>',
                width="wide" if chart.svg_phone is not None else "half",
                title=chart.title,
                drawing=drawing,
            )
        )
    if not figures:
        return fill('<h2>Curves</h2>\n<p class="faint">No step is recorded yet.</p>')
    resumed = fill('\n<p class="remark">A dotted line: here the run was resumed.</p>' if len(record.runs) > 1 else "")
    return fill(
        '<h2>Curves</h2>\n<div class="curves">\n{figures}\n</div>{resumed}', figures=join(figures), resumed=resumed
    )


def samples(record: Record) -> Html:
    """What the model wrote as it learned: the first, the middle and the last at once, the others folded between."""
    chosen = [_sample(event) for event in spread(record.samples, MOST_SAMPLES)]
    if not chosen:
        return Html("")
    middle, last = len(chosen) // 2, len(chosen) - 1
    parts = [fill("<h2>Samples</h2>"), chosen[0]]
    for before, at in ((0, middle), (middle, last)):
        parts += _folded(chosen[before + 1 : at], "between")
        parts += [chosen[at]] if at > before else []
    if len(chosen) < len(record.samples):
        note = '<p class="faint">{shown} of {all} samples; the others are in the record.</p>'
        parts.append(fill(note, shown=len(chosen), all=len(record.samples)))
    return join(parts)


def evaluations(record: Record) -> Html:
    """A table for each evaluation, with the figures that it recorded."""
    by_name: dict[str, list[Event]] = {}
    for event in record.evals:
        by_name.setdefault(str(event.get("eval")), []).append(event)
    parts = [fill("<h2>Evaluations</h2>")] if by_name else []
    for name, events in list(by_name.items())[:MOST_ROWS]:
        table = _table(spread(events, MOST_ROWS))
        parts.append(fill('<h3 class="hash">{name}</h3>', name=name))
        if len(events) > 12:
            parts.append(_table(events[-1:]))
            table = _folded([table], "all", len(events))[0]
        parts.append(table)
    return join(parts)


def config(record: Record) -> Html:
    """The resolved configuration, folded."""
    told = record.config_toml or json.dumps(record.start.get("config") or {}, indent=2, ensure_ascii=False)
    if told == "{}":
        return Html("")
    return fill(
        "<h2>Configuration</h2>\n<details>\n<summary>config.toml, every value resolved</summary>\n"
        "<pre>{told}</pre>\n</details>",
        told=told[:100_000],
    )


def _sample(event: Event) -> Html:
    texts = event.get("texts")
    prompt = str(event.get("prompt") or "")[:MOST_CHARACTERS]
    shown = []
    for text in (texts if isinstance(texts, list) else [texts])[:MOST_TEXTS]:
        body = str(text)[:MOST_CHARACTERS].removeprefix(prompt)
        shown.append(fill("<pre><b>{prompt}</b>{body}</pre>", prompt=prompt, body=body))
    template = '<figure class="sample">\n<figcaption>Step {step}</figcaption>\n{texts}\n</figure>'
    return fill(template, step=_figure("step", event.get("step")), texts=join(shown))


def _folded(parts: list[Html], kind: str, n: int = 0) -> list[Html]:
    """The parts below a line that opens them; nothing for no parts."""
    if not parts:
        return []
    line = f"All {n:,} evaluations" if kind == "all" else f"{len(parts)} more in between"
    return [fill("<details>\n<summary>{line}</summary>\n{parts}\n</details>", line=line, parts=join(parts))]


def _table(events: list[Event]) -> Html:
    keys = list(dict.fromkeys(key for event in events for key in event if key not in ("event", "eval", "time")))[:12]
    head = join(fill("<th>{name}</th>", name=key.replace("_", " ")) for key in keys)
    rows = []
    for event in events:
        cells = (fill("<td>{value}</td>", value=_figure(key, event.get(key))) for key in keys)
        rows.append(fill("<tr>{cells}</tr>", cells=join(cells, "")))
    return fill(
        '<div class="scroll"><table class="figures">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>",
        head=head,
        rows=join(rows),
    )


def _figure(name: str, value: object) -> str:
    """A recorded figure with the digits that it deserves; "nan" and "inf" as they are, a dash for nothing."""
    figure = number(value)
    if math.isfinite(figure) and not isinstance(value, str):
        digits = {"loss": 4, "bits_per_byte": 3, "perplexity": 2, "elapsed_s": 1}.get(name, 4)
        return (
            f"{figure:,.0f}" if isinstance(value, int) else f"{figure:,.{digits}f}" if figure < 1e9 else f"{figure:.3g}"
        )
    return "–" if value is None else str(value)[:200]


def _final_training_loss(record: Record) -> float:
    loss = smooth(record.train["loss"])
    return float(loss[-1]) if len(loss) else math.nan
