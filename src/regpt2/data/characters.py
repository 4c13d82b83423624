"""Characters as tokens, as nanoGPT's character-level data has them. In: its `meta.pkl`; out: a tokenizer, and back.

`meta.pkl` is the pickle of {'vocab_size': 65, 'itos': {0: '\\n', ...}, 'stoi': {'\\n': 0, ...}}. Only the opcodes that
build dicts, texts and whole numbers are read here, by a loop of our own: nothing in the file can call anything.
"""

import pickletools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import sha256_bytes
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.other_formats import regular_file_bytes

META_NAME = "meta.pkl"
MOST_CHARACTERS = 1 << 16  # ids are uint16
MOST_BYTES = 4 << 20  # about twice what 65,536 characters take
_SHOWN = 200  # of the characters, in a message

_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_NUMBERS = {"INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_MARK = object()


class CharacterTokenizer(Tokenizer):
    """Each id is a character; there is no end of text, and a character that is not among them cannot be encoded."""

    name = "characters"
    eot: None = None
    encoder = "regpt2"

    def __init__(self, characters: str) -> None:
        """`characters[i]` is the character of id i.

        Raises:
            DataError: one comes twice or is half a surrogate pair, or there are none or too many.
        """
        if not 1 <= len(characters) <= MOST_CHARACTERS:
            raise DataError(f"{len(characters):,} characters, expected 1 to {MOST_CHARACTERS:,} of them.")
        self.characters: str = characters
        self.vocab_size = len(characters)
        self._ids = {character: token for token, character in enumerate(characters)}
        if len(self._ids) < len(characters):
            twice = next(one for token, one in enumerate(characters) if self._ids[one] != token)
            raise DataError(f"the character {twice!r} comes twice among {len(characters):,}, expected once.")
        try:
            pieces = [character.encode() for character in characters]
        except UnicodeEncodeError as error:
            raise DataError(f"{error.object!r} is half a surrogate pair, expected a character.") from None
        self.fingerprint = sha256_bytes(b"regpt2 characters 1: " + b"".join(pieces))
        self.start_id = self._ids.get("\n", 0)
        super().__init__(pieces)

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        """Ids of a text.

        Raises:
            UsageError: it has a character that is not among these.
        """
        try:
            return np.array([self._ids[character] for character in text], dtype=np.uint16)
        except KeyError as error:
            unknown = error.args[0]
            shown = self.characters[:_SHOWN] + ("..." if len(self.characters) > _SHOWN else "")
            raise UsageError(
                f"{unknown!r}, character {text.index(unknown) + 1:,} of the text, is not one of the "
                f"{self.vocab_size:,} characters that this vocabulary has: {shown!r}; write the text without it."
            ) from None


def read_meta(path: Path) -> CharacterTokenizer:
    """The characters in nanoGPT's `meta.pkl`. Nothing in the file is run.

    Raises:
        DataError: it is missing or damaged, holds more than dicts, texts and whole numbers, or its parts disagree.
    """
    try:
        if (n_bytes := regular_file_bytes(path)) > MOST_BYTES:
            raise DataError(f"it has {n_bytes:,} bytes, expected at most {MOST_BYTES:,}.")
        return CharacterTokenizer(_characters(_plain(path.read_bytes())))
    except DataError as error:
        raise DataError(
            f"{path}: {error} It should be the vocabulary of nanoGPT's character-level data; make it again with the "
            "data set's prepare.py, or move it elsewhere if the ids beside it are GPT-2's."
        ) from None


def meta_bytes(characters: str) -> bytes:
    """A `meta.pkl` with these characters, as Python's own pickle reads it."""
    itos = dict(enumerate(characters))
    stoi = {character: token for token, character in itos.items()}
    return b"\x80\x02" + _pickled({"vocab_size": len(characters), "itos": itos, "stoi": stoi}) + b"."


def _pickled(value: Any) -> bytes:
    """The opcodes of protocol 2 that build a dict, a text or a whole number."""
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(item) for pair in value.items() for item in pair) + b"u"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    data = str(value).encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _characters(meta: Any) -> str:
    """The characters in the order of their ids.

    Raises:
        DataError: the object is not what nanoGPT writes.
    """
    if not isinstance(meta, dict) or not {"vocab_size", "itos", "stoi"} <= meta.keys():
        got = f"a dict of {[*map(_shown, meta)]!s:.200}" if isinstance(meta, dict) else _shown(meta)
        raise DataError(f"it holds {got}, expected a dict of 'vocab_size', 'itos' and 'stoi'.")
    n, itos, stoi = meta["vocab_size"], meta["itos"], meta["stoi"]
    if type(n) is not int or not isinstance(itos, dict) or not isinstance(stoi, dict):
        raise DataError("its 'vocab_size' is not a whole number, or its 'itos' or 'stoi' is not a dict.")
    if not n == len(itos) == len(stoi):
        raise DataError(f"its vocab_size is {n}, 'itos' has {len(itos):,} and 'stoi' {len(stoi):,}, expected the same.")
    found = [itos.get(token) for token in range(n)]
    for token, one in enumerate(found):
        if not isinstance(one, str) or len(one) != 1:
            raise DataError(f"'itos' has {_shown(one)} for id {token}, expected one character for each id below {n:,}.")
        if stoi.get(one) != token:
            raise DataError(f"'itos' has {one!r} for id {token}, 'stoi' has id {_shown(stoi.get(one))} for it.")
    return "".join(map(str, found))


def _shown(value: Any) -> str:
    """A value for a message; only the type of a dict, which may be nested too deeply to show."""
    return f"{value!r:.80}" if type(value) in (str, int, type(None)) else f"a {type(value).__name__}"


def _plain(data: bytes) -> Any:
    """What a pickle of dicts, texts and whole numbers holds.

    Raises:
        DataError: it is damaged, or would build anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, place in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            if not _apply(opcode.name, argument, stack, memo):
                raise DataError(
                    f"it holds more than dicts, texts and whole numbers ({opcode.name} at byte {place}); "
                    "it was not run."
                )
        (value,) = stack
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
        raise DataError(f"it is not a pickle, or a damaged one ({type(error).__name__}: {error!s:.200}).") from None
    return value


def _apply(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> bool:
    """Apply one opcode; False if it builds anything but plain values."""
    if name in _TEXTS or name in _NUMBERS:
        stack.append(argument)
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "DICT":
        stack.append(_as_dict(_to_mark(stack)))
    elif name == "SETITEM":
        pair = [stack.pop(), stack.pop()][::-1]
        stack[-1].update(_as_dict(pair))
    elif name == "SETITEMS":
        items = _to_mark(stack)
        stack[-1].update(_as_dict(items))
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in _PUTS:
        memo[argument] = stack[-1]
    elif name in _GETS:
        stack.append(memo[argument])
    else:
        return name in ("PROTO", "FRAME")
    return True


def _to_mark(stack: list[Any]) -> list[Any]:
    at = next(at for at in range(len(stack) - 1, -1, -1) if stack[at] is _MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _as_dict(items: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
