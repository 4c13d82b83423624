"""Who may ask. In: the head of a request; out: None, or why it is refused.

A web page of any site can send requests to this machine's own addresses, and by DNS rebinding with a name of its own.
So Host must be a name of this server, Origin this server or an allowed one, and a POST must have a content type
for which a browser first asks whether it may.
"""

import hmac
import ipaddress
import re
from dataclasses import dataclass

from starlette.types import Scope

from regpt2.serving.http.errors import Refusal

OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
MOST_HEADERS = 100
MOST_HEADER_BYTES = 16 * 1024
OPEN_PATHS = ("/", "/health", "/runs", "/favicon.ico")
"""They compute nothing and show no run: a browser can send no key when it opens a page."""
RUN_DATA = ("/events", "/panels", "/report")
"""Below /runs/NAME, which itself is a page without data: its script asks for these with the key."""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?")


@dataclass(frozen=True)
class Access:
    """Who may ask, besides a program on this machine."""

    host: str = "127.0.0.1"
    """The address that the server listens at."""
    names: tuple[str, ...] = ()
    """Other values of Host, as NAME or NAME:PORT: of a reverse proxy or a tunnel."""
    origins: tuple[str, ...] = ()
    """Origins of pages of other sites that may ask."""
    key: str | None = None
    """What `Authorization: Bearer` must hold; None asks for nothing."""


def values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header; its name in lower case."""
    return [value for key, value in scope["headers"] if key == name]


def refusal(access: Access, scope: Scope) -> Refusal | None:
    """The first reason not to answer."""
    for check in (_head, _host, _origin, _content_type, _key):
        if (found := check(access, scope)) is not None:
            return found
    return None


def allowed_origin(access: Access, scope: Scope) -> bytes | None:
    """The request's Origin, if it is another site's that may ask."""
    origins = values(scope, b"origin")
    return origins[0] if len(origins) == 1 and origins[0].decode("latin-1") in access.origins else None


def needs_key(path: str) -> bool:
    """Does this path compute something or show a run?"""
    is_page_of_a_run = path.startswith("/runs/") and not path.endswith(RUN_DATA)
    return not (path in OPEN_PATHS or path.startswith("/static/") or is_page_of_a_run)


def _head(_: Access, scope: Scope) -> Refusal | None:
    headers = scope["headers"]
    n_bytes = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
    if len(headers) > MOST_HEADERS or n_bytes + len(scope["query_string"]) > MOST_HEADER_BYTES:
        return Refusal(431, "the request has too many headers, or too long ones.", "headers_too_large")
    if not scope["path"].startswith("/"):
        return Refusal(400, "the request must name a path, not a whole URL.", "bad_target")
    if scope["http_version"] not in ("1.0", "1.1"):
        return Refusal(400, "this server speaks HTTP/1.1.", "bad_version")
    in_chunks = bool(values(scope, b"transfer-encoding"))
    if in_chunks and (values(scope, b"content-length") or scope["http_version"] == "1.0"):
        # Two servers may read two different requests in the same bytes: request smuggling.
        return Refusal(400, "the length of the body is ambiguous.", "bad_framing")
    return None


def _host(access: Access, scope: Scope) -> Refusal | None:
    hosts = values(scope, b"host")
    parts = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    if parts is None:
        return Refusal(400, "the request needs one Host header, this server's name and port.", "bad_host")
    address, port = scope["server"] or ("", None)
    if _is_ours(access, parts[1], parts[2] or "", address, str(port)):
        return None
    return Refusal(421, "Host is no name of this server; --allow-host NAME adds one.", "unknown_host")


def _is_ours(access: Access, name: str, given_port: str, address: str, port: str) -> bool:
    """Is `name:given_port` this server, where the connection arrived at `address:port`?"""
    own = (*OWN_NAMES, access.host, f"[{access.host}]")
    # A number, unlike a name, cannot be rebound: the browser has connected to the very address it shows.
    if (name in own or name.strip("[]") == _as_number(address)) and (given_port or "80") == port:
        return True
    return (name in access.names and given_port in ("", port)) or f"{name}:{given_port}" in access.names


def _as_number(address: str) -> str | None:
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return None
    return str(getattr(number, "ipv4_mapped", None) or number)  # an IPv4 client of an IPv6 socket


def _origin(access: Access, scope: Scope) -> Refusal | None:
    origins, sites = values(scope, b"origin"), values(scope, b"sec-fetch-site")
    if allowed_origin(access, scope) is not None:
        return None
    host = values(scope, b"host")[0].lower()
    if origins and (len(origins) > 1 or origins[0] not in (b"http://" + host, b"https://" + host)):
        return Refusal(403, "pages of this origin may not ask; --allow-origin URL lets them.", "origin_not_allowed")
    if any(site.lower() == b"cross-site" for site in sites) and not _opens_a_page(scope):
        return Refusal(403, "pages of other sites may not ask; --allow-origin URL lets them.", "cross_site")
    return None


def _opens_a_page(scope: Scope) -> bool:
    """Someone follows a link to a page of ours: the other site can read nothing of it and cannot frame it."""
    dest = values(scope, b"sec-fetch-dest")
    return scope["method"] == "GET" and dest == [b"document"] and not values(scope, b"origin")


def _content_type(_: Access, scope: Scope) -> Refusal | None:
    if scope["method"] not in ("POST", "PUT", "PATCH"):
        return None
    kinds = [value.partition(b";")[0].strip().lower() for value in values(scope, b"content-type")]
    if kinds == [b"application/json"]:
        return None
    return Refusal(415, "the body must be JSON: Content-Type: application/json.", "unsupported_content_type")


def _key(access: Access, scope: Scope) -> Refusal | None:
    if access.key is None or not needs_key(scope["path"]) or is_preflight(access, scope):
        return None
    given = values(scope, b"authorization")
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), access.key.encode()):
        return None
    what = "this API key is wrong." if given else "this server needs an API key: Authorization: Bearer KEY."
    return Refusal(401, what, "invalid_api_key", headers=((b"www-authenticate", b"Bearer"),))


def is_preflight(access: Access, scope: Scope) -> bool:
    """Does a browser ask whether a page of an allowed origin may send a request? It sends no key with that."""
    asks = values(scope, b"access-control-request-method")
    return scope["method"] == "OPTIONS" and bool(asks) and allowed_origin(access, scope) is not None
