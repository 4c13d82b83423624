"""A chat model's answers: those of transformers, within the context, ended by any end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import BYTES, EOT, START, write_parrot, write_random

import regpt2
from regpt2.base.errors import DataError, UsageError
from regpt2.data.chat_template import Message, prompt_ids
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.sampling.chat.conversation import Answer, Chat, ChatOptions
from regpt2.sampling.tokenizer import tokenizer_of


def chat_of(folder: Path, **options: Any) -> Chat:
    loaded = load_model(str(folder))
    return Chat(loaded, tokenizer_of(loaded), ChatOptions(str(folder), device="cpu", **options))


def user(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def test_an_answer_ends_at_its_mark_and_arrives_in_whole_characters(tmp_path: Path) -> None:
    write_parrot(tmp_path, ("hi", " naïve 🙂\n"))
    pieces: list[str] = []
    answer = chat_of(tmp_path, temperature=0).answer(user("hi"), pieces.append)
    assert answer == Answer("naïve 🙂", 0, finished=True)
    assert "".join(pieces) == "naïve 🙂\n" and "ï" in pieces and "🙂" in pieces


def test_the_end_of_text_ends_an_answer_too(tmp_path: Path) -> None:
    write_parrot(tmp_path, ("hi", "yes"), ends=EOT, after="and no")
    assert chat_of(tmp_path, temperature=0).answer(user("hi")) == Answer("yes", 0, finished=True)


def test_an_answer_cannot_begin_another_message(tmp_path: Path) -> None:
    write_parrot(tmp_path, ("hi", "yes"), ends=START)
    answer = chat_of(tmp_path, temperature=0, max_new_tokens=8).answer(user("hi"))
    assert answer.text.startswith("yes") and "<|im_start|>" not in answer.text


def test_an_answer_that_is_cut_says_so(tmp_path: Path) -> None:
    write_parrot(tmp_path, ("hi", "a long answer"))
    assert chat_of(tmp_path, max_new_tokens=6, temperature=0).answer(user("hi")) == Answer("a long", 0, finished=False)
    write_parrot(tmp_path / "b", ("hi", "x" * 42), block_size=64)  # the prompt has 22 tokens
    assert chat_of(tmp_path / "b", temperature=0).answer(user("hi")) == Answer("x" * 42, 0, finished=False)


def test_the_oldest_turns_leave_a_full_context_and_the_system_message_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parrot(tmp_path)
    chat, prompts = chat_of(tmp_path), list[list[int]]()

    def spy(model: Any, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        prompts.append(ids[0].tolist())
        return ids

    monkeypatch.setattr("regpt2.sampling.chat.conversation.generate", spy)
    system, turns = Message("system", "s"), user("1" * 9, "2" * 9, "3" * 9, "4" * 9, "5" * 9)
    answer = chat.answer([system, *turns])
    # 128 tokens, of which a quarter stays free: one, and not two, of the earlier turns fits
    assert answer.n_dropped == 2 and prompts == [prompt_ids([system, *turns[2:]], chat.tokenizer)]
    assert len(prompts[0]) <= 96 < len(prompt_ids([system, *turns], chat.tokenizer))
    assert replace(answer, n_dropped=0) == chat.answer([system, *turns[2:]])


def test_a_last_message_is_kept_if_any_answer_fits_and_else_refused(tmp_path: Path) -> None:
    write_parrot(tmp_path)
    chat = chat_of(tmp_path)
    fixed = len(prompt_ids(user(""), chat.tokenizer))
    assert chat.answer(user("x" * (127 - fixed))).n_dropped == 0
    with pytest.raises(UsageError, match=r"the message has 128 tokens with .* context of 128 must hold an answer too"):
        chat.answer(user("x" * (128 - fixed)))
    with pytest.raises(UsageError, match="the message and the system message have"):
        chat.answer([Message("system", "y"), *user("x" * (127 - fixed))])


def test_ctrl_c_keeps_what_was_written(tmp_path: Path) -> None:
    write_parrot(tmp_path, ("hi", "one two"))

    def stop(text: str) -> None:
        if text == "w":
            raise KeyboardInterrupt

    answer = chat_of(tmp_path, temperature=0).answer(user("hi"), stop)
    assert answer == Answer("one tw", 0, finished=False, interrupted=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"context": 1}, "context = 1 must be from 2 to the model's block_size, 128"),
        ({"context": 129}, "context = 129 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"seed": -1}, "seed = -1 must be from 0"),
        ({"temperature": -1.0}, "temperature = -1.0 must be 0"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"top_k": -1}, "top_k = -1 must be 0"),
    ],
)
def test_an_option_out_of_range_is_refused(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    write_parrot(tmp_path)
    with pytest.raises(UsageError, match=why):
        chat_of(tmp_path, **options)


def test_python_answers_as_the_class_does_and_checks_the_messages(tmp_path: Path) -> None:
    write_random(tmp_path, "bytes", block_size=96)
    model = regpt2.load(tmp_path, device="cpu")
    asked = [{"role": "user", "content": "a"}]
    told: dict[str, Any] = {"max_new_tokens": 12, "seed": 5, "temperature": 0.8}
    assert model.chat(asked, **told) == chat_of(tmp_path, **told).answer(user("a")).text
    assert model.chat(asked, **told) == model.chat(asked, **told) != model.chat(asked, **told | {"seed": 6})
    with pytest.raises(DataError, match="message 2 is of the role 'user', expected 'assistant'"):
        model.chat([*asked, *asked])
    with pytest.raises(DataError, match="message 3 is of the role 'system'"):
        model.chat([*asked, {"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}])
    with pytest.raises(UsageError, match="the last message is an answer already"):
        model.chat([*asked, {"role": "assistant", "content": "b"}])


def test_a_model_of_no_conversations_is_refused(tmp_path: Path) -> None:
    small = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=257))
    native.write(small, tmp_path, TokenizerRef("bytes", BYTES.fingerprint))
    with pytest.raises(
        UsageError, match=r"is no chat model: its tokenizer 'bytes' lacks the tokens <\|im_start\|> and"
    ):
        chat_of(tmp_path)
    with pytest.raises(UsageError, match="is no chat model"):
        regpt2.load(tmp_path, device="cpu").chat([{"role": "user", "content": "a"}])
