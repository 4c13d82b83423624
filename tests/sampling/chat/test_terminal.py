"""The conversation in a terminal and through a pipe: what is shown, kept, saved and refused."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_models import write_parrot

from regpt2.base.errors import Problem, UsageError
from regpt2.commands.chat import main
from regpt2.data.chat_template import Message, messages_of
from regpt2.model.files.load import load_model
from regpt2.sampling.chat.conversation import Answer, Chat, ChatOptions
from regpt2.sampling.chat.terminal import ChatTerminal
from regpt2.sampling.tokenizer import tokenizer_of

Give = Callable[[str | bytes], None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Standard input with this content, as of a pipe."""

    def put(content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return put


@pytest.fixture
def terminal(tmp_path: Path) -> Callable[..., ChatTerminal]:
    """In a terminal, with a model that repeats the number of messages that it is given."""
    write_parrot(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))

    def make(answer: Callable[..., Answer] | None = None, **options: Any) -> ChatTerminal:
        chat = Chat(loaded, tokenizer_of(loaded), ChatOptions("", **options))
        made = ChatTerminal(chat)
        made.interactive = True

        def counted(messages: list[Message], on_text: Callable[[str], object]) -> Answer:
            on_text(text := f"{len(messages)} messages")
            return Answer(text, 0, finished=True)

        chat.answer = answer or counted  # type: ignore[method-assign]
        return made

    return make


def test_each_line_of_a_pipe_is_answered_and_answers_alone_are_printed(
    tmp_path: Path, give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parrot(tmp_path, ("hi", "Hello!"), ("more", "né"))
    give(b"hi\n\n  more \n")
    assert main([str(tmp_path), "--temperature", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("Hello!\nné\n", "")
    give(b"hi")
    assert main([str(tmp_path), "--temperature", "0", "--device", "cpu", "--system", "Be kind."]) == 0
    assert capsys.readouterr().out != "Hello!\n"  # the system message moves the prompt, and so this model's answer


def test_what_the_model_writes_cannot_control_the_terminal(
    tmp_path: Path, give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parrot(tmp_path, ("hi", "a\x1b[2Jb\u202e"))
    give("hi\n")
    main([str(tmp_path), "--temperature", "0", "--device", "cpu"])
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202e\n"


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path, give: Give, capsys: pytest.CaptureFixture[str]) -> None:
    write_parrot(tmp_path, ("\ufffd", "odd"))
    give(b"\xff\n")
    assert main([str(tmp_path), "--temperature", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("odd\n", "")


def test_a_pipe_fails_at_a_message_that_cannot_be_answered(tmp_path: Path, give: Give) -> None:
    write_parrot(tmp_path)
    give("x" * 200 + "\nhi\n")
    with pytest.raises(UsageError, match="the message has 220 tokens"):
        main([str(tmp_path), "--device", "cpu"])
    give("/nwe\n")
    with pytest.raises(UsageError, match=r"there is no command '/nwe'; did you mean '/new'\? /help lists them\."):
        main([str(tmp_path), "--device", "cpu"])


def test_a_conversation_is_kept_begun_again_and_taken_back(
    terminal: Callable[..., ChatTerminal], give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = terminal()
    give("a\nb\n/undo\nc\n/system s\nd\n /new\n/system\n/new\ne\n/quit\nnever\n")
    chat.run()
    out = capsys.readouterr().out
    counts = [line.removeprefix("> ")[0] for line in out.replace("> ", "").splitlines() if line.endswith(" messages")]
    assert counts == ["1", "3", "3", "6", "8", "1"]  # " /new" is a message
    assert chat.messages == [Message("user", "e"), Message("assistant", "1 messages")]
    assert "/help lists the commands" in out


def test_commands_are_listed_and_a_wrong_one_ends_nothing(
    terminal: Callable[..., ChatTerminal], give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    give("/help\n/undo\n/save\n/save a.jsonl\n/x\na\n")
    terminal().run()
    out, err = capsys.readouterr()
    assert all(command in out for command in ("/new", "/system TEXT", "/undo", "/save FILE.jsonl", "/quit"))
    assert err.splitlines() == [
        "there is nothing to take back.",
        "/save needs a file: /save FILE.jsonl.",
        "there is nothing to save yet.",
        "there is no command '/x'. /help lists them.",
    ]
    assert "1 messages" in out


def test_saved_conversations_are_lines_that_prepare_chat_reads(
    tmp_path: Path, terminal: Callable[..., ChatTerminal], give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a b.jsonl"
    file.write_text('{"messages": []}')  # without a line end
    give(f"é\n/save {file}\n/new\nb\n/save {file}\n/save {tmp_path}/x.txt\n/save {tmp_path}/no/x.jsonl\n")
    terminal(system="s").run()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    answer = Message("assistant", "2 messages")
    saved = [messages_of(line["messages"]) for line in lines[1:]]
    assert saved == [(Message("system", "s"), Message("user", text), answer) for text in ("é", "b")]
    err = capsys.readouterr().err
    assert f"saved 3 messages to {file}\n" in err and "must end in .jsonl" in err and "No such file" in err


def test_notes_come_once_in_a_conversation(
    terminal: Callable[..., ChatTerminal], give: Give, capsys: pytest.CaptureFixture[str]
) -> None:
    give("a\nb\n/new\nc\n")
    terminal(lambda messages, on_text: Answer("x", 2, finished=False)).run()
    err = capsys.readouterr().err
    assert err.count("the context of 128 tokens is full") == err.count("the answer was cut") == 2


def test_ctrl_c_stops_an_answer_and_at_the_prompt_it_leaves(
    terminal: Callable[..., ChatTerminal], give: Give, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [Answer("", 0, finished=False, interrupted=True), Answer("par", 0, finished=False, interrupted=True)]
    )
    chat = terminal(lambda messages, on_text: next(answers))
    give("a\nb\n")
    chat.run()
    assert chat.messages == [Message("user", "b"), Message("assistant", "par")]  # a question without an answer is gone

    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    chat.run()
    chat.interactive = False
    with pytest.raises(KeyboardInterrupt):
        chat.run()


def test_a_message_that_fails_is_not_kept(terminal: Callable[..., ChatTerminal], give: Give) -> None:
    def fail(messages: list[Message], on_text: Callable[[str], object]) -> Answer:
        raise Problem("too long")

    chat = terminal(fail)
    give("a\n")
    chat.run()
    assert chat.messages == []
