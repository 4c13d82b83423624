"""The certificate of a run. In: a `Record`; out: everything that its numbers depend on, as a table and as JSON."""

import json
import math

from regpt2.base.console import count, duration, safe_json
from regpt2.base.files import sha256_bytes
from regpt2.pages.record import Event, Record, number
from regpt2.pages.safe_html import Html, fact, facts_table, fill, folded, join

MOST_NAMED = 20

# Names on the page, and keys of the `run` event. Values that differ between starts are all shown.
FACTS = {
    "Command": "command",
    "Commit": "commit",
    "regpt2": "version",
    "Python": "python",
    "PyTorch": "torch",
    "Plugins": "plugins",
    "Device": "device",
    "Precision": "precision",
    "Threads": "threads",
    "World size": "world_size",
    "Seed": "seed",
    "Parameters": "n_params",
    "Parameters trained": "trainable_params",
    "Began from": "init_source",
    "Began from, weights": "init_sha256",
    "Began from, step": "init_step",
    "Tokenizer": "tokenizer",
    "Tokenizer fingerprint": "tokenizer_fingerprint",
    "Data set": "dataset",
    "Data fingerprint": "data_fingerprint",
    "Training tokens": "train_tokens",
    "Validation tokens": "val_tokens",
    "Tokens per update": "batch_tokens",
}
_HASHES = {
    "Began from, weights",
    "Plugins",
    "Command",
    "Commit",
    "Tokenizer fingerprint",
    "Data fingerprint",
    "Configuration",
    "Record",
}


def certificate(record: Record) -> dict[str, str]:
    """The facts by name, in the order of reading."""
    # Only the configuration has it: the "recipe" of an older event is the name of the run folder.
    configs = [run.get("config") for run in record.runs]
    recipes = {str(one["recipe"])[:100]: None for one in configs if isinstance(one, dict) and one.get("recipe")}
    facts = {"Recipe": ", ".join(recipes)} if recipes else {}
    recorded = {key for key in FACTS.values() for run in record.runs if key in run or _find(run, key) is not None}
    facts |= {name: _over_runs(record, key) for name, key in FACTS.items() if key in recorded}
    if mixture := _mixture(record.start):
        facts["Mixture"] = _named(mixture)
    ramp_from, ramp_tokens = (number(_find(record.start, key)) for key in ("ramp_from", "ramp_tokens"))
    if ramp_from > 0:
        facts["Batch ramp"] = f"from {_whole(ramp_from)} tokens per update on, over the first {_whole(ramp_tokens)}"
    resumed = [f"at step {_whole(run.get('step'))} ({_time(run)})" for run in record.runs[1:]]
    facts |= {"Peak of a rank": record.peak} if record.peak else {}
    facts |= {
        "Started": _time(record.start),
        "Resumed": _named(resumed),
        "Skipped steps": _named([f"{step:,}" for step in record.skipped_steps]),
        "Ended": record.status,
        "Steps": f"{record.last_step:,.0f}",
        "Tokens": f"{record.tokens:,.0f}" if record.tokens < 1e15 else count(record.tokens),
        "Wall time": duration(record.elapsed_s) if math.isfinite(record.elapsed_s) else "unknown",
    }
    if record.config_toml:
        facts["Configuration"] = f"SHA-256 {sha256_bytes(record.config_toml.encode(errors='surrogatepass'))}"
    return facts | {"Record": f"SHA-256 {record.sha256}"}


def certificate_json(record: Record, sources: list[str]) -> str:
    """The same with the sources of published numbers, as JSON in which nothing can be read as markup."""
    facts = {name.lower().replace(" ", "_"): value for name, value in certificate(record).items()}
    text = json.dumps({**facts, "sources": sources}, indent=2, ensure_ascii=False)
    return safe_json(text).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def provenance(record: Record, sources: list[str]) -> Html:
    """The section: the facts, and the same to copy."""
    facts = certificate(record).items()
    rows = facts_table(fact(name, value, kind="hash" if name in _HASHES else "") for name, value in facts)
    text = certificate_json(record, sources)
    copy = folded("The certificate as JSON, to copy", fill('<pre class="copy" tabindex="0">{text}</pre>', text=text))
    return join([rows, fill('{copy}\n<script type="application/json">{json}</script>', copy=copy, json=Html(text))])


def _mixture(run: Event) -> list[str]:
    sets = run.get("data_sets")
    known = [one for one in sets if isinstance(one, dict)] if isinstance(sets, list) else []
    shares = [f"{number(one.get('weight')):.4g} of {str(one.get('name'))[:100]}" for one in known]
    return shares if len(shares) > 1 else []


def _over_runs(record: Record, key: str) -> str:
    """The value at all starts of the run, or each value with the step from which it applied."""
    values: list[tuple[str, str]] = []
    for run in record.runs:
        value = _find(run, key)
        counted = isinstance(value, int) and key != "seed"
        shown = f"{value:,}" if counted else "unknown" if value is None else str(value)[:500]
        if not values or values[-1][1] != shown:
            values.append((_whole(run.get("step")), shown))
    if len(values) < 2:
        return values[0][1] if values else "unknown"
    first, *others = values[:MOST_NAMED]
    return "; ".join([first[1], *(f"from step {step}: {shown}" for step, shown in others)])


def notes(record: Record) -> Html:
    """The notes that the run wrote."""
    if not record.notes:
        return Html("")
    shown = record.notes[:100]
    rows = [fact(f"step {_whole(note.get('step'))}", str(note.get("text", ""))[:1000]) for note in shown]
    rows += [fact("", f"and {len(record.notes) - 100} more, in the record")] if len(record.notes) > 100 else []
    return facts_table(rows)


def _named(items: list[str]) -> str:
    """The first items and how many more there are; or "none"."""
    more = [f"and {len(items) - MOST_NAMED:,} more"] if len(items) > MOST_NAMED else []
    return ", ".join(items[:MOST_NAMED] + more) or "none"


def _time(run: Event) -> str:
    """2026-11-21 05:00:00 UTC."""
    moment = str(run.get("time") or "unknown")[:40]
    return moment.replace("T", " ").replace("+00:00", " UTC")


def _whole(value: object) -> str:
    return f"{number(value):,.0f}" if math.isfinite(number(value)) else "?"


def _find(event: object, key: str) -> object:
    """The value of `key` in an event or, if the event lacks it, in the configuration within."""
    if not isinstance(event, dict):
        return None
    found = (_find(value, key) for value in event.values())
    return event[key] if key in event else next((value for value in found if value is not None), None)
