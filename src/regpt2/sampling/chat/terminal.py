"""A conversation in the terminal. In: lines of standard input; out: answers on standard output, as they are written.

A line is a message, or a command if it begins with /. Where standard input is a pipe, the answers alone go to standard
output, so a script can use it. Problems and notes go to standard error.
"""

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from regpt2.base.console import safe_text, say, show, warn, wrapped
from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.base.files import describe_os_error
from regpt2.data.chat_template import ASSISTANT, SYSTEM, USER, Message
from regpt2.data.tokenizer import valid_text
from regpt2.sampling.chat.conversation import Answer, Chat

PROMPT = "> "
HELP = (
    "/new               begin a new conversation",
    "/system TEXT       set the system message; without TEXT, remove it",
    "/undo              take back the last message and its answer",
    "/save FILE.jsonl   add this conversation to a file, for `regpt2 prepare chat`",
    "/quit              leave; Ctrl-D does too",
    "Ctrl-C stops an answer. Put a space before a message that begins with /.",
)


class ChatTerminal:
    """Reads lines until there are no more, and answers each."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.turns = chat, list[Message]()
        self.system = valid_text(chat.options.system)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.noted: set[str] = set()
        self.commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: say(wrapped(HELP)),
            "/new": self._new,
            "/system": self._set_system,
            "/undo": self._undo,
            "/save": self._save,
        }

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, in the order of the template."""
        return [*([Message(SYSTEM, self.system)] if self.system.strip() else []), *self.turns]

    def run(self) -> None:
        """Converse until the input ends, `/quit` comes, or Ctrl-C at the prompt.

        Raises:
            Problem: only where the input is no terminal: a message cannot be answered, or a command is wrong.
        """
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self.interactive:
            with suppress(ImportError):  # where it exists, `input` edits lines and keeps a history
                importlib.import_module("readline")
            say("A line is a message; /help lists the commands, Ctrl-D leaves.")
        try:
            while (line := self._next_line()) is not None and line.split()[:1] != ["/quit"]:
                self._take(line)
        except KeyboardInterrupt:  # outside of an answer
            if not self.interactive:
                raise
            say()

    def _next_line(self) -> str | None:
        """The next line that is not empty; None at the end of the input."""
        with suppress(EOFError):
            while True:
                line = valid_text(input(PROMPT if self.interactive else ""))
                if line.strip():
                    return line
        if self.interactive:
            say()
        return None

    def _take(self, line: str) -> None:
        try:
            self._obey(line)
        except Problem as problem:
            if not self.interactive:
                raise
            sys.stderr.write(safe_text(f"{problem}\n"))

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line.strip())
            return
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            known = [*self.commands, "/quit"]
            raise UsageError(f"there is no command {name!r:.80}{did_you_mean(name, known)} /help lists them.")
        self.commands[name](rest.strip())

    def _answer(self, text: str) -> None:
        self.turns.append(Message(USER, text))
        try:
            answer = self.chat.answer(self.messages, show)
        except Problem:
            self.turns.pop()
            raise
        say()
        if answer.interrupted and not self.interactive:
            raise KeyboardInterrupt
        self._note(answer)
        if answer.interrupted and not answer.text:
            self.turns.pop()  # the template has no question without an answer
        else:
            self.turns.append(Message(ASSISTANT, answer.text))

    def _note(self, answer: Answer) -> None:
        """Report, once in a conversation each, that the context is full and that an answer was cut."""
        if answer.n_dropped:
            self._warn_once(
                f"the context of {self.chat.context:,} tokens is full: from now on the model does not see the oldest "
                "messages."
            )
        if not answer.finished and not answer.interrupted:
            self._warn_once("the answer was cut: it reached --max-new-tokens, or the end of the context.")

    def _warn_once(self, text: str) -> None:
        if text not in self.noted:
            self.noted.add(text)
            warn(text)

    def _new(self, _: str = "") -> None:
        self.turns.clear()
        self.noted.clear()

    def _set_system(self, text: str) -> None:
        self.system = text

    def _undo(self, _: str) -> None:
        if not self.turns:
            raise UsageError("there is nothing to take back.")
        del self.turns[-2:]

    def _save(self, name: str) -> None:
        """Add the conversation to a file, as one line: {"messages": [{"role": ..., "content": ...}, ...]}."""
        if not name or not self.turns:
            raise UsageError("there is nothing to save yet." if name else "/save needs a file: /save FILE.jsonl.")
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            raise UsageError(f"/save: {name!r:.80} must end in .jsonl, as `regpt2 prepare chat` reads it.")
        messages = [{"role": one.role, "content": one.content} for one in self.messages]
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            with open(path, "ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                file.write(line.encode())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = describe_os_error(error) if isinstance(error, OSError) else str(error)
            raise Problem(f"/save: {why}") from None
        sys.stderr.write(safe_text(f"saved {len(messages)} messages to {path}\n"))
