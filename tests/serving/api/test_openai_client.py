"""The official client of OpenAI against a real server: whole answers and streams, of one shape and one text."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from regpt2.commands.sample import sample
from regpt2.data.chat_template import Message
from regpt2.sampling.chat.conversation import Chat, ChatOptions
from regpt2.sampling.continue_text import SampleOptions
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running

GREEDY: dict[str, Any] = {"model": TEXT_MODEL, "temperature": 0, "max_tokens": 40}
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


def whole_text(client: openai.OpenAI, **options: Any) -> str:
    return client.completions.create(**{**GREEDY, **options}).choices[0].text


@pytest.mark.parametrize("prompt", ["a", "ROMEO: naïve 🙂", ""])
def test_greedy_text_is_that_of_the_command_sample(server: Running, capsys: Any, prompt: str) -> None:
    options = SampleOptions(str(server.folders[TEXT_MODEL]), prompt, max_new_tokens=40, temperature=0, device="cpu")
    with server.client() as client:
        assert prompt + whole_text(client, prompt=prompt) == sample(options)[0]
        echoed = client.completions.create(**GREEDY, prompt=prompt, echo=True)
    assert echoed.choices[0].text == sample(options)[0]


def test_drawn_text_is_that_of_the_command_sample_with_the_same_options(server: Running, capsys: Any) -> None:
    told = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    options = SampleOptions(str(server.folders[TEXT_MODEL]), "ab", max_new_tokens=40, device="cpu", **told)
    extra = {name: told.pop(name) for name in ("top_k", "min_p", "repetition_penalty")}
    with server.client() as client:
        found = client.completions.create(model=TEXT_MODEL, prompt="ab", max_tokens=40, **told, extra_body=extra)
    assert "ab" + found.choices[0].text == sample(options)[0]


def test_a_stream_has_an_event_for_each_token_and_the_parts_of_the_whole_answer(server: Running) -> None:
    told: dict[str, Any] = {**GREEDY, "prompt": ["naïve", "b"], "logprobs": 2, "n": 2, "echo": True, "seed": 3}
    told["temperature"] = 0.7
    with server.client() as client:
        whole = client.completions.create(**told)
        with client.completions.create(**told, stream=True, stream_options={"include_usage": True}) as stream:
            parts = list(stream)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({part.id for part in parts}) == 1 and parts[0].id.startswith("cmpl-")
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert all(part.usage is None and len(part.choices) == 1 for part in parts[:-1])
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert len(mine) == 1 + 40  # the prompt, then each token
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine] == [None] * 40 + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for one in mine for value in getattr(one.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name.endswith("logprobs"):  # another batch may compute other last bits
                assert flat(joined) == pytest.approx(flat(expected), abs=1e-4)
            else:
                assert joined == expected


def flat(values: list[Any]) -> list[float]:
    """Numbers of a list of numbers, or of objects of numbers; 1 for null."""
    each = [[one] if isinstance(one, float) else list(one.values()) if one else [1.0] for one in values]
    return [number for numbers in each for number in numbers]


def test_the_n_differ_and_a_seed_gives_the_same_again(server: Running) -> None:
    told: dict[str, Any] = {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 20, "n": 3}
    with server.client() as client:
        texts = [[one.text for one in client.completions.create(**told, **seed).choices] for seed in ({}, {})]
        assert texts[0] != texts[1] and len(set(texts[0])) == 3
        again = [[one.text for one in client.completions.create(**told, seed=-5).choices] for _ in range(2)]
        assert again[0] == again[1]
        twice = client.completions.create(**{**told, "prompt": ["a", "a"], "n": 2, "seed": 1})
        assert len({one.text for one in twice.choices}) == 4  # a prompt that comes twice is drawn twice


def test_a_stop_text_ends_a_text_before_it(server: Running) -> None:
    with server.client() as client:
        text = whole_text(client, prompt="a")
        stop = text[7:9]
        found = client.completions.create(**GREEDY, prompt="a", stop=["never in it", stop])
        assert found.choices[0].text == text[: text.index(stop)]
        assert found.choices[0].finish_reason == "stop"
        assert client.completions.create(**GREEDY, prompt="a", stop=stop).choices[0].text == found.choices[0].text


def test_ids_and_their_text_are_the_same_prompt(server: Running) -> None:
    with server.client() as client:
        by_ids = client.completions.create(**GREEDY, prompt=[[97, 98], [99]])
        by_text = client.completions.create(**GREEDY, prompt=["ab", "c"])
        assert [one.text for one in by_ids.choices] == [one.text for one in by_text.choices]
        assert by_ids.usage == by_text.usage and by_ids.usage is not None
        assert (by_ids.usage.prompt_tokens, by_ids.usage.completion_tokens) == (3, 80)
        assert whole_text(client, prompt=[97, 98]) == by_text.choices[0].text


def test_log_probabilities_are_those_of_the_model(server: Running) -> None:
    """Against one forward pass of the model over prompt and text."""
    prompt = "é🙂ab"
    with server.client() as client:
        found = client.completions.create(**{**GREEDY, "prompt": prompt, "logprobs": 3, "echo": True, "max_tokens": 9})
    choice, served = found.choices[0], server.models[TEXT_MODEL]
    kept = choice.logprobs
    assert kept is not None and kept.tokens and kept.token_logprobs and kept.top_logprobs and kept.text_offset
    assert kept.tokens[:8] == [
        *(f"bytes:\\x{byte:02x}" for byte in "é🙂".encode()),
        "a",
        "b",
    ]
    assert kept.text_offset[:8] == [0, 0, 1, 1, 1, 1, 2, 3] and kept.text_offset[8] == 4
    assert kept.token_logprobs[0] is None and kept.top_logprobs[0] is None
    with torch.no_grad():
        ids = [*prompt.encode(), *greedy_ids(server, prompt, 9)]
        log_p = served.loaded.model(torch.tensor([ids])).log_softmax(-1)[0]
    for place in range(1, len(ids)):
        expected = float(log_p[place - 1, ids[place]])
        assert kept.token_logprobs[place] == pytest.approx(expected, abs=1e-4)
        best = log_p[place - 1].topk(3).values.tolist()
        top = sorted(kept.top_logprobs[place].values(), reverse=True)
        assert top[:3] == pytest.approx(best, abs=1e-4) and 3 <= len(top) <= 4


def greedy_ids(server: Running, prompt: str, n: int) -> list[int]:
    """By whole passes of the model, without a cache."""
    ids = list(prompt.encode())
    for _ in range(n):
        ids.append(int(server.models[TEXT_MODEL].loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt.encode()) :]


def test_a_prompt_can_be_scored_without_writing(server: Running) -> None:
    with server.client() as client:
        found = client.completions.create(**{**GREEDY, "prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 0})
        plain = client.completions.create(**{**GREEDY, "prompt": "abc", "echo": True, "max_tokens": 0})
    for answer in (found, plain):
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
        assert answer.usage is not None and answer.usage.completion_tokens == 0
    kept = found.choices[0].logprobs
    assert kept is not None and kept.tokens == ["a", "b", "c"] and kept.text_offset == [0, 1, 2]
    assert kept.top_logprobs is not None and [*kept.top_logprobs[1]] == ["b"]


def chat_of(server: Running, **options: Any) -> Chat:
    served = server.models[CHAT_MODEL]
    return Chat(served.loaded, served.tokenizer, ChatOptions("chat", temperature=0, device="cpu", **options))


CONVERSATIONS = {
    "one": HELLO,
    "system": [{"role": "system", "content": " Be brief. "}, *HELLO],
    "turns": [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "What?"}],
    "dropped": [
        {"role": ("user", "assistant")[n % 2], "content": f"{n} " + "word " * 8} for n in range(9)
    ],  # more than the context
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("most", [None, 12, 1000])
def test_an_answer_is_what_the_command_chat_writes(server: Running, name: str, most: int | None) -> None:
    messages = CONVERSATIONS[name]
    answer = chat_of(server, max_new_tokens=most).answer([Message(**one) for one in messages])
    assert (answer.n_dropped > 0) == (name == "dropped")
    limit: dict[str, Any] = {} if most is None else {"max_completion_tokens": most}
    with server.client() as client:
        found = client.chat.completions.create(model=CHAT_MODEL, messages=messages, temperature=0, **limit)
        with client.chat.completions.create(
            model=CHAT_MODEL, messages=messages, temperature=0, stream=True, **limit
        ) as stream:
            parts = list(stream)
    choice = found.choices[0]
    assert choice.message.content == answer.text != ""
    assert choice.finish_reason == ("stop" if answer.finished else "length")
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.text
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == choice.finish_reason
    assert all(part.choices[0].finish_reason is None for part in parts[:-1])


def test_chat_tells_log_probabilities_with_bytes(server: Running) -> None:
    with server.client() as client:
        found = client.chat.completions.create(
            model=CHAT_MODEL, messages=HELLO, temperature=0, logprobs=True, top_logprobs=2, n=2
        )
    for choice in found.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None and choice.message.content
        data = bytes(byte for one in choice.logprobs.content for byte in one.bytes or [])
        assert data.decode("utf-8", "replace").strip() == choice.message.content
        for one in choice.logprobs.content:
            assert len(one.top_logprobs) == 2
            assert one.logprob == max(other.logprob for other in one.top_logprobs) <= 0


def test_parts_of_a_content_are_one_text(server: Running) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]}]
    joined: Any = [{"role": "user", "content": "hello\nthere"}]
    with server.client() as client:
        texts = [
            client.chat.completions.create(model=CHAT_MODEL, messages=messages, temperature=0).choices[0].message
            for messages in (parts, joined)
        ]
    assert texts[0] == texts[1]


def test_models_are_listed_with_what_a_page_needs(server: Running) -> None:
    with server.client() as client:
        found = {one.id: one for one in client.models.list()}
        assert list(found) == [TEXT_MODEL, CHAT_MODEL]
        one = client.models.retrieve(CHAT_MODEL)
    assert one == found[CHAT_MODEL] and one.owned_by == "regpt2"
    extra = one.model_extra or {}
    n_params = server.models[CHAT_MODEL].loaded.model.n_params()
    assert extra == {"context_length": 256, "parameters": n_params, "vocab_size": 259, "chat": True}
    assert (found[TEXT_MODEL].model_extra or {})["chat"] is False


Call = Callable[[openai.OpenAI], object]
REFUSED: dict[str, tuple[Call, type[openai.APIStatusError], str | None, str]] = {
    "a field out of range": (
        lambda c: c.completions.create(model=TEXT_MODEL, prompt="a", temperature=-1),
        openai.BadRequestError,
        "temperature",
        "temperature is -1; expected a number of at least 0",
    ),
    "an unknown field": (
        lambda c: c.completions.create(model=TEXT_MODEL, prompt="a", extra_body={"max_token": 3}),
        openai.BadRequestError,
        "max_token",
        "There is no field 'max_token'; did you mean 'max_tokens'?",
    ),
    "an unknown model": (
        lambda c: c.completions.create(model="tini", prompt="a"),
        openai.NotFoundError,
        "model",
        "The model 'tini' does not exist; did you mean 'tiny'?",
    ),
    "a model that is not listed": (
        lambda c: c.models.retrieve("other"),
        openai.NotFoundError,
        "model",
        "The model 'other' does not exist",
    ),
    "a long prompt": (
        lambda c: c.completions.create(model=TEXT_MODEL, prompt="a" * 250, max_tokens=10),
        openai.BadRequestError,
        "prompt",
        "maximum context length is 256 tokens, however you requested 260 tokens (250 in your prompt; 10 for",
    ),
    "chat with a model of text": (
        lambda c: c.chat.completions.create(model=TEXT_MODEL, messages=HELLO),
        openai.BadRequestError,
        "model",
        "`regpt2 prepare chat`",
    ),
    "a long message": (
        lambda c: c.chat.completions.create(model=CHAT_MODEL, messages=[{"role": "user", "content": "a" * 250}]),
        openai.BadRequestError,
        "messages",
        "maximum context length is 256 tokens, however your last message has",
    ),
    "what is not supported": (
        lambda c: c.completions.create(model=TEXT_MODEL, prompt="a", logit_bias={"5": 1}),
        openai.BadRequestError,
        "logit_bias",
        "logit_bias is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_an_error_of_the_client_s_own_kind(server: Running, name: str) -> None:
    call, kind, param, message = REFUSED[name]
    with server.client() as client, pytest.raises(kind) as caught:
        call(client)
    assert message in caught.value.message and caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert (
        "Traceback" not in str(caught.value.body) and str(server.folders[TEXT_MODEL].parent) not in caught.value.message
    )


def test_many_clients_at_once_get_their_own_texts(server: Running) -> None:
    prompts = [f"{n} {'ab' * n}" for n in range(24)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.completions.create(**{**GREEDY, "prompt": prompt, "max_tokens": 12}) for prompt in prompts]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    together = asyncio.run(ask_all())
    with server.client() as client:
        assert together == [whole_text(client, prompt=prompt, max_tokens=12) for prompt in prompts]


def test_answers_are_strictly_of_openai_s_types(server: Running) -> None:
    """Strict: a number is no text, nothing is converted. Only what OpenAI itself breaks is left out: null in `echo`."""
    with server.client() as client:
        raw = client.completions.with_raw_response
        text = raw.create(**GREEDY, prompt="a", logprobs=2, n=2).content
        Completion.model_validate_json(text, strict=True)
        chat = client.chat.completions.with_raw_response
        told: dict[str, Any] = {"model": CHAT_MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 1}
        ChatCompletion.model_validate_json(chat.create(**told).content, strict=True)
        lines = chat.create(**told, stream=True, stream_options={"include_usage": True}).http_response.iter_lines()
        events = [line.removeprefix("data: ") for line in lines if line]
        for event in events[:-1]:
            ChatCompletionChunk.model_validate_json(event, strict=True)
        assert events[-1] == "[DONE]"
        Model.model_validate_json(client.models.with_raw_response.retrieve(TEXT_MODEL).content, strict=True)
        headers = raw.create(**GREEDY, prompt="a", stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_a_logarithm_of_zero_is_a_number() -> None:
    from regpt2.serving.api.tokens import finite

    assert finite(-math.inf) == -9999.0
