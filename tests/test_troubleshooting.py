"""docs/troubleshooting.md: the messages that it calls ours are in the source, and the parser takes its commands."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regpt2.base.options import parse
from regpt2.cli import MODULES, VERBS, main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
OURS = re.compile(r"`(?:regpt2|warning): ([^`]+)`")
HOLE = "\0"  # where an f-string puts a value


class Parsed(Exception):
    """The options were understood: nothing shall be done."""


def texts(source: str) -> Iterator[str]:
    """Every string of a Python file, whole; HOLE for each value in an f-string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)


def is_said(message: str, strings: list[str]) -> bool:
    """Is there a string that holds the fixed pieces of the message in their order?"""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
    wanted = re.compile(".*".join(pieces), re.S)
    return any(wanted.search(text) for text in strings)


def messages() -> list[str]:
    return OURS.findall(PAGE.read_text())


def commands() -> list[str]:
    """The lines of the page's blocks that run regpt2, by itself or under torchrun, without their comments."""
    lines = [
        line for block in re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.M | re.S) for line in block.splitlines()
    ]
    found = [re.search(r"(?:^|-m )regpt2 (?:-- )?(.*)$", line) for line in lines]
    return [match[1] for match in found if match]


STRINGS = [text for path in (ROOT / "src").rglob("*.py") for text in texts(path.read_text())]


@pytest.mark.parametrize("message", messages())
def test_a_message_of_ours_is_in_the_source(message: str) -> None:
    assert is_said(message, STRINGS)


def test_a_message_that_nobody_says_is_found() -> None:
    strings = [*texts('x = f"{a} is in use by {b}; wait " f"for it."')]
    assert is_said("... is in use by ...; wait for it.", strings)
    assert not is_said("... is used by ...; wait for it.", strings)
    assert not is_said("wait for it. ... is in use by", strings)


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_the_parser_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shlex.split(command, comments=True)
    module = importlib.import_module(f"regpt2.commands.{MODULES.get(arguments[0], arguments[0])}")

    def only_parse(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(module, "parse", only_parse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        main(arguments)


def test_the_page_has_messages_and_commands() -> None:
    assert len(messages()) > 20 and len(commands()) > 12
    assert {command.split()[0] for command in commands()} <= set(VERBS)
