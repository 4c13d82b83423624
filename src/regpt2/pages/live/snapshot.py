"""A run as data for a page. In: its record and status; out: values that JSON can hold, NaN as None."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from regpt2.base.console import safe_text
from regpt2.pages.charts.panels import Panel, Trace, panels
from regpt2.pages.live.status import Status
from regpt2.pages.record import Column, Event, Record, number, numbers, spread
from regpt2.pages.report.samples import MOST_CHARACTERS, MOST_TEXTS

MOST_SAMPLES, MOST_NOTES = 24, 100
DIGITS = 6
"""Significant digits of a curve: more than a screen shows."""
TOKEN_POINTS, SPARK_POINTS = 300, 60

Json = dict[str, Any]


def to_json(value: object) -> str:
    """One line of JSON; a number that is none is null."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))


def status_data(status: Status) -> Json:
    """The line of a run."""
    return _safe(asdict(status)) | {"share": status.share, "has_ended": status.has_ended}


def facts_data(record: Record) -> Json:
    """What a run is, for finding others like it: data, size, batch."""
    start = record.start
    on = record.dataset or start.get("data_fingerprint")
    return _safe(
        {
            "data": f"{on} in tokens of {start.get('tokenizer')}" if on else "",
            "dataset": record.dataset[:200],
            "n_params": number(start.get("n_params")),
            "batch_tokens": number(start.get("batch_tokens")),
            "device": str(start.get("device") or "")[:200],
            "time": str(start.get("time") or "")[:40],
        }
    )


def validations_data(record: Record) -> list[float | None]:
    """The validation losses, thinned for a small drawing."""
    return _column(numbers(spread(record.validations, SPARK_POINTS), "loss"), 5)


def charts_data(record: Record) -> Json:
    """The charts of the report, with what the step axis is in tokens."""
    steps = np.linspace(0.0, max(1.0, record.last_step), TOKEN_POINTS)
    return {
        "panels": [_panel(panel) for panel in panels([record])],
        "tokens": {"steps": _column(steps, 10), "tokens": _column(record.tokens_at(steps), 10)},
    }


def texts_data(record: Record) -> Json:
    """Samples and notes, the newest first."""
    chosen = spread(record.samples, MOST_SAMPLES)[::-1]
    tokens = record.tokens_at(numbers(chosen, "step"))
    samples = [_sample(event) | {"tokens": float(at)} for event, at in zip(chosen, tokens, strict=True)]
    notes = [
        {"step": number(event.get("step")), "text": str(event.get("text"))[:MOST_CHARACTERS]}
        for event in record.notes[: -MOST_NOTES - 1 : -1]
    ]
    return _safe({"samples": samples, "n_samples": len(record.samples), "notes": notes, "n_notes": len(record.notes)})


def _sample(event: Event) -> Json:
    """The texts of one step, without their prompt."""
    texts, prompt = event.get("texts"), str(event.get("prompt") or "")[:MOST_CHARACTERS]
    shown = (texts if isinstance(texts, list) else [texts])[:MOST_TEXTS]
    rest = [str(text)[:MOST_CHARACTERS].removeprefix(prompt) for text in shown]
    return {"step": number(event.get("step")), "prompt": prompt, "texts": rest}


def _panel(panel: Panel) -> Json:
    across = panel.across
    return _safe(
        {
            "name": panel.name,
            "title": panel.title,
            "unit": across.unit,
            "last": across.last,
            "resumes": list(across.resumes),
            "format": {"kind": panel.tick.kind, "digits": panel.tick.digits},
            "limits": panel.limits(),
            "from_zero": panel.from_zero,
            "log": panel.log,
            "note": panel.note,
            "rules": [{"label": one.label, "value": one.value, "on_right": one.on_right} for one in panel.rules],
            "description": panel.description(),
        }
    ) | {"traces": [_trace(trace) for trace in panel.traces]}


def _trace(trace: Trace) -> Json:
    look = trace.look
    dash = list(look.dash[1]) if isinstance(look.dash, tuple) else []
    drawn = {"ink": look.ink, "width": look.width, "alpha": look.alpha, "dash": dash, "marker": bool(look.marker)}
    named = _safe({"label": trace.label, "about": trace.about})
    band = None if trace.spread is None else _column(trace.spread)
    return {**named, "x": _column(trace.x, 9), "y": _column(trace.y), "spread": band, "look": drawn}


def _column(values: Column, digits: int = DIGITS) -> list[float | None]:
    """Rounded to significant digits: JSON a third as long."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _safe(value: Any) -> Any:
    """The same value; every control character in its texts is an escape."""
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, dict):
        return {key: _safe(item) for key, item in value.items()}
    return [_safe(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 1e15 else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Iterable) and not isinstance(value, str) else value
