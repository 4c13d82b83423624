"""JSON of a model folder. In: a file that need not be trusted; out: the object in it, and back."""

import json
from pathlib import Path
from typing import Any

from regpt2.base.errors import CheckpointError
from regpt2.base.files import read_small, write_atomic
from regpt2.model.files.contract import CONFIG, WEIGHTS


def _whole(digits: str) -> int:
    """A whole number in JSON; one far beyond 64 bits is not a size, and would overflow when divided or shown."""
    if len(digits) > len(str(2**64)):
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a CheckpointError if it is missing, too large, or holds no JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a model folder holds {CONFIG} beside {WEIGHTS}.")
    try:
        return parse_json(path, read_small(path, CheckpointError))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again.") from None


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """The object in a JSON text that was read from `path`; a CheckpointError if it holds no JSON object."""
    try:
        value = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def peek_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, but an empty object for what cannot be read: for `matches`."""
    try:
        return read_json(path)
    except (CheckpointError, OSError):
        return {}


def json_text(document: dict[str, Any]) -> str:
    """As every JSON file here is written."""
    return json.dumps(document, indent=2) + "\n"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write it atomically."""
    write_atomic(path, json_text(document))
