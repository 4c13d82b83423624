"""Checkpoints of nanoGPT and build-nanogpt. In: a `.pt` file; out: a model's files, and back, without running it.

nanoGPT stores the model's shape in `model_args`, build-nanogpt in a pickled `GPTConfig`. Names have the prefix
`transformer.`, and more prefixes if a compiled or parallel model was saved; the head is stored too. Neither records
its GELU: build-nanogpt has the tanh form, nanoGPT the exact one since May 2023 and the tanh form before.
"""

import re
from pathlib import Path
from typing import Any

import torch

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError
from regpt2.base.files import atomic_file
from regpt2.model.files.binary import begins_with, config_of, drop_equal_head, own_weights
from regpt2.model.files.contract import CONFIG, GPT2_ROWS, GPT2_TOKENS, ModelFiles, TokenizerRef, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.native_config import parse_tokenizer
from regpt2.model.files.safe_pickle import FROM_OBJECT, read_training_checkpoint
from regpt2.model.files.vocabulary import OWN
from regpt2.model.gpt import GPT
from regpt2.model.kernels.activation import GELU_FORMS, Activation
from regpt2.model.language_model import SIZES

FILES: tuple[str, ...] = ()
DTYPES = ("fp32",)
ACTIVATION = "gelu"
MAGIC = b"PK\x03\x04"
DATASET = "characters"
CHARACTERS_NOTE = f"nanoGPT's sample.py reads them from data/{DATASET}/meta.pkl: copy the data's meta.pkl there."
_NUMBERED = re.compile(r"[A-Za-z_-]*(\d+)\.pt")


def matches(path: Path) -> bool:
    """Is the file an archive, as `torch.save` writes it, or a folder with such files?"""
    return begins_with(path, MAGIC) or (path.is_dir() and bool(_checkpoints(path)))


def read(path: Path) -> ModelFiles:
    """The model in the file, or in the newest of a folder, in fp32, without padding rows; missing biases are zeros."""
    path = _newest(path) if path.is_dir() else path
    raw, settings = read_training_checkpoint(path)
    rows, dropout = settings.get("vocab_size"), settings.get("dropout")
    sizes = settings | {"vocab_size": GPT2_TOKENS if rows == GPT2_ROWS else rows}
    activation, doubt = _activation(path, settings)
    config = config_of(path, sizes, dropout if isinstance(dropout, float) else 0.0, activation)
    tensors = own_weights(path, raw)
    drop_equal_head(path, tensors)
    if "wte.weight" in tensors and tensors["wte.weight"].shape != (rows, config.n_embd):
        got = list(tensors["wte.weight"].shape)
        raise CheckpointError(f"{path}: tensor wte.weight has shape {got}, expected {[rows, config.n_embd]}.")
    if settings.get("bias") is False:  # biases of zero are the same model
        weights = [name for name in tensors if name not in ("wte.weight", "wpe.weight")]
        tensors |= {name.removesuffix("weight") + "bias": torch.zeros(len(tensors[name])) for name in weights}
    if "wte.weight" in tensors:
        tensors["wte.weight"] = tensors["wte.weight"][: config.vocab_size]
    return ModelFiles(config, tensors, _tokenizer(path, settings), doubt=doubt)


def _tokenizer(path: Path, settings: dict[str, Any]) -> TokenizerRef | None:
    """The tokenizer that our own export names; of the keys, the texts alone count."""
    keys = {"name": "tokenizer", "fingerprint": "tokenizer_fingerprint", "characters": "characters", "merges": "merges"}
    found = {name: settings[key] for name, key in keys.items() if isinstance(settings.get(key), str)}
    return parse_tokenizer(path, found) if {"name", "fingerprint"} <= found.keys() else None


def write(model: GPT, path: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write what nanoGPT's `sample.py` takes: the weights and `model_args`."""
    tensors = tensors_of(model)
    wte = tensors["wte.weight"].clone()  # a view would be saved with the padding rows behind it
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    checkpoint: dict[str, Any] = {
        "model": state | {"transformer.wte.weight": wte, "lm_head.weight": wte},
        "model_args": {name: getattr(model.config, name) for name in (*SIZES, "dropout")} | {"bias": True},
        "activation": model.config.activation,  # read by us alone; nanoGPT has the exact one
    }
    if vocabulary is not None:
        checkpoint |= {"tokenizer": vocabulary.name, "tokenizer_fingerprint": vocabulary.fingerprint}
    if vocabulary is not None and vocabulary.name == OWN and vocabulary.merges is not None:
        checkpoint["merges"] = vocabulary.merges.decode()
    if vocabulary is not None and vocabulary.characters is not None:
        checkpoint |= {"characters": vocabulary.characters, "config": {"dataset": DATASET}}
    with atomic_file(path) as file:
        torch.save(checkpoint, file)


def _activation(path: Path, settings: dict[str, Any]) -> tuple[Activation, str | None]:
    """The form of GELU, and a warning if the file does not name it."""
    if (stated := settings.get("activation")) is not None:
        if stated not in GELU_FORMS:
            raise CheckpointError(f"{path}: activation = {stated!r:.80}, expected {' or '.join(GELU_FORMS)}.")
        return stated, None
    ours = "tokenizer_fingerprint" in settings  # from before we had the exact one
    if ours or settings[FROM_OBJECT] or "bias" not in settings:  # build-nanogpt; nanoGPT before 2023-01-27
        return "gelu_tanh", None
    return "gelu", "does not say which GELU it has: the exact one is taken, as in nanoGPT since May 2023."


def _newest(folder: Path) -> Path:
    """The checkpoint in nanoGPT's out_dir; of several, as in build-nanogpt's log, the one with the highest number."""
    paths = _checkpoints(folder)
    if len(paths) == 1:
        return paths[0]
    of_step = {int(found[1]): path for path in paths if (found := _NUMBERED.fullmatch(path.name))}
    if len(of_step) < len(paths):
        names = ", ".join(sorted(path.name for path in paths))
        newest = max(paths, key=lambda path: path.stat().st_mtime)
        raise CheckpointError(
            f"{folder} holds {len(paths)} checkpoints: {names:.200}. Give one of them as MODEL; the newest is {newest}."
        )
    path = of_step[max(of_step)]
    warn(f"{folder} holds {len(paths)} checkpoints. Loading {path.name}, of the last step; else give another as MODEL.")
    return path


def _checkpoints(folder: Path) -> list[Path]:
    """None beside a config.json, which is the sign of another format."""
    if (folder / CONFIG).exists():
        return []
    return [path for path in folder.glob("*.pt") if begins_with(path, MAGIC)]
