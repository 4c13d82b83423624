"""Bodies that are wrong: always an error of the client in OpenAI's form, never one of the server."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt2.serving.api.asking import SHARED
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 1},
    CHAT: {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}

NOT_WHOLE = ["3", 1.5, True, [], {}, -(2**64), 2**64, 1e300]
NOT_NUMBER = ["0.5", True, [], {}, -1, 10**400]
NOT_TEXT = [5, 0.5, True, [], {}]
NOT_FLAG = ["true", 0, 1, [], {}]
BAD_FIELDS: dict[str, list[Any]] = {
    "model": [*NOT_TEXT, "", "other", "../tiny", "\ud800", "x" * 10_000],
    "max_tokens": [*NOT_WHOLE, -1],
    "n": [*NOT_WHOLE, 0, -1, 5],
    "seed": NOT_WHOLE,
    "temperature": NOT_NUMBER,
    "top_p": [*NOT_NUMBER, 0, 1.1],
    "min_p": [*NOT_NUMBER, 1.1],
    "repetition_penalty": [*NOT_NUMBER, 0],
    "top_k": [*NOT_WHOLE, -1],
    "presence_penalty": [0.1, "0", True, []],
    "frequency_penalty": [-2, "0", {}],
    "logit_bias": [{"5": 1}, [], "{}"],
    "stop": ["", [""], ["a"] * 17, 5, [5], [["a"]], {"a": 1}, "x" * 1001, True],
    "stream": NOT_FLAG,
    "stream_options": [{"include_usage": True}, {"usage": True}, "a", [], True],
    "user": NOT_TEXT,
    "unknown": [1, None, "a"],
    "x" * 10_000: [1],
    "\ud800": [1],
    "": [1],
}
BAD_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [
        *[5, 0.5, True, {}, [], [[]], [""] * 257, ["a", 5], ["a", [97]], [97, "a"], [97, 1.0], [True], [[97], []]],
        *[
            [-1],
            [257],
            [10**30],
            [[97], [999]],
            [None],
            [[[97]]],
            "a" * 256,
            "a" * 100_000,
            [97] * 256,
            ["a", "b" * 300],
        ],
    ],
    "max_tokens": [0, 256, 10**6],
    "logprobs": [*NOT_WHOLE, -1, 21],
    "best_of": [*NOT_WHOLE, 0, 2],
    "echo": NOT_FLAG,
    "suffix": ["b", 5],
    "messages": [[{"role": "user", "content": "a"}]],
    "top_logprobs": [1],
}
USER = {"role": "user", "content": "a"}
BAD_CHAT: dict[str, list[Any]] = {
    "messages": [
        *[None, [], "a", {}, USER, [5], ["a"], [[USER]], [{}], [{"role": "user"}], [{"content": "a"}]],
        *[[{"role": 5, "content": "a"}], [{"role": "usr", "content": "a"}], [{"role": "\ud800", "content": "a"}]],
        *[
            [{"role": "user", "content": content}]
            for content in (None, 5, {}, [5], [{}], [{"type": "text"}], "a" * 256)
        ],
        *[[{"role": "user", "content": [part]}] for part in ({"type": "image_url"}, {"type": "text", "text": 5})],
        [{"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}],
        *[[USER, USER], [USER, {"role": "assistant", "content": "a"}], [{"role": "system", "content": "a"}]],
        *[[{**USER, "tool_calls": [{}]}], [{**USER, "name": 5}], [{**USER, "rol": 1}], [USER] * 1025],
        [{"role": "system", "content": "a" * 300}, USER],
    ],
    "logprobs": [1, "true", []],
    "top_logprobs": [1, 21, True],
    "max_tokens": [0],
    "max_completion_tokens": [*NOT_WHOLE, 0, 2],
    "tools": [[{"type": "function"}], {}, True],
    "tool_choice": ["required", {}],
    "response_format": [{"type": "json_object"}, "text"],
    "functions": [[{}]],
    "prompt": ["a"],
    "echo": [True],
}
RAW = [
    *[b"", b"{", b"{}x", b"[]", b"5", b'"a"', b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{'prompt': 1}", b"\x00"],
    *[b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}', b'{"temperature": 1e999}'],
    *[b'{"prompt": "a", "prompt": "b"}', b'{"a": {"b": 1, "b": 2}}', b'{"prompt": "' + b"\x01" + b'"}'],
    *[b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": ' + b"[" * 9 + b"]" * 9 + b"}", b'{"n": ' + b"9" * 5000 + b"}"],
    *[b'{"prompt": "\xed\xa0\x80"}', b'{"n": 01}', b'{"n": 1,}', b"prompt=a"],
]


def bad_bodies() -> Iterator[tuple[str, bytes]]:
    for path, own in ((COMPLETIONS, BAD_COMPLETIONS), (CHAT, BAD_CHAT)):
        for fields in (BAD_FIELDS, own):
            for name, values in fields.items():
                for value in values:
                    if value is not None or name in ("unknown", "messages"):
                        yield path, json.dumps(GOOD[path] | {name: value}).encode()
        for body in RAW:
            yield path, body


class Asker:
    """One connection, used again and again."""

    def __init__(self, server: Running) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        self.paths = [str(folder) for folder in server.folders.values()]

    def ask(self, path: str, body: bytes) -> tuple[int, Any]:
        self.connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read().decode()
        assert "Traceback" not in text and not any(folder in text for folder in self.paths), text
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text

    def refused(self, path: str, body: bytes) -> dict[str, Any]:
        status, answer = self.ask(path, body)
        assert 400 <= status < 500, (path, body[:200], status, answer)
        assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}, answer
        error: dict[str, Any] = answer["error"]
        assert error["type"] == "invalid_request_error" and 10 < len(error["message"]) < 1000, (body[:200], error)
        assert error["param"] is None or isinstance(error["param"], str)
        return error


@pytest.fixture
def asker(server: Running) -> Iterator[Asker]:
    asker = Asker(server)
    yield asker
    asker.connection.close()


def test_each_is_the_client_s_error(asker: Asker) -> None:
    bodies = list(bad_bodies())
    assert len(bodies) > 300
    for path, body in bodies:
        asker.refused(path, body)
    for path, good in GOOD.items():  # nothing is broken by them
        assert asker.ask(path, json.dumps(good).encode())[0] == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *[(path, name, None) for path in GOOD for name in BAD_FIELDS if name in SHARED],
        *[(path, name, 0) for path in GOOD for name in ("presence_penalty", "frequency_penalty", "top_k", "min_p")],
        *[(path, "logit_bias", {}) for path in GOOD],
        *[(COMPLETIONS, "suffix", ""), (COMPLETIONS, "best_of", 1), (COMPLETIONS, "prompt", None)],
        *[(COMPLETIONS, "prompt", "half a pair \ud800"), (CHAT, "messages", [{"role": "user", "content": "\ud800"}])],
        *[(CHAT, "tools", []), (CHAT, "response_format", {"type": "text"}), (CHAT, "tool_choice", "auto")],
    ],
)
def test_null_and_what_changes_nothing_and_half_a_character_are_accepted(
    asker: Asker, path: str, field: str, value: Any
) -> None:
    status, answer = asker.ask(path, json.dumps(GOOD[path] | {field: value}).encode())
    assert status == 200, answer


def test_a_body_without_a_field_is_a_whole_request(asker: Asker) -> None:
    """As at OpenAI but for the model: the beginning of a document, 16 tokens of the first model."""
    status, answer = asker.ask(COMPLETIONS, b"{}")
    assert status == 200 and answer["model"] == TEXT_MODEL and answer["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ({"promt": "a"}, "promt", "unknown_parameter", "There is no field 'promt'; did you mean 'prompt'?"),
        ({"n": 5}, "n", None, "n is 5; expected a whole number from 1 to 4, as many as the server writes at once."),
        ({"top_p": 0}, "top_p", None, "top_p is 0; expected a number above 0, at most 1."),
        ({"prompt": [300]}, "prompt", None, "prompt has the token id 300; expected ids from 0 to 256."),
        ({"best_of": 3, "n": 2}, "best_of", None, "best_of is supported only where it equals n, 2."),
        (
            {"prompt": [""] * 256, "n": 4, "max_tokens": 200, "logprobs": 2},
            None,
            "answer_too_large",
            "The answer may have 204,800 tokens with 3 values each; one answer has at most 500,000.",
        ),
        ({"suffix": "b"}, "suffix", None, "suffix is not supported: the model writes what follows a prompt"),
    ],
)
def test_a_message_names_the_field_what_it_got_and_what_it_expected(
    asker: Asker, body: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    error = asker.refused(COMPLETIONS, json.dumps(body).encode())
    assert (error["param"], error["code"]) == (param, code) and message in error["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
def test_an_unknown_place_or_method_is_refused_in_openai_s_form(server: Running, asker: Asker, method: str) -> None:
    path = "/v1/embeddings" if method == "POST" else COMPLETIONS
    asker.connection.request(method, path, b"{}", {"Content-Type": "application/json"})
    answer = asker.connection.getresponse()
    assert answer.status in (404, 405)
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({*BAD_FIELDS, *BAD_COMPLETIONS, *BAD_CHAT} - {"stream"})


@pytest.mark.seconds
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_body_is_an_error_of_the_server(server: Running, path: str) -> None:
    asker = Asker(server)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, min_size=1, max_size=3))
    def ask(fields: dict[str, Any]) -> None:
        body = json.dumps(GOOD[path] | fields).encode()
        status, answer = asker.ask(path, body)
        assert status == 200 or asker.refused(path, body), answer

    ask()
    asker.connection.close()
