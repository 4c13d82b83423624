"""The native format. In: a folder with `model.safetensors` and `config.json`; out: a model's files, and back.

Tensors have GPT's own names and orientation, in fp32, `wte` without its padding rows. The configuration says the
format, its version, the model's shape and its tokenizer. A training checkpoint begins with the same two files.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError, did_you_mean
from regpt2.base.files import write_atomic
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.load import (
    CONFIG,
    WEIGHTS,
    ModelFiles,
    TokenizerRef,
    Vocabulary,
    peek_json,
    read_json,
    read_tensors,
    tensors_of,
)

FORMAT, VERSION = "regpt2", 1
FILES = (CONFIG, WEIGHTS)
_REQUIRED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


class NamedTokenizer(Protocol):
    """Anything that knows a tokenizer's name and fingerprint: a `TokenizerRef`, or the tokenizer itself."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


def tensors(model: GPT, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The contents of `model.safetensors`: contiguous fp32 by GPT's names, `wte` unpadded; views where they can be."""
    return tensors_of(model, parameters)


def matches(path: Path) -> bool:
    """Does `config.json` say that this is the native format?"""
    return peek_json(path / CONFIG).get("format") == FORMAT


def read(path: Path) -> ModelFiles:
    """The model in folder `path`.

    Raises:
        CheckpointError: a file is missing or damaged, or from a later version of the format.
    """
    document = read_json(path / CONFIG)
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{path / CONFIG} has version {document.get('version')!r} of the native format, expected {VERSION}; "
            "it needs another version of regpt2."
        )
    config = _config(path / CONFIG, document.get("model"))
    return ModelFiles(config, read_tensors(path / WEIGHTS), _tokenizer(path / CONFIG, document.get("tokenizer")))


def write(model: GPT, folder: Path, vocabulary: Vocabulary | None) -> None:
    """Write both files into `folder`, the configuration last."""
    write_atomic(folder / WEIGHTS, save(tensors(model)))
    write_atomic(folder / CONFIG, config_json(model.config, vocabulary))


def config_json(config: GPTConfig, tokenizer: NamedTokenizer | None) -> str:
    """The text of `config.json`."""
    name = None if tokenizer is None else {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    document = {"format": FORMAT, "version": VERSION, "model": asdict(config), "tokenizer": name}
    return json.dumps(document, indent=2) + "\n"


def _config(place: Path, model: Any) -> GPTConfig:
    if not isinstance(model, dict):
        raise CheckpointError(f"{place} has no object 'model' with the model's shape.")
    known = {field.name: type(field.default) for field in fields(GPTConfig)}
    for key, value in model.items():
        if key not in known:
            raise CheckpointError(f"{place}: model.{key} is no setting of a GPT{did_you_mean(key, known)}")
        if isinstance(value, bool) or not isinstance(value, (int, known[key])):
            raise CheckpointError(f"{place}: model.{key} = {value!r} must be of type {known[key].__name__}.")
    if missing := [key for key in _REQUIRED if key not in model]:
        raise CheckpointError(f"{place}: model.{missing[0]} is missing.")
    try:
        return GPTConfig(**model)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None


def _tokenizer(place: Path, tokenizer: Any) -> TokenizerRef | None:
    if tokenizer is None:
        return None
    if isinstance(tokenizer, dict):
        name, fingerprint = tokenizer.get("name"), tokenizer.get("fingerprint")
        if isinstance(name, str) and isinstance(fingerprint, str):
            return TokenizerRef(name, fingerprint)
    raise CheckpointError(f"{place}: tokenizer = {tokenizer!r} must have a 'name' and a 'fingerprint', or be null.")
