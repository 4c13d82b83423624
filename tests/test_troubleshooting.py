"""docs/troubleshooting.md: the messages that it calls ours are in the source. tests/test_docs.py tries its commands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
OURS = re.compile(r"`(?:regpt2|warning): ([^`]+)`")
HOLE = "\0"  # where an f-string puts a value


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


STRINGS = [text for path in (ROOT / "src").rglob("*.py") for text in texts(path.read_text())]


@pytest.mark.parametrize("message", messages())
def test_a_message_of_ours_is_in_the_source(message: str) -> None:
    assert is_said(message, STRINGS)


def test_a_message_that_nobody_says_is_found() -> None:
    strings = [*texts('x = f"{a} is in use by {b}; wait " f"for it."')]
    assert is_said("... is in use by ...; wait for it.", strings)
    assert not is_said("... is used by ...; wait for it.", strings)
    assert not is_said("wait for it. ... is in use by", strings)


def test_the_page_has_messages() -> None:
    assert len(messages()) > 20
