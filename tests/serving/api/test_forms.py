"""The form of an answer where it is delicate: ends of turns, white space, parts of characters, silence."""

import time
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_models import BYTES, END, EOT, START, write_parrot
from hypothesis import given
from hypothesis import strategies as st

from regpt2.data.characters import CharacterTokenizer
from regpt2.data.chat_template import Message, prompt_ids
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.sampling.writing import TokenLogprob
from regpt2.serving.api import answering
from regpt2.serving.api.chat import _Trimmed
from regpt2.serving.api.tokens import CompletionLogprobs, chat_logprob, token_text
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running, server_of

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("says", "ends", "after", "text"),
    [
        (" naïve 🙂\n", END, "", "naïve 🙂"),
        ("yes", EOT, "and no", "yes"),
        ("", END, "", ""),
        ("a \n\n b ", END, "", "a \n\n b"),
    ],
)
def test_an_answer_ends_with_its_turn_and_has_no_white_space_around_it(
    tmp_path: Path, says: str, ends: int, after: str, text: str
) -> None:
    write_parrot(tmp_path / "parrot", ("hi", says), ends=ends, after=after)
    told: dict[str, Any] = {"model": "parrot", "messages": HI, "temperature": 0, "logprobs": True}
    with server_of(tmp_path / "parrot") as server, server.client() as client:
        found = client.chat.completions.create(**told)
        with client.chat.completions.create(**told, stream=True) as stream:
            parts = [part.choices[0] for part in stream]
        stopped = client.chat.completions.create(**told, stop="naïve")
    choice = found.choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert "".join(part.delta.content or "" for part in parts) == text
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert bytes(byte for one in choice.logprobs.content for byte in one.bytes or []) == says.encode()
    assert found.usage is not None and found.usage.completion_tokens == len(says.encode()) + 1  # with the end
    assert stopped.choices[0].message.content == ("" if "naïve" in says else text)


def test_an_answer_ends_with_the_context(tmp_path: Path) -> None:
    write_parrot(tmp_path / "parrot", ("hi", "x" * 42), block_size=64)  # the prompt has 22 tokens
    told: dict[str, Any] = {"model": "parrot", "messages": HI, "temperature": 0}
    with server_of(tmp_path / "parrot") as server, server.client() as client:
        for limit in ({}, {"max_tokens": 1000}, {"max_completion_tokens": 42}):
            found = client.chat.completions.create(**told, **limit)
            assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("x" * 42, "length")
            assert found.usage is not None and found.usage.total_tokens == 64


def test_the_end_of_text_stops_a_text_and_is_among_its_tokens(tmp_path: Path) -> None:
    write_parrot(tmp_path / "parrot", ("hi", "yes"), ends=EOT, after="and no")
    at = len(prompt_ids([Message("user", "hi")], BYTES))  # where the parrot speaks
    with server_of(tmp_path / "parrot") as server, server.client() as client:
        found = client.completions.create(model="parrot", prompt="x" * at, temperature=0, logprobs=0, max_tokens=9)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason) == ("yes", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["y", "e", "s", "<|endoftext|>"] and choice.logprobs.text_offset == [0, 1, 2, 3]


def test_an_answer_cannot_begin_another_message_but_a_continued_text_can(tmp_path: Path) -> None:
    write_parrot(tmp_path / "parrot", ("hi", "yes"), ends=START)
    with server_of(tmp_path / "parrot") as server, server.client() as client:
        answer = client.chat.completions.create(model="parrot", messages=HI, temperature=0, max_tokens=8, n=2)
        text = client.completions.create(model="parrot", prompt="hi", temperature=0, max_tokens=2, logprobs=0)
    for choice in answer.choices:
        content = choice.message.content or ""
        assert content.startswith("yes") and len(content) > 3 and "<|im_start|>" not in content
    assert text.choices[0].text == "<|im_start|><|im_start|>"


@given(st.lists(st.text(alphabet="ab \n\t", max_size=4), max_size=8))
def test_a_trimmed_stream_is_the_trimmed_text(pieces: list[str]) -> None:
    trimmed = _Trimmed()
    given_out = [trimmed.add(piece) for piece in pieces]
    assert "".join(given_out) == "".join(pieces).strip()


def test_tokens_are_named_as_openai_names_them() -> None:
    tokenizer = load_tokenizer("bytes")
    assert [token_text(tokenizer, token) for token in (97, 0xE2, 256)] == ["a", "bytes:\\xe2", "<|endoftext|>"]
    kept = TokenLogprob(0x80, -float("inf"), ((97, -0.5), (98, -1.0)))
    assert chat_logprob(tokenizer, kept, 1) == {
        "token": "bytes:\\x80",
        "bytes": [0x80],
        "logprob": -9999.0,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}],
    }
    form = CompletionLogprobs(tokenizer, 1).of([0x80], [kept])
    assert form["token_logprobs"] == [-9999.0]
    assert form["top_logprobs"] == [{"a": -0.5, "bytes:\\x80": -9999.0}]


@given(st.text(max_size=12))
def test_an_offset_is_that_of_the_character_that_a_token_is_in(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    found = CompletionLogprobs(tokenizer, 0).of(ids, [None] * len(ids))["text_offset"]
    assert found == [place for place, character in enumerate(tokenizer.decode(ids)) for _ in character.encode()]


def test_a_model_of_characters_refuses_another_character_and_begins_at_its_own_place(tmp_path: Path) -> None:
    """Without end of text, as nanoGPT's."""
    tokenizer = CharacterTokenizer("\n abcé")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=6), seed=1)
    (tmp_path / "letters").mkdir()
    ref = TokenizerRef(tokenizer.name, tokenizer.fingerprint, characters=tokenizer.characters)
    native.write(model, tmp_path / "letters", ref)
    told: dict[str, Any] = {"model": "letters", "temperature": 0, "max_tokens": 4, "logprobs": 20, "echo": True}
    with server_of(tmp_path / "letters") as server, server.client() as client:
        found = client.completions.create(**told, prompt=["abé", ""])
        with pytest.raises(openai.BadRequestError, match="'z', character 2 of the text, is not one of the 6") as caught:
            client.completions.create(**told, prompt="az")
    assert str(tmp_path) not in caught.value.message
    assert found.usage is not None and found.usage.prompt_tokens == 4  # a line end comes before the empty text
    first, second = found.choices
    assert first.text.startswith("abé") and len(first.text) == 7 and len(second.text) == 4
    assert first.logprobs is not None and first.logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6]
    assert second.logprobs is not None and second.logprobs.text_offset == [0, 1, 2, 3]
    assert first.logprobs.top_logprobs is not None and len(first.logprobs.top_logprobs[3]) == 6


def test_a_stream_that_waits_sends_comments_and_then_its_text(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.02)
    told: dict[str, Any] = {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 5, "temperature": 0}
    engine = server.models[TEXT_MODEL].engine
    with server.client() as client:
        whole = client.completions.create(**told).choices[0].text
        waits = engine.between_steps(lambda: time.sleep(0.3))
        raw = client.completions.with_raw_response.create(**told, stream=True)
        lines = list(raw.http_response.iter_lines())
        waits.result(10)
        assert lines.count(": waiting") >= 2
        with client.completions.create(**told, stream=True) as stream:
            assert "".join(part.choices[0].text for part in stream) == whole


def test_the_default_of_chat_is_the_first_model_that_chats(server: Running) -> None:
    with server.client() as client:
        found = client.chat.completions.create(model=None, messages=HI, max_tokens=1)  # type: ignore[call-overload]
        assert found.model == CHAT_MODEL
        found = client.completions.create(model=None, prompt="a", max_tokens=1)  # type: ignore[call-overload]
        assert found.model == TEXT_MODEL
