"""The page to write with, as a person uses it. In: an open page; out: what it shows."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from regpt2.model.files.load import load_model
from regpt2.model.weights import native
from regpt2.sampling.batching.batch import Batch
from serving.browser import Opened, Scheme, opened
from serving.tiny_server import TEXT_MODEL, Running, server_of

UNTIL_S = 30


@pytest.fixture(scope="module")
def peaked(model_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A text model that is sure of some tokens and not of others, and writes what can be typed; the chat model."""
    folder = tmp_path_factory.mktemp("peaked") / TEXT_MODEL
    loaded = load_model(str(model_folders[0]), device=torch.device("cpu"))
    assert loaded.tokenizer is not None
    with torch.no_grad():
        weights = dict(loaded.model.named_parameters())
        weights["ln_f.weight"] *= 5
        weights["wte.weight"][127:] *= 0.3
        weights["wte.weight"][:32] *= 0.3
    folder.mkdir()
    native.write(loaded.model, folder, loaded.tokenizer)
    with server_of(folder, model_folders[1], slots=4) as running:
        yield running


@contextmanager
def write_page(
    chromium: Any, server: Running, *, scheme: Scheme = "light", width: int = 1280, height: int = 900
) -> Iterator[Opened]:
    """The page, once it knows the models."""
    with opened(chromium, f"{server.url}/", scheme=scheme, width=width, height=height) as seen:
        seen.page.wait_for_selector("html[data-ready]")
        yield seen


def set_all(page: Any, **settings: object) -> None:
    """Fill the form of settings, which is closed on a narrow screen."""
    page.evaluate("document.querySelector('#settings').open = true")
    for name, value in settings.items():
        page.fill(f"#settings-form [name={name}]", str(value))


def write(page: Any, prompt: str | None = None, **settings: object) -> str:
    """Write after a prompt, or after what is there; the text of the editor when it is done."""
    set_all(page, **settings)
    if prompt is not None:
        page.fill("#text", prompt)
    page.press("#text", "Control+Enter")
    wait_until_done(page)
    return str(page.input_value("#text"))


def wait_until_done(page: Any) -> None:
    """Nothing is written any more. A writing that has begun shows at once: Stop is enabled in the same turn."""
    page.wait_for_selector("#stop:disabled")


def pieces(page: Any, pane: str = "first") -> list[tuple[str, str]]:
    """The class and the text of each piece."""
    found = page.evaluate(
        "pane => [...document.querySelectorAll(`#${pane} .layer > span`)].map(one => [one.className, one.textContent])",
        pane,
    )
    return [(kind, text) for kind, text in found]


def shown(text: str) -> str:
    """How the page shows a text: control characters by their pictures (Unicode, block 2400), one unit for one."""
    text = re.sub("[\u202a-\u202e\u2066-\u2069]", "\u2426", text)
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate({**pictures, 127: 0x2421})


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of every engine takes 50 ms: a person has time to stop it."""
    turn = Batch.turn

    def slow(self: Batch) -> None:
        time.sleep(0.05)
        turn(self)

    monkeypatch.setattr(Batch, "turn", slow)


def until(what: Any, page: Any = None) -> None:
    """Wait until `what()` is true; with a page its events are handled meanwhile."""
    end_at = time.monotonic() + UNTIL_S
    while not what():
        assert time.monotonic() < end_at, "waited in vain"
        if page is None:
            time.sleep(0.01)
        else:
            page.wait_for_timeout(10)


def asked_of(page: Any, path: str) -> list[dict[str, Any]]:
    """The bodies of the requests to `path` from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if urlsplit(one.url).path == path else None)
    return bodies
