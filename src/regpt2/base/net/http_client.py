"""HTTP with retries. In: an address; out: its answer in pieces, a small JSON value, or one error.

The hub's token is sent to the hub only, no redirect leads from https to http, and a transient failure is retried.
"""

import email.utils
import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from regpt2.base.errors import DownloadError
from regpt2.base.files import CHUNK_BYTES, SMALL_BYTES
from regpt2.base.net.hub_settings import hub_endpoint, hub_token, is_offline

T = TypeVar("T")

TIMEOUT_S = 30.0  # of silence, after which a connection is lost
PAUSE_S = 0.5  # before the first retry; doubled with each
LONGEST_PAUSE_S = 300.0
MOST_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # transient statuses


class Lost(Exception):
    """A transient failure: a retry may succeed."""

    def __init__(self, reason: object, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Unreachable(DownloadError):
    """The address did not answer, however often it was asked: another one on this network may not either."""


class NotThere(DownloadError):
    """HTTP 404 or 410: the address does not exist."""


class NotSatisfiable(DownloadError):
    """HTTP 416: the requested range is outside the file."""


def get_json(url: str, *, most_bytes: int = SMALL_BYTES, tries: int = 4) -> tuple[Any, Message]:
    """A small JSON answer and its headers.

    Raises:
        DownloadError: no network, a refusal, an answer that is too large or not JSON.
    """

    def attempt() -> tuple[bytes, Message]:
        data = bytearray()
        with opened(url, {}) as reply:
            for piece in pieces(reply):
                data += piece
                if len(data) > most_bytes:
                    raise DownloadError(f"{url} answers with more than {most_bytes:,} bytes.")
            return bytes(data), reply.headers

    data, headers = persist(attempt, lambda: 0, url, tries)
    try:
        return json.loads(data), headers
    except (ValueError, RecursionError) as error:
        raise DownloadError(
            f"{url} does not answer with JSON ({error}); does this network want you to log in?"
        ) from None


def persist(attempt: Callable[[], T], progress: Callable[[], int], url: str, tries: int) -> T:
    """Retry until `attempt` succeeds, or fails `tries` times in a row without progress."""
    failures, furthest = 0, progress()
    while True:
        try:
            return attempt()
        except Lost as lost:
            failures = 1 if progress() > furthest else failures + 1
            furthest = max(furthest, progress())
            if failures >= tries:
                kept = f"; {progress():,} bytes were kept" if progress() else ""
                times = f", {tries} times in a row" if tries > 1 else ""
                raise Unreachable(
                    f"could not download {url} ({lost}{times}{kept}); check the network and run the command again."
                ) from None
            pause = PAUSE_S * 2 ** (failures - 1) * random.uniform(0.5, 1)  # else all workers retry at once
            time.sleep(min(LONGEST_PAUSE_S, max(pause, lost.wait_s)))


@contextmanager
def opened(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a request, its status 200 or 206."""
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url}: expected an address that begins with https://.")
    request = urllib.request.Request(url, headers={"User-Agent": "regpt2", **headers})
    _authorize(request)
    opener = urllib.request.build_opener(_Redirects)  # new each time: it reads the proxy settings
    try:
        reply = opener.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error) from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"could not download {url}: its certificate is not valid ({cause.verify_message}); "
                "behind a proxy with a certificate of its own, name that in SSL_CERT_FILE."
            ) from None
        raise Lost(cause) from None
    with reply:
        yield reply


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """The exception for an error status: `Lost` if it is transient."""
    status = error.code
    if status in _PASSING:
        return Lost(f"HTTP {status}", _wait_s(error.headers.get("Retry-After", "")))
    if status == 416:
        return NotSatisfiable(f"could not download {url} (HTTP 416, the range is outside the file); check the address.")
    if status in (404, 410):
        return NotThere(f"{url} does not exist (HTTP {status}); check the name and the revision.")
    meaning = f"HTTP {status}; check the address"
    if status in (401, 403):
        meaning = f"access is refused, HTTP {status}"
        if _is_hub(url):
            meaning += "; it is gated, private or missing: accept its terms on its page, then set HF_TOKEN"
    elif 300 <= status < 400:
        meaning = f"redirects lead nowhere, HTTP {status}; check the address"
    return DownloadError(f"could not download {url} ({meaning}).")


def _wait_s(retry_after: str) -> float:
    """Seconds of a Retry-After header: a number, or a date."""
    if retry_after.isdigit():
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def pieces(reply: Any) -> Iterator[bytes]:
    """The content in pieces, each as soon as it arrives, so that none is lost with the connection."""
    announced = reply.headers["Content-Length"] or ""
    left = int(announced) if announced.isdigit() else None
    while left != 0:
        try:
            piece = reply.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Lost(error) from None
        if not piece:
            break
        left = None if left is None else left - len(piece)
        yield piece
    if left:
        raise Lost(f"the connection was closed {left:,} bytes before the end")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow at most MOST_REDIRECTS, never from https to http."""

    max_redirections = MOST_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request, without the Authorization header of this one."""
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise DownloadError(f"could not download {req.full_url}: it redirects to {newurl}, which is not secure.")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            _authorize(request)
        return request


def _authorize(request: urllib.request.Request) -> None:
    """Add the token if the request is to the hub; refuse that if the user wants to be offline."""
    if not _is_hub(request.full_url):
        return
    if is_offline():
        raise DownloadError(f"HF_HUB_OFFLINE is set, and {request.full_url} is not on this machine; unset it.")
    if token := hub_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _is_hub(url: str) -> bool:
    address, hub = urlsplit(url), urlsplit(hub_endpoint())
    return (address.scheme, address.netloc) == (hub.scheme, hub.netloc)
