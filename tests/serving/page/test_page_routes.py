"""What the page asks for besides the API: its files, and attention, whose weights are those of `explore`."""

import asyncio
import base64
import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.requests import Request

from regpt2.exploring.measure import all_attention_weights, habits_of
from regpt2.model.gpt import CausalSelfAttention
from regpt2.pages import PAGE_CSS
from regpt2.serving.page import attention
from regpt2.serving.page.routes import FILES
from regpt2.serving.page.static_files import files_in, static_route
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running, server_of

TEXT = "To be, or naïve 🙂"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


def request(server: Running, path: str, body: Any = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    data = None if body is None else json.dumps(body)
    try:
        connection.request(
            "GET" if body is None else "POST", path, data, {**headers, "Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def ask(server: Running, **body: Any) -> Answer:
    return request(server, "/attention", {"model": TEXT_MODEL, **body})


def rows_of(found: dict[str, Any]) -> np.ndarray[Any, Any]:
    """(layers, heads, tokens), from the description of the format alone."""
    whole = np.frombuffer(base64.b64decode(found["weights"]), dtype="<u2") / 65535
    return whole.reshape(found["layers"], found["heads"], len(found["tokens"]))


def by_explore(server: Running, ids: list[int], model: str = TEXT_MODEL) -> torch.Tensor:
    return all_attention_weights(server.models[model].loaded.model, torch.tensor(ids))


def test_every_file_has_its_type_and_is_sent_again_only_if_it_changed(server: Running) -> None:
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    files = [path for path in FILES.iterdir() if path.suffix != ".html"]
    assert {path.suffix for path in files} == set(kinds)
    for path in (*files, PAGE_CSS):
        place = f"/static/{'report.css' if path == PAGE_CSS else path.name}"
        answer = request(server, place)
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].split(";")[0] == kinds[path.suffix]
        assert answer.headers["cache-control"] == "no-cache"
        again = request(server, place, **{"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.content) == (304, b"")
    assert request(server, "/static/main.html").status == 404
    assert request(server, "/static/..%2froutes.py").status == 404


def test_the_etag_is_of_the_content(tmp_path: Path) -> None:
    """Else a browser would run the script of another version."""
    etags = set()
    for text in ("one", "two"):
        (tmp_path / "a.js").write_text(text)
        send = static_route("/static", files_in(tmp_path)).endpoint
        answer = asyncio.run(send(Request({"type": "http", "headers": [], "path_params": {"name": "a.js"}})))
        assert answer.body == text.encode()
        etags.add(answer.headers["etag"])
    assert len(etags) == 2


def test_the_page_names_no_other_site_and_has_no_inline_script_or_style(server: Running) -> None:
    page = request(server, "/").content.decode()
    assert page.count("<script") == 1 and '<script type="module" src="/static/write.js"></script>' in page
    assert "<style" not in page and " style=" not in page and " onclick" not in page
    for path in FILES.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text, path.name
    assert 'href="/runs"' in page and '<a href="/" aria-current="page">' in page


def test_attention_is_that_of_explore(server: Running) -> None:
    ids = list(TEXT.encode())
    found = ask(server, text=TEXT, head=[1, 0]).json()
    expected = by_explore(server, ids)
    np.testing.assert_allclose(rows_of(found), expected[:, :, -1].numpy(), atol=0.5 / 65535 + 1e-6)
    roots = np.frombuffer(base64.b64decode(found["map"]), dtype="u1").reshape(len(ids), len(ids)) / 255
    np.testing.assert_allclose(roots, expected[1, 0].sqrt().numpy(), atol=0.5 / 255 + 1e-6)
    assert found["tokens"][:2] == ["T", "o"] and found["tokens"][-4:] == ["\\xf0", "\\x9f", "\\x99", "\\x82"]
    assert found["skipped"] == 0
    best = habits_of(expected, ids)
    assert [(one["what"], one["layer"], one["head"]) for one in found["habits"]] == [
        (habit.what, habit.layer, habit.head) for habit in best
    ]
    assert [one["share"] for one in found["habits"]] == pytest.approx([habit.share for habit in best])


def test_attention_from_an_earlier_token_and_from_ids(server: Running) -> None:
    ids = list(TEXT.encode())
    expected = by_explore(server, ids[:5])[:, :, -1].numpy()
    for given in ({"text": TEXT}, {"ids": ids}):
        found = ask(server, **given, position=4).json()
        assert len(found["tokens"]) == 5 and "map" not in found
        np.testing.assert_allclose(rows_of(found), expected, atol=1e-5)


def test_only_the_last_tokens_are_computed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_TOKENS", 20)
    long = "".join(chr(33 + n % 90) for n in range(100))
    found = ask(server, text=long).json()
    assert found["skipped"] == 80 and "".join(found["tokens"]) == long[-20:]
    np.testing.assert_allclose(rows_of(found), by_explore(server, list(long[-20:].encode()))[:, :, -1], atol=1e-5)


def test_attention_within_an_answer_sees_the_conversation_before_it(server: Running) -> None:
    messages = [{"role": "user", "content": "hello"}]
    found = ask(server, model=CHAT_MODEL, messages=messages, text="hi").json()
    tokens = found["tokens"]
    assert tokens[:2] == ["<|endoftext|>", "<|im_start|>"] and "".join(tokens[2:]).startswith("user\nhello")
    start, end = 257, 258
    ids = [256, start, *b"user\nhello", end, *b"\n", start, *b"assistant\n", *b"hi"]
    np.testing.assert_allclose(rows_of(found), by_explore(server, ids, CHAT_MODEL)[:, :, -1].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "text", "Give either text or ids"),
        ({"text": "a", "ids": [1]}, "text", "Give either text or ids"),
        ({"text": ""}, "text", "expected 1 to"),
        ({"text": 5}, "text", "expected a text"),
        ({"text": "a" * 70_000}, "text", "expected 1 to 65,536"),
        ({"ids": []}, "ids", "token ids from 0 to 256"),
        ({"ids": [257]}, "ids", "token ids from 0 to 256"),
        ({"ids": [True]}, "ids", "token ids from 0 to 256"),
        ({"text": "abc", "position": 3}, "position", "from 0 to 2: the text has 3 tokens"),
        ({"text": "abc", "position": -1}, "position", "from 0 to 2"),
        ({"text": "abc", "head": [2, 0]}, "head", "2 layers of 2 heads"),
        ({"text": "abc", "head": [0]}, "head", "2 layers of 2 heads"),
        ({"text": "abc", "heads": [0, 0]}, "heads", "did you mean 'head'?"),
        ({"text": "abc", "messages": [{"role": "user", "content": "a"}]}, "model", "does not chat"),
    ],
)
def test_nonsense_is_refused_in_openai_s_form(server: Running, body: dict[str, Any], param: str, words: str) -> None:
    answer = ask(server, **body)
    error = answer.json()["error"]
    assert answer.status == 400 and error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_model_that_is_not_served_is_404_and_other_attention_is_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(server, model="gpt-9", text="a").status == 404

    class Other(CausalSelfAttention):
        pass

    for block in server.models[TEXT_MODEL].loaded.model.h:
        monkeypatch.setattr(block.get_submodule("attn"), "__class__", Other)
    answer = ask(server, text="abc")
    assert answer.status == 400 and answer.json()["error"]["code"] == "no_attention_maps"
    assert "this package's attention" in answer.json()["error"]["message"]


def test_a_model_in_int8_has_no_attention_to_look_at_and_says_so(server: Running) -> None:
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no int8 instructions")
    with server_of(server.folders[TEXT_MODEL], dtype="int8") as running:
        answer = ask(running, text="abc")
    assert answer.status == 400 and "as with --dtype int8" in answer.json()["error"]["message"]


def test_attention_leaves_the_text_of_others_as_it_is(server: Running) -> None:
    """A hook that met a running step would see its rows, or the step would see the hook."""
    told: dict[str, Any] = {"model": TEXT_MODEL, "prompt": "abc", "max_tokens": 150, "seed": 3}
    with server.client() as client:
        alone = client.completions.create(**told).choices[0].text
        expected = rows_of(ask(server, text="abc").json())
        parts = []
        with client.completions.create(**told, stream=True) as stream:
            for number, part in enumerate(stream):
                parts.append(part.choices[0].text)
                if number % 30 == 0:
                    np.testing.assert_array_equal(rows_of(ask(server, text="abc").json()), expected)
    assert "".join(parts) == alone
