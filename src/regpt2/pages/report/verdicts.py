"""The verdicts of a run. In: a `Record`; out: the newest with its checks, and a table of all."""

from regpt2.pages.published import Sources
from regpt2.pages.record import Event, Record, spread
from regpt2.pages.safe_html import Html, fill, folded, join
from regpt2.pages.tables import figure, table

MOST_CHECKS = 12
MOST_ROWS = 100


def state_of(verdict: Event) -> str:
    """The verdict in a word or two: "On track"."""
    return str(verdict.get("state") or "unknown")[:60].replace("_", " ").capitalize()


def verdicts(record: Record, sources: Sources) -> Html:
    """The section; empty without a verdict."""
    if not record.verdicts:
        return Html("")
    last = record.verdicts[-1]
    source = sources.link(str(last.get("source") or ""))
    template = '<p class="verdict"><strong>{state}</strong>{text}{source}</p>'
    sentence = fill(template, state=state_of(last), text=after_state(last), source=source)
    band = str(last.get("band_reason") or "")[:300]
    width = fill('<p class="remark">Half the width of the band: {band}.</p>', band=band) if band else Html("")
    return join(part for part in (sentence, _checks(last), width, _history(record)) if part)


def after_state(verdict: Event) -> str:
    """The verdict's sentence without the state that it begins with; after a colon if it does not."""
    text, state = str(verdict.get("text") or "")[:1000], str(verdict.get("state"))
    return text.removeprefix(state) if text.startswith(state) else f": {text}" if text else ""


def checks_of(verdict: Event) -> list[str]:
    """What to check, the likeliest cause first."""
    checks = verdict.get("checks")
    return [str(check)[:500] for check in checks[:MOST_CHECKS]] if isinstance(checks, list) else []


def _checks(verdict: Event) -> Html:
    checks = checks_of(verdict)
    if not checks:
        return Html("")
    items = join(fill("<li>{check}</li>", check=check) for check in checks)
    return fill("<p>What to check, the likeliest cause first:</p>\n<ol>\n{items}\n</ol>", items=items)


def _history(record: Record) -> Html:
    if len(record.verdicts) < 2:
        return Html("")
    keys = ("step", "difference", "band", "projected_end")
    rows = [
        [*(figure(key, verdict.get(key)) for key in keys), state_of(verdict)]
        for verdict in spread(record.verdicts, MOST_ROWS)
    ]
    head = ["step", "difference, nats", "band", "projected end", "verdict"]
    name = f"All {len(record.verdicts):,} verdicts"
    return folded(name, table(name, head, rows))
