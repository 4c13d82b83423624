"""How the native formats describe a model. In: its configuration and tokenizer; out: JSON text, and back."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from regpt2.base.byte_level.merges import fault_in
from regpt2.base.errors import CheckpointError, ConfigError, UsageError, did_you_mean
from regpt2.base.files import sha256_bytes
from regpt2.model.architecture import config_class
from regpt2.model.files.contract import ModelFiles, TokenizerRef, Vocabulary
from regpt2.model.files.safe_json import json_text
from regpt2.model.files.vocabulary import OWN, own_vocabulary
from regpt2.model.language_model import SIZES, GPTConfig, LanguageModel

FORMAT, VERSION = "regpt2", 1


def describe(model: LanguageModel, tokenizer: TokenizerRef | None) -> str:
    """The JSON text: the format, its version, the model's shape, its tokenizer, and how it was trained.

    That is the length of its sequences, and attention's window where training has not reached `model.window` yet.
    """
    config = model.config
    document = {"format": FORMAT, "version": VERSION, "model": asdict(config)}
    document["tokenizer"] = describe_tokenizer(tokenizer)
    document |= {} if model.trained_seq_len is None else {"trained_seq_len": model.trained_seq_len}
    document |= {} if model.window == _window(config) else {"trained_window": model.window}
    return json_text(document)


def describe_tokenizer(tokenizer: TokenizerRef | None) -> dict[str, Any] | None:
    """What a file holds of a tokenizer, for `parse_tokenizer`."""
    if tokenizer is None:
        return None
    document: dict[str, Any] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    document |= {"added": list(tokenizer.added)} if tokenizer.added else {}
    if isinstance(tokenizer, Vocabulary) and tokenizer.name == OWN and tokenizer.merges is not None:
        document["merges"] = tokenizer.merges.decode()
    return document | ({} if tokenizer.characters is None else {"characters": tokenizer.characters})


def parse(place: Path, document: dict[str, Any]) -> ModelFiles:
    """What `describe` says of a model, without tensors; `place` is for messages.

    Raises:
        CheckpointError: no such model is possible.
    """
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{place} has version {document.get('version')!r} of the native format, expected {VERSION}; "
            "it needs another version of regpt2."
        )
    config = _config(place, document.get("model"))
    trained, window = document.get("trained_seq_len"), document.get("trained_window")  # missing in older files
    most = {"trained_seq_len": ("block_size", config.block_size), "trained_window": ("window", _window(config))}
    for name, got in {"trained_seq_len": trained, "trained_window": window}.items():
        limit, highest = most[name]
        if got is not None and (type(got) is not int or not 1 <= got <= highest):
            raise CheckpointError(f"{place}: {name} = {got!r:.40} must be from 1 to model.{limit} = {highest:,}.")
    tokenizer = parse_tokenizer(place, document.get("tokenizer"))
    return ModelFiles(config, {}, tokenizer, trained, trained_window=window)


def _window(config: GPTConfig) -> int:
    window: int = getattr(config, "window", 0)
    return window


def _config(place: Path, model: Any) -> GPTConfig:
    if not isinstance(model, dict):
        raise CheckpointError(f"{place} has no object 'model' with the model's shape.")
    try:
        architecture = model.get("architecture", "gpt2")  # files from before there were two lack it
        kind = config_class(architecture)
    except ConfigError as error:  # an unknown name is no damage, so no earlier checkpoint helps: a plugin is missing
        raise (UsageError if isinstance(architecture, str) else CheckpointError)(f"{place}: {error}") from None
    try:
        _check_types(place, model, {field.name: type(field.default) for field in fields(kind)})
        return kind(**model)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from None


def _check_types(place: Path, model: dict[str, Any], known: dict[str, type]) -> None:
    for key, value in model.items():
        if key not in known:
            raise CheckpointError(f"{place}: model.{key} is not a setting of a GPT{did_you_mean(key, known)}")
        if type(value) is not known[key] and (type(value), known[key]) != (int, float):
            raise CheckpointError(f"{place}: model.{key} = {value!r} must be of type {known[key].__name__}.")
    if missing := [key for key in SIZES if key not in model]:
        raise CheckpointError(f"{place}: model.{missing[0]} is missing.")


def parse_tokenizer(place: Path, tokenizer: Any) -> TokenizerRef | None:
    """What `describe_tokenizer` was given; a CheckpointError, with `place`, if it is something else."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, dict):
        name, fingerprint, added = tokenizer.get("name"), tokenizer.get("fingerprint"), tokenizer.get("added", [])
        characters, merges = tokenizer.get("characters"), tokenizer.get("merges")
        optional = (characters, merges)
        texts = isinstance(added, list) and all(text is None or isinstance(text, str) for text in [*added, *optional])
        if isinstance(merges, str) and texts:
            return _own(place, merges, fingerprint, tuple(added))
        if isinstance(name, str) and isinstance(fingerprint, str) and texts:
            return TokenizerRef(name, fingerprint, added=tuple(added), characters=characters)
    raise CheckpointError(
        f"{place}: tokenizer = {tokenizer!s:.200} must have a 'name' and a 'fingerprint', or be null. It may have "
        "'added', a list of texts, and 'characters' and 'merges', texts."
    )


def _own(place: Path, merges: str, fingerprint: Any, added: tuple[str | None, ...]) -> Vocabulary:
    """A byte-pair encoding of one's own whose merges are in the file."""
    vocab = merges.encode("utf-8", "replace")
    if (got := sha256_bytes(vocab)) != fingerprint:
        raise CheckpointError(
            f"{place}: the tokenizer's merges have SHA-256 {got}, expected {fingerprint!s:.80}: damaged; copy it again."
        )
    if why := fault_in(vocab):
        raise CheckpointError(f"{place}: the tokenizer's merges cannot be used: {why}; copy it again.")
    return replace(own_vocabulary(vocab), added=added)
