"""The frame of every page of the server. In: what is particular to a page; out: one HTML document."""

from collections.abc import Sequence
from typing import Literal

from regpt2.pages.safe_html import Html, fill, join

# Also sent as a header; here too, so that a page is never without it.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
PLACES = {"write": ("/", "Write"), "runs": ("/runs", "Runs")}

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
{links}
</head>
<body class="{kind}">
<header class="site">
<a class="mark" href="/">regpt2</a>
<nav aria-label="Pages">
{places}
</nav>
</header>
{main}
</body>
</html>
"""


def page_document(
    title: str,
    here: Literal["write", "runs"],
    main: Html,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> Html:
    """A document with the style of the report, a header that links all pages, and `main`.

    Args:
        here: which of the header's links is this page; also a class of the body.
        styles: addresses of style sheets that follow those of all pages.
        scripts: addresses of ES modules.
    """
    sheets = ("/static/report.css", "/static/site.css", *styles)
    links = [
        *(fill('<link rel="stylesheet" href="{href}">', href=href) for href in sheets),
        *(fill('<script type="module" src="{src}"></script>', src=src) for src in scripts),
    ]
    places = [
        fill('<a href="{href}"{current}>{name}</a>', href=href, name=name, current=_CURRENT if key == here else Html())
        for key, (href, name) in PLACES.items()
    ]
    return fill(
        _DOCUMENT,
        policy=CONTENT_SECURITY_POLICY,
        title=title,
        links=join(links),
        kind=here,
        places=join(places),
        main=main,
    )


_CURRENT = Html(' aria-current="page"')
