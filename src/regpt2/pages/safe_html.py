"""HTML that escapes by itself. In: our own templates, values from anywhere; out: `Html`, safe to put on a page."""

import html
from collections.abc import Iterable
from typing import LiteralString

from regpt2.base.console import safe_text


class Html(str):
    """Markup, ready for a page. Made by `fill` and `join`; by hand only from text that we wrote ourselves."""

    __slots__ = ()


def fill(template: LiteralString, **values: object) -> Html:
    """The template with each `{name}` replaced by its value, escaped unless it is `Html` already."""
    return Html(template.format(**{name: _escaped(value) for name, value in values.items()}))


def join(parts: Iterable[Html], between: LiteralString = "\n") -> Html:
    """Pieces of markup, one after another."""
    return Html(between.join(parts))


def _escaped(value: object) -> Html:
    """Text for a page: markup is spelled out, control characters and half surrogates are shown as escapes."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(safe_text(str(value))))
