"""The headers that every answer has. In: an answer's own headers; out: with those that browsers need to stay safe."""

import re
from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

# The page loads its own files and asks its own server: no inline script, no other site, no frame around it.
CONTENT_SECURITY_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY: Headers = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
PREFLIGHT_S = 600
_NAMES = re.compile(rb"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+)*")


def with_safety(headers: Iterable[tuple[bytes, bytes]], allowed_origin: bytes | None) -> Headers:
    """An answer's headers and those of SAFETY that it does not set; for an allowed origin also leave to read it."""
    own = list(headers)
    names = {name.lower() for name, _ in own}
    own += [(name, value) for name, value in SAFETY if name not in names]
    if allowed_origin is not None:
        own += [(b"access-control-allow-origin", allowed_origin), (b"vary", b"Origin")]
    return own


def preflight(asked: bytes) -> Headers:
    """The answer to a browser that asks for another origin what it may send; `asked` are names of headers.

    The origin is one of --allow-origin, so it may send any header: clients name themselves in some.
    """
    allowed = asked if _NAMES.fullmatch(asked) else b"authorization, content-type"
    return [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", b"%d" % PREFLIGHT_S),
    ]
