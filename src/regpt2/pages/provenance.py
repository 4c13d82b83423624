"""The certificate of a run. In: a `Record`; out: the table of everything that its numbers depend on."""

import math

from regpt2.pages.markup import Html, fill, join
from regpt2.pages.record import Event, Record, number

MOST_NAMED = 20

# What a `run` event says, as a reader calls it. Values that differ from one start to the next are all shown.
_FACTS = {
    "Recipe": "recipe",
    "Command": "command",
    "Commit": "commit",
    "regpt2": "version",
    "Python": "python",
    "PyTorch": "torch",
    "Device": "device",
    "Precision": "precision",
    "Threads": "threads",
    "World size": "world_size",
    "Seed": "seed",
    "Parameters": "n_params",
    "Tokenizer": "tokenizer",
    "Tokenizer fingerprint": "tokenizer_fingerprint",
    "Data fingerprint": "data_fingerprint",
    "Training tokens": "train_tokens",
    "Validation tokens": "val_tokens",
    "Tokens per update": "batch_tokens",
}
_HASHES = {"command", "commit", "tokenizer_fingerprint", "data_fingerprint"}


def provenance(record: Record) -> Html:
    """The section: the facts, then what happened on the way."""
    rows = [(name, _over_runs(record, key), key in _HASHES) for name, key in _FACTS.items() if _is_told(record, key)]
    rows += [
        ("Started", _time(record.start), False),
        ("Resumed", _named([f"at step {_whole(run.get('step'))} ({_time(run)})" for run in record.runs[1:]]), False),
        ("Skipped steps", _named([f"{step:,}" for step in record.skipped_steps]), False),
        ("Ended", record.status, False),
    ]
    row = "<tr><th>{name}</th><td{kind}>{value}</td></tr>"
    facts = (
        fill(row, name=name, kind=Html(' class="hash"' if is_hash else ""), value=value)
        for name, value, is_hash in rows
    )
    table = fill('<table class="facts">\n<tbody>\n{facts}\n</tbody>\n</table>', facts=join(facts))
    return join([fill("<h2>Provenance</h2>"), table, _notes(record)])


def _is_told(record: Record, key: str) -> bool:
    return any(key in run or _find(run, key) is not None for run in record.runs)


def _over_runs(record: Record, key: str) -> str:
    """The value that every start of the run had, or each one with the step from which it held."""
    told: list[tuple[str, str]] = []
    for run in record.runs:
        value = _find(run, key)
        counted = isinstance(value, int) and key != "seed"
        shown = f"{value:,}" if counted else "unknown" if value is None else str(value)[:500]
        if not told or told[-1][1] != shown:
            told.append((_whole(run.get("step")), shown))
    if len(told) < 2:
        return told[0][1] if told else "unknown"
    first, *others = told[:MOST_NAMED]
    return "; ".join([first[1], *(f"from step {step}: {shown}" for step, shown in others)])


def _notes(record: Record) -> Html:
    if not record.notes:
        return Html("")
    row = "<tr><th>step {step}</th><td>{text}</td></tr>"
    rows = [
        fill(row, step=_whole(note.get("step")), text=str(note.get("text", ""))[:1000]) for note in record.notes[:100]
    ]
    if len(record.notes) > len(rows):
        rows.append(fill("<tr><th></th><td>and {n} more, in the record</td></tr>", n=len(record.notes) - len(rows)))
    return fill('<h3>Notes</h3>\n<table class="facts">\n<tbody>\n{rows}\n</tbody>\n</table>', rows=join(rows))


def _named(items: list[str]) -> str:
    """The items, or how many there are beyond those named; "none"."""
    more = [f"and {len(items) - MOST_NAMED:,} more"] if len(items) > MOST_NAMED else []
    return ", ".join(items[:MOST_NAMED] + more) or "none"


def _time(run: Event) -> str:
    """2026-11-21 05:00:00 UTC."""
    told = str(run.get("time") or "unknown")[:40]
    return told.replace("T", " ").replace("+00:00", " UTC")


def _whole(value: object) -> str:
    return f"{number(value):,.0f}" if math.isfinite(number(value)) else "?"


def _find(said: object, key: str) -> object:
    """The value of `key` in an event or, where the event does not say it itself, in the configuration within."""
    if not isinstance(said, dict):
        return None
    found = (_find(value, key) for value in said.values())
    return said[key] if key in said else next((value for value in found if value is not None), None)
