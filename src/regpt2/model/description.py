"""What the native formats say of a model. In: its configuration and tokenizer; out: JSON text, and back."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

from regpt2.base.errors import CheckpointError, ConfigError, did_you_mean
from regpt2.model.architecture import config_class
from regpt2.model.language_model import GPTConfig
from regpt2.model.load import TokenizerRef

FORMAT, VERSION = "regpt2", 1
_REQUIRED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


class NamedTokenizer(Protocol):
    """Anything that knows a tokenizer's name and fingerprint: a `TokenizerRef`, or the tokenizer itself."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


def describe(config: GPTConfig, tokenizer: NamedTokenizer | None) -> str:
    """The JSON text: the format, its version, the model's shape and its tokenizer."""
    name = None if tokenizer is None else {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    document = {"format": FORMAT, "version": VERSION, "model": asdict(config), "tokenizer": name}
    return json.dumps(document, indent=2) + "\n"


def parse(place: Path, document: dict[str, Any]) -> tuple[GPTConfig, TokenizerRef | None]:
    """What `describe` was given. `place` is the file, for messages.

    Raises:
        CheckpointError: it is from a later version of the format, or no possible model.
    """
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{place} has version {document.get('version')!r} of the native format, expected {VERSION}; "
            "it needs another version of regpt2."
        )
    return _config(place, document.get("model")), _tokenizer(place, document.get("tokenizer"))


def _config(place: Path, model: Any) -> GPTConfig:
    if not isinstance(model, dict):
        raise CheckpointError(f"{place} has no object 'model' with the model's shape.")
    try:
        kind = config_class(model.get("architecture", "gpt2"))  # as before there were two
        _check_types(place, model, {field.name: type(field.default) for field in fields(kind)})
        return kind(**model)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None


def _check_types(place: Path, model: dict[str, Any], known: dict[str, type]) -> None:
    for key, value in model.items():
        if key not in known:
            raise CheckpointError(f"{place}: model.{key} is no setting of a GPT{did_you_mean(key, known)}")
        if type(value) is not known[key] and (type(value), known[key]) != (int, float):
            raise CheckpointError(f"{place}: model.{key} = {value!r} must be of type {known[key].__name__}.")
    if missing := [key for key in _REQUIRED if key not in model]:
        raise CheckpointError(f"{place}: model.{missing[0]} is missing.")


def _tokenizer(place: Path, tokenizer: Any) -> TokenizerRef | None:
    if tokenizer is None:
        return None
    if isinstance(tokenizer, dict):
        name, fingerprint = tokenizer.get("name"), tokenizer.get("fingerprint")
        if isinstance(name, str) and isinstance(fingerprint, str):
            return TokenizerRef(name, fingerprint)
    raise CheckpointError(f"{place}: tokenizer = {tokenizer!r} must have a 'name' and a 'fingerprint', or be null.")
