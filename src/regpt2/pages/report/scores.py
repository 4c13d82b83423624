"""Evaluations beside published ones. In: a `Record`; out: tables of what was measured, with references."""

from dataclasses import dataclass

from regpt2.pages.published import CHANCE, Sources, latest_evals, metrics_of, references_of
from regpt2.pages.record import Event, Record, spread
from regpt2.pages.report.core import core_section
from regpt2.pages.safe_html import Html, fill, folded, join
from regpt2.pages.tables import figure, table
from regpt2.references.scores import comparable

MOST_EVALS = 100
MOST_ROWS = 100
MOST_COLUMNS = 12
_SHARES = ("acc", "accuracy")


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one evaluation as text; `against`: published figures, each with its source."""

    eval: str
    metric: str
    value: str
    count: str
    against: list[tuple[str, str]]
    protocol: str


def scores(record: Record) -> list[ScoreRow]:
    """The newest figures of each evaluation."""
    return [
        _score(record, metric, event)
        for event in latest_evals(record)[:MOST_EVALS]
        for metric in metrics_of(event)[:MOST_COLUMNS]
    ]


def evaluations(record: Record, sources: Sources) -> Html:
    """The section: the newest figures beside published ones; below, folded, the history of each."""
    shown = scores(record)
    if not shown:
        return core_section(record, sources)
    has_protocol = any(score.protocol for score in shown)
    head = ["evaluation", "metric", "value", "count", "reference", *(["protocol"] if has_protocol else [])]
    rows: list[list[object]] = []
    for score in shown:
        beside = (fill("{value}{mark}", value=value, mark=sources.link(source)) for value, source in score.against)
        row = [score.eval, score.metric.replace("_", " "), score.value, score.count, join(beside, "; ") or "–"]
        rows.append([*row, *([score.protocol] if has_protocol else [])])
    parts = [table("Evaluations", head, rows, "figures scores"), core_section(record, sources)]
    by_name: dict[str, list[Event]] = {}
    for event in record.evals:
        by_name.setdefault(str(event.get("eval")), []).append(event)
    parts += [_history(name, events) for name, events in list(by_name.items())[:MOST_EVALS] if len(events) > 1]
    return join(parts)


def shown_as(metric: str, value: object) -> str:
    """A share of right answers in percent, all else as it is."""
    share = isinstance(value, float) and 0 <= value <= 1 and metric.split("_")[0:1] != ["chance"]
    is_accuracy = any(word in metric.split("_") for word in _SHARES)
    return f"{100 * value:.2f} %" if share and is_accuracy and isinstance(value, float) else figure(metric, value)


def _score(record: Record, metric: str, event: Event) -> ScoreRow:
    name = str(event.get("eval"))
    value = shown_as(metric, event.get(metric))
    stderr = event.get(f"{metric}_stderr")
    if stderr is not None:
        value = f"{value.removesuffix(' %')} ± {shown_as(metric, stderr)}"
    against = [
        (f"{one.model} {shown_as(metric, one.value)}", one.source)
        for one in references_of(record, name, comparable(name, metric, event))
    ]
    if name in CHANCE and metric.startswith("acc"):
        against.append((f"chance {100 * CHANCE[name]:g} %", ""))
    protocols = event.get("protocol")
    protocol = protocols.get(metric) if isinstance(protocols, dict) else protocols
    n = event.get("count", event.get("tokens"))
    return ScoreRow(name, metric, value, figure("count", n), against, str(protocol or "")[:300])


def _history(name: str, events: list[Event]) -> Html:
    keys = list(dict.fromkeys(key for event in events for key in event if key not in ("event", "eval", "protocol")))
    keys = ["step", *(key for key in keys if key not in ("step", "time"))][:MOST_COLUMNS]
    rows = [[figure(key, event.get(key)) for key in keys] for event in spread(events, MOST_ROWS)]
    title = f"All {len(events):,} evaluations of {name[:60]}"
    return folded(title, table(title, [key.replace("_", " ") for key in keys], rows))
