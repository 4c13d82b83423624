"""Who may ask: a matrix of Host, Origin, Sec-Fetch-Site, Content-Type and key, each with the status it must get."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from asgi_client import HOST, JSON, PORT, Pairs, ask
from starlette.routing import Route

from regpt2.serving.api.routes import api_routes
from regpt2.serving.http.access import Access, needs_key
from regpt2.serving.http.door import Door
from regpt2.serving.http.exchange import Limits, Traffic
from regpt2.serving.page.routes import page_routes
from regpt2.serving.runs.routes import runs_routes

KEY = "0123456789abcdef-secret"
SITE = "https://notes.example.org"
PAGE = f"http://127.0.0.1:{PORT}"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers everything that gets through."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"let in"})


def door(access: Access = Access()) -> Door:  # noqa: B008
    return Door(app, access, Limits(), Traffic())


def host(value: str) -> tuple[str, str]:
    return ("host", value)


def origin(value: str) -> tuple[str, str]:
    return ("origin", value)


def site(value: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [HOST, ("sec-fetch-site", value), *more]


HOSTS = [
    ([HOST], 200),
    ([host("localhost:8000")], 200),
    ([host("LOCALHOST:8000")], 200),
    ([host("[::1]:8000")], 200),
    ([], 400),
    ([host("")], 400),
    ([host(" ")], 400),
    ([HOST, HOST], 400),
    ([HOST, host("evil.example")], 400),
    ([host("127.0.0.1:8000, evil.example")], 400),
    ([host("127.0.0.1:8000@evil.example")], 400),
    ([host("user@127.0.0.1:8000")], 400),
    ([host("127.0.0.1:8000/")], 400),
    ([host("127.0.0.1:08000")], 400),
    ([host("127.0.0.1:")], 400),
    ([host("http://127.0.0.1:8000")], 400),
    ([host("l\xf6calhost:8000")], 400),
    ([host("127.0.0.1")], 421),
    ([host("localhost")], 421),
    ([host("127.0.0.1:8001")], 421),
    ([host("127.0.0.2:8000")], 421),
    ([host("0.0.0.0:8000")], 421),
    ([host("localhost.:8000")], 421),
    ([host("localhost.evil.example:8000")], 421),
    ([host("evil.example")], 421),
    ([host("evil.example:8000")], 421),
    ([host("192.168.1.5:8000")], 421),
]
ORIGINS = [
    ([HOST, origin(PAGE)], 200),
    ([host("localhost:8000"), origin("http://localhost:8000")], 200),
    ([host("localhost:8000"), origin(PAGE)], 403),
    ([HOST, origin("null")], 403),
    ([HOST, origin("")], 403),
    ([HOST, origin(SITE)], 403),
    ([HOST, origin("http://127.0.0.1:3000")], 403),
    ([HOST, origin("http://127.0.0.1")], 403),
    ([HOST, origin("http://127.0.0.1:8000.evil.example")], 403),
    ([HOST, origin(PAGE), origin(PAGE)], 403),
    ([HOST, origin(PAGE), origin(SITE)], 403),
    (site("same-origin"), 200),
    (site("none"), 200),
    (site("cross-site"), 403),
    (site("Cross-Site"), 403),
    (site("cross-site", ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")), 403),
    (site("cross-site", ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")), 403),
    (site("cross-site", ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")), 200),  # a link to the page
    (site("cross-site", ("sec-fetch-dest", "document"), origin(SITE)), 403),
]
KINDS = [
    ([JSON], 200),
    ([("content-type", "application/json; charset=utf-8")], 200),
    ([("content-type", "Application/JSON")], 200),
    ([], 415),
    ([("content-type", "")], 415),
    ([("content-type", "text/plain")], 415),
    ([("content-type", "text/plain; application/json")], 415),
    ([("content-type", "application/x-www-form-urlencoded")], 415),
    ([("content-type", "multipart/form-data; boundary=x")], 415),
    ([("content-type", "application/jsonp")], 415),
    ([JSON, ("content-type", "text/plain")], 415),
    ([JSON, ("sec-fetch-site", "cross-site"), ("sec-fetch-dest", "document")], 403),
]


@pytest.mark.parametrize(("headers", "status"), HOSTS + ORIGINS, ids=str)
def test_a_get_is_answered_only_for_this_server_s_own_names_and_pages(headers: Pairs, status: int) -> None:
    answer = ask(door(), "GET", "/v1/models", headers)
    assert answer.status == status
    assert (answer.body == b"let in") == (status == 200) and (status == 200 or answer.error)


@pytest.mark.parametrize(("headers", "status"), KINDS, ids=str)
def test_a_post_needs_a_content_type_that_no_form_can_send(headers: Pairs, status: int) -> None:
    assert ask(door(), "POST", "/v1/completions", [HOST, *headers]).status == status


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ([f"Bearer {KEY}"], 200),
        ([f"bearer  {KEY} "], 200),
        ([], 401),
        ([""], 401),
        (["Bearer"], 401),
        (["Bearer "], 401),
        ([KEY], 401),
        ([f"Basic {KEY}"], 401),
        ([f"Bearer {KEY}x"], 401),
        ([f"Bearer {KEY[:-1]}"], 401),
        ([f"Bearer {KEY.upper()}"], 401),
        (["Bearer \xe9\xff"], 401),
        ([f"Bearer {KEY}", f"Bearer {KEY}"], 401),
    ],
    ids=str,
)
def test_with_a_key_only_who_sends_it_is_answered(given: list[str], status: int) -> None:
    headers = [HOST, JSON, *(("authorization", value) for value in given)]
    answer = ask(door(Access(key=KEY)), "POST", "/v1/completions", headers)
    assert answer.status == status
    if status == 401:
        assert answer.header("www-authenticate") == "Bearer" and answer.error["code"] == "invalid_api_key"
        assert KEY not in answer.body.decode()


def test_a_server_for_others_is_known_by_its_address_and_by_the_names_it_was_given() -> None:
    access = Access("0.0.0.0", ("gpt.example.org", "tunnel:9000"), key=KEY)
    ours = ["10.0.0.7:8000", "gpt.example.org", "gpt.example.org:8000", "tunnel:9000", "localhost:8000"]
    others = ["10.0.0.8:8000", "10.0.0.7", "gpt.example.org:81", "tunnel", "tunnel:8000", "evil.example:8000"]
    for names, status in ((ours, 200), (others, 421)):
        found = {name: ask(door(access), "GET", "/", [host(name)], address="10.0.0.7").status for name in names}
        assert found == dict.fromkeys(names, status)


def test_an_address_of_ipv6_is_known_in_brackets_only() -> None:
    access = Access("fd00::7", key=KEY)
    assert ask(door(access), "GET", "/", [host("[fd00::7]:8000")], address="fd00::7").status == 200
    assert ask(door(access), "GET", "/", [host("fd00::7:8000")], address="fd00::7").status == 400
    mapped = "::ffff:10.0.0.7"  # an IPv4 client of a socket of both
    assert ask(door(Access("::", key=KEY)), "GET", "/", [host("10.0.0.7:8000")], address=mapped).status == 200


def test_a_name_that_the_system_gave_the_socket_is_not_taken_for_an_address() -> None:
    assert ask(door(), "GET", "/", [host("evil.example:8000")], address="evil.example").status == 421


def test_pages_of_an_allowed_origin_may_ask_and_read_and_no_others() -> None:
    allowed = door(Access(origins=(SITE,), key=KEY))
    asks = [HOST, origin(SITE), ("sec-fetch-site", "cross-site"), JSON]
    answer = ask(allowed, "POST", "/v1/completions", [*asks, ("authorization", f"Bearer {KEY}")])
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") == SITE and answer.header("vary") == "Origin"
    assert answer.header("access-control-allow-credentials") is None
    refused = ask(allowed, "POST", "/v1/completions", asks)
    assert refused.status == 401
    assert refused.header("access-control-allow-origin") == SITE, "the page must be able to read what is wrong"
    for other in (SITE + ".evil.example", SITE.upper(), "http" + SITE[5:], "null", "*"):
        answer = ask(allowed, "POST", "/v1/completions", [HOST, JSON, origin(other)])
        assert answer.status == 403 and answer.header("access-control-allow-origin") is None


def test_a_preflight_is_answered_to_an_allowed_origin_without_a_key() -> None:
    asks = [HOST, ("access-control-request-method", "POST"), ("access-control-request-headers", "authorization,x-a")]
    allowed = door(Access(origins=(SITE,), key=KEY))
    answer = ask(allowed, "OPTIONS", "/v1/completions", [*asks, origin(SITE), ("sec-fetch-site", "cross-site")])
    assert answer.status == 204 and answer.body == b""
    assert answer.header("access-control-allow-origin") == SITE
    assert answer.header("access-control-allow-methods") == "GET, POST"
    assert answer.header("access-control-allow-headers") == "authorization,x-a"
    strange = [*asks[:2], ("access-control-request-headers", "a\x00b"), origin(SITE)]
    answer = ask(allowed, "OPTIONS", "/v1/completions", strange)
    assert answer.header("access-control-allow-headers") == "authorization, content-type"
    other = ask(allowed, "OPTIONS", "/v1/completions", [*asks, origin("https://evil.example")])
    assert other.status == 403 and other.header("access-control-allow-origin") is None
    assert ask(allowed, "OPTIONS", "/v1/completions", asks).status == 401, "no page asks"


@pytest.mark.parametrize("path", ["http://127.0.0.1:8000/v1/models", "*", "", "v1/models"])
def test_a_target_that_is_no_path_is_refused(path: str) -> None:
    assert ask(door(), "GET", path).status == 400


def test_two_ways_to_say_how_long_the_body_is_are_refused() -> None:
    both = [HOST, JSON, ("content-length", "2"), ("transfer-encoding", "chunked")]
    answer = ask(door(), "POST", "/v1/completions", both, [b"{}"])
    assert answer.status == 400 and answer.error["code"] == "bad_framing"
    assert answer.header("connection") == "close"


def test_many_or_long_headers_are_refused() -> None:
    assert ask(door(), "GET", "/", [HOST, *[("x-a", "b")] * 99]).status == 200
    assert ask(door(), "GET", "/", [HOST, *[("x-a", "b")] * 100]).status == 431
    assert ask(door(), "GET", "/", [HOST, ("x-a", "b" * 16_000)]).status == 200
    assert ask(door(), "GET", "/", [HOST, ("x-a", "b" * 16_384)]).status == 431
    assert ask(door(), "GET", "/" + "a" * 16_384, [HOST]).status == 431
    assert ask(door(), "GET", "/?" + "a" * 16_384, [HOST]).status == 431


def paths(routes: Iterable[Route]) -> set[str]:
    return {
        route.path.replace("{name:path}", "a/b").replace("{name}", "x").replace("{rest:path}", "x") for route in routes
    }


def test_without_the_key_only_pages_without_data_are_open(tmp_path: Path) -> None:
    """Of all routes there are: a new one needs the key unless it is named here."""
    found = paths([*api_routes({}), *page_routes({}), *runs_routes(tmp_path)])
    assert {path for path in found if not needs_key(path)} == {"/", "/runs", "/runs/a/b", "/static/x", "/static/runs/x"}
    assert {"/attention", "/runs-events", "/runs/a/b/events", "/runs/a/b/report", "/v1/completions"} < found


@pytest.mark.parametrize(
    "path", ["/V1/models", "//v1/models", "/runs/../v1/models/events", "/static", "/health/", "/x"]
)
def test_a_path_that_is_almost_an_open_one_needs_the_key(path: str) -> None:
    assert ask(door(Access(key=KEY)), "GET", path).status == 401
