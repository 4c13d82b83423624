"""Chromium for tests. In: nothing; out: the fixture `chromium`, one browser for a module, and `opened` pages of it.

Where there is no Chromium the tests are skipped, but in CI (the variable CI is "true") they fail: it installs one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

Scheme = Literal["light", "dark"]
# No service that a browser calls by itself: a test's requests are the page's.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, the system's own: playwright downloads none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing = "there is no Chromium: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what it did besides."""

    page: Any
    hosts: set[str] = field(default_factory=set)
    """Every host and port that it asked for something."""
    refused: list[str] = field(default_factory=list)
    """Answers with a status of 400 or more: "404 /favicon.ico"."""
    complaints: list[str] = field(default_factory=list)
    """Other errors in its console (with those of the content security policy), uncaught exceptions, dialogs."""


@contextmanager
def opened(
    chromium: Any, url: str, *, scheme: Scheme = "light", width: int = 1280, height: int = 900, **options: Any
) -> Iterator[Opened]:
    """The address in a fresh context: no storage, no cache of others. Afterwards it must have no complaints."""
    context = chromium.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce", **options
    )
    context.set_default_timeout(30_000)  # on a busy machine
    try:
        seen = Opened(context.new_page())
        watch(seen.page, seen)
        seen.page.goto(url)
        yield seen
        host = urlsplit(url).netloc
        assert seen.hosts <= {host}, f"requests to {seen.hosts - {host}}"
        assert not seen.complaints, seen.complaints
    finally:
        context.close()


def watch(page: Any, seen: Opened) -> None:
    """Write down the requests and complaints of a page."""

    def dismissed(dialog: Any) -> None:
        seen.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def answered(response: Any) -> None:
        if response.status >= 400:
            seen.refused.append(f"{response.status} {urlsplit(response.url).path}")

    def said(message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):  # they are in `refused`
            seen.complaints.append(message.text)

    page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
    page.on("response", answered)
    page.on("console", said)
    page.on("pageerror", lambda error: seen.complaints.append(f"exception: {error}"))
    page.on("dialog", dismissed)


def overflow_px(page: Any) -> int:
    """How many pixels the page is wider than its window: 0 if nothing scrolls sideways."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # after a resize
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
