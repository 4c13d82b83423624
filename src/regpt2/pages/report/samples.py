"""Samples written during training. In: a `Record`; out: the texts in the order of the steps."""

import math

from regpt2.base.console import count
from regpt2.pages.record import Event, Record, number, numbers, spread
from regpt2.pages.safe_html import Html, fill, folded, join
from regpt2.pages.tables import figure

MOST_SAMPLES = 24
MOST_TEXTS = 4
MOST_CHARACTERS = 2000


def samples(record: Record) -> Html:
    """The section: the first, the middle and the last sample, with the others folded between them."""
    chosen = spread(record.samples, MOST_SAMPLES)
    if not chosen:
        return Html("")
    shown = [sample(record, event) for event in chosen]
    middle, last = len(shown) // 2, len(shown) - 1
    parts = [shown[0]]
    for before, at in ((0, middle), (middle, last)):
        parts += _folded(chosen[before + 1 : at], shown[before + 1 : at])
        parts += [shown[at]] if at > before else []
    if len(chosen) < len(record.samples):
        note = '<p class="faint">{shown} of {all} samples; the others are in the record.</p>'
        parts.append(fill(note, shown=len(chosen), all=len(record.samples)))
    return join(parts)


def sample(record: Record, event: Event, heading: str = "") -> Html:
    """The texts of one step, each after its prompt in a fainter color."""
    texts = event.get("texts")
    prompt = str(event.get("prompt") or "")[:MOST_CHARACTERS]
    shown = []
    for text in (texts if isinstance(texts, list) else [texts])[:MOST_TEXTS]:
        body = str(text)[:MOST_CHARACTERS].removeprefix(prompt)
        shown.append(fill("<pre><b>{prompt}</b>{body}</pre>", prompt=prompt, body=body))
    template = '<figure class="sample">\n<figcaption>{when}</figcaption>\n{texts}\n</figure>'
    return fill(template, when=heading + _when(record, event), texts=join(shown))


def _when(record: Record, event: Event) -> str:
    tokens = float(record.tokens_at(numbers([event], "step"))[0])
    after = f" · {count(tokens)} tokens" if math.isfinite(tokens) else ""
    return f"Step {figure('step', event.get('step'))}{after}"


def _folded(events: list[Event], shown: list[Html]) -> list[Html]:
    if not events:
        return []
    first, last = (f"{number(events[at].get('step')):,.0f}" for at in (0, -1))
    between = f"steps {first} to {last}" if len(events) > 1 else f"step {first}"
    return [folded(f"{len(events)} more samples, {between}", join(shown))]
