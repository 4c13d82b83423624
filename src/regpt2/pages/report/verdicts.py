"""The verdicts of a run. In: a `Record`; out: the newest in words, its checks in their order, and those before it."""

from regpt2.pages.published import Sources
from regpt2.pages.record import Event, Record, spread
from regpt2.pages.safe_html import Html, fill, join
from regpt2.pages.tables import figure, table

MOST_CHECKS = 12
MOST_ROWS = 100


def state_of(verdict: Event) -> str:
    """The verdict in a word or two: "On track"."""
    return str(verdict.get("state") or "unknown")[:60].replace("_", " ").capitalize()


def verdicts(record: Record, sources: Sources) -> Html:
    """The section; nothing where no verdict was given."""
    if not record.verdicts:
        return Html("")
    last = record.verdicts[-1]
    named = str(last.get("source") or "")
    source = fill(' <a class="mark" href="#source-{n}">[{n}]</a>', n=sources.mark(named)) if named else Html("")
    template = '<p class="verdict"><strong>{state}</strong>{text}{source}</p>'
    said = fill(template, state=state_of(last), text=after_state(last), source=source)
    band = str(last.get("band_reason") or "")[:300]
    width = fill('<p class="remark">Half the width of the band: {band}.</p>', band=band) if band else Html("")
    return join(part for part in (said, _checks(last), width, _history(record)) if part)


def after_state(verdict: Event) -> str:
    """The rest of the verdict's sentence: it begins with the state itself, or says it in other words."""
    text, state = str(verdict.get("text") or "")[:1000], str(verdict.get("state"))
    return text.removeprefix(state) if text.startswith(state) else f": {text}" if text else ""


def checks_of(verdict: Event) -> list[str]:
    """What to look at, the likeliest first."""
    checks = verdict.get("checks")
    return [str(check)[:500] for check in checks[:MOST_CHECKS]] if isinstance(checks, list) else []


def _checks(verdict: Event) -> Html:
    checks = checks_of(verdict)
    if not checks:
        return Html("")
    items = join(fill("<li>{check}</li>", check=check) for check in checks)
    return fill("<p>To check, the likeliest first:</p>\n<ol>\n{items}\n</ol>", items=items)


def _history(record: Record) -> Html:
    if len(record.verdicts) < 2:
        return Html("")
    keys = ("step", "difference", "band", "projected_end")
    rows = [
        [*(figure(key, verdict.get(key)) for key in keys), state_of(verdict)]
        for verdict in spread(record.verdicts, MOST_ROWS)
    ]
    head = ["step", "difference, nats", "band", "projected end", "verdict"]
    told = f"All {len(record.verdicts):,} verdicts"
    return fill("<details>\n<summary>{told}</summary>\n{table}\n</details>", told=told, table=table(told, head, rows))
