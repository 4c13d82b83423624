"""Figures and tables of a page. In: recorded values; out: text with the digits that they deserve, and `<table>`s."""

import math
from collections.abc import Sequence

from regpt2.base.console import count
from regpt2.pages.record import number
from regpt2.pages.safe_html import Html, fill, join

_DIGITS = {"bits_per_byte": 3, "bits_per_character": 3, "perplexity": 2, "elapsed_s": 1}


def figure(name: str, value: object) -> str:
    """A recorded figure with the digits that it deserves; "nan" and "inf" as they are, a dash for nothing."""
    at = number(value)
    if isinstance(value, bool) or not math.isfinite(at) or isinstance(value, str):
        return "–" if value is None else str(value)[:200]
    if abs(at) >= 1e9:
        return count(at)
    return f"{at:,.0f}" if isinstance(value, int) else f"{at:,.{_DIGITS.get(name, 4)}f}"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "figures") -> Html:
    """A table whose first column names its rows; it scrolls sideways within itself, also by keyboard."""
    names = join((fill('<th scope="col">{name}</th>', name=name) for name in head), "")
    lines = []
    for first, *others in rows:
        cells = join((fill("<td>{cell}</td>", cell=cell) for cell in others), "")
        lines.append(fill('<tr><th scope="row">{first}</th>{cells}</tr>', first=first, cells=cells))
    return fill(
        '<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}">\n'
        "<thead><tr>{names}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>",
        caption=caption,
        kind=kind,
        names=names,
        lines=join(lines),
    )
