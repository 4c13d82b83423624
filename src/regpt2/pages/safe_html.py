"""HTML that escapes by itself. In: our own templates, values from anywhere; out: `Html`, safe to put on a page."""

from collections.abc import Iterable
from typing import LiteralString

from markupsafe import Markup

from regpt2.base.console import safe_text

Html = Markup  # made by `fill` and `join`; by hand only from text that we wrote ourselves


def fill(template: LiteralString, **values: object) -> Html:
    """The template with each `{name}` replaced by its value; unless that is `Html` already, markup is escaped and
    control characters and half surrogates are shown as escapes."""
    texts = {name: value if isinstance(value, Html) else safe_text(str(value)) for name, value in values.items()}
    return Html(template).format(**texts)


def join(parts: Iterable[Html], between: LiteralString = "\n") -> Html:
    """Pieces of markup, one after another."""
    return Html(between).join(parts)


def folded(name: str, body: Html) -> Html:
    """A part of a page that opens with a click on its name."""
    return fill("<details>\n<summary>{name}</summary>\n{body}\n</details>", name=name, body=body)


def facts_table(rows: Iterable[Html]) -> Html:
    """A table of names and values; see `fact`."""
    return fill('<table class="facts">\n<tbody>\n{rows}\n</tbody>\n</table>', rows=join(rows))


def fact(name: str, value: object, *, kind: str = "") -> Html:
    """A row of `facts_table`; `kind`: a CSS class of the value."""
    kind = Html(fill(' class="{kind}"', kind=kind)) if kind else Html("")
    return fill('<tr><th scope="row">{name}</th><td{kind}>{value}</td></tr>', name=name, kind=kind, value=value)
