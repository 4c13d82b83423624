"""When something goes wrong: the text stays, and one line says what happened, in the server's words."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from regpt2.sampling.batching.events import Event, Piece
from regpt2.sampling.writing import Request
from regpt2.serving.app import build_app
from regpt2.serving.http.access import Access
from serving import tiny_server
from serving.tiny_server import TEXT_MODEL, Running, server_of
from serving.writing_page import set_all, shown, until, wait_until_done, write, write_page

pytestmark = [pytest.mark.browser, pytest.mark.seconds, pytest.mark.process]

KEY = "correct horse battery staple"


@pytest.mark.usefixtures("slow_steps")
def test_a_busy_server_is_asked_again_and_meanwhile_the_page_says_so(
    chromium: Any, model_folders: tuple[Path, Path]
) -> None:
    with server_of(model_folders[0], slots=1, queue=1) as running, write_page(chromium, running) as seen:
        page, engine = seen.page, running.models[TEXT_MODEL].engine
        begun: list[Event] = []
        others = [engine.submit(Request((97,), 200), begun.append)]
        until(lambda: begun)
        others.append(engine.submit(Request((97,), 200), begun.append))
        set_all(page, max_tokens=5, seed=1)
        page.fill("#text", "a")
        page.press("#text", "Control+Enter")
        page.wait_for_selector("#first .notice:visible")
        assert "Ask again after a moment. Waiting 1 s, then asking again; Esc gives up." in page.inner_text(
            "#first .notice"
        )
        assert set(seen.refused) == {"429 /v1/completions"} and page.input_value("#text") == "a"
        for ticket in others:
            ticket.cancel()
        wait_until_done(page)
        assert len(page.input_value("#text")) > 1 and not page.is_visible("#first .notice")


def test_a_server_with_a_key_is_given_it(
    chromium: Any, model_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_server, "build_app", partial(build_app, access=Access(key=KEY)))
    with server_of(model_folders[0]) as running, tiny_page(chromium, running) as seen:
        page = seen.page
        page.wait_for_selector("#key-form:visible")
        assert "this server needs an API key" in page.inner_text("#key-why")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-why:has-text('this API key is wrong')")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("html[data-ready]")
        assert write(page, "a", max_tokens=5, seed=1) != "a"
        page.locator("#first .token").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("canvas.map[data-head]")
        kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert KEY not in kept[0] and KEY in kept[1], "the key is gone with the tab"
        page.click("#commands summary")
        page.wait_for_selector("#curl:not(:empty)")
        assert KEY not in page.content() and "$REGPT2_API_KEY" in page.inner_text("#curl")


def tiny_page(chromium: Any, running: Running) -> Any:
    """The page before it knows the models."""
    from serving.browser import opened

    return opened(chromium, f"{running.url}/")


@pytest.mark.usefixtures("slow_steps")
def test_a_server_that_ends_in_the_middle_leaves_the_text(chromium: Any, model_folders: tuple[Path, Path]) -> None:
    with server_of(model_folders[0]) as running:
        opening = write_page(chromium, running)
        seen = opening.__enter__()
        page = seen.page
        set_all(page, max_tokens=200, seed=1)
        page.fill("#text", "a")
        page.press("#text", "Control+Enter")
        until(lambda: page.locator("#first .token").count() >= 3, page)
    wait_until_done(page)
    text = page.input_value("#text")
    assert len(text) >= 4 and "cut off" in page.inner_text("#first .facts")
    assert page.inner_text("#first .notice") in (
        "The connection to the server broke before the text was complete.",
        "The server closed the connection before the text was complete.",
        "The server is stopping.",
    )
    page.press("#text", "Control+Enter")
    page.wait_for_selector("#first .notice:has-text('The server does not answer. Is it still running?')")
    assert page.input_value("#text") == text and page.is_enabled("#write")
    opening.__exit__(None, None, None)


def test_a_model_that_is_no_longer_served_and_one_that_fails(
    chromium: Any, model_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_of(*model_folders) as running, write_page(chromium, running) as seen:
        page = seen.page
        text = write(page, "a", max_tokens=5, seed=1)
        gone = running.models.pop(TEXT_MODEL)
        write(page)
        assert page.inner_text("#first .notice").startswith("The model 'tiny' does not exist")
        running.models[TEXT_MODEL] = gone
        assert page.input_value("#text") == text
        monkeypatch.setattr(Piece, "__init__", lambda *_, **__: 1 / 0)
        write(page)
        assert page.inner_text("#first .notice") == "The model failed. The server's log has the details."
        assert page.input_value("#text") == text and page.is_disabled("#stop")
        monkeypatch.undo()
        gone.engine.close(0)


def test_a_text_longer_than_the_context_is_read_from_its_end(chromium: Any, server: Running) -> None:
    with write_page(chromium, server) as seen:
        page = seen.page
        prompt = "".join(chr(97 + n % 26) for n in range(300))
        text = write(page, prompt, max_tokens=100, seed=1)
        assert "read the last 156 of 300 characters" in page.inner_text("#first .facts")
    with server.client() as client:
        told: dict[str, Any] = {"max_tokens": 100, "temperature": 0.8, "seed": 1}
        expected = client.completions.create(model=TEXT_MODEL, prompt=prompt[-156:], **told).choices[0].text
    assert text == shown(prompt + expected), "a context of 256, 100 of them new"
