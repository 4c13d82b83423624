"""The native format. In: a folder with `model.safetensors` and `config.json`; out: a model's files, and back.

Tensors have the model's own names and orientation, in fp32, without the vocabulary's rows of padding. The configuration
says the format, its version, the model's shape and its tokenizer. A training checkpoint begins with the same two files.
"""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from regpt2.base.files import write_atomic
from regpt2.model.files.contract import CONFIG, WEIGHTS, ModelFiles, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.native_config import FORMAT, describe, parse
from regpt2.model.files.safe_json import peek_json, read_json
from regpt2.model.files.tensors import read_tensors
from regpt2.model.language_model import LanguageModel

FILES = (CONFIG, WEIGHTS)
DTYPES = ("fp32",)
ANY_ARCHITECTURE = True
CHARACTERS_NOTE = ""
tensors, config_json = tensors_of, describe  # the contents of both files, for a checkpoint


def matches(path: Path) -> bool:
    """Does `config.json` say that this is the native format?"""
    return peek_json(path / CONFIG).get("format") == FORMAT


def read(path: Path) -> ModelFiles:
    """The model in folder `path`."""
    return replace(peek(path), tensors=read_tensors(path / WEIGHTS))


def peek(path: Path) -> ModelFiles:
    """The same without its tensors."""
    return parse(path / CONFIG, read_json(path / CONFIG))


def write(model: LanguageModel, folder: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write both files into `folder`, the configuration last."""
    write_atomic(folder / WEIGHTS, save(tensors(model)))
    write_atomic(folder / CONFIG, config_json(model, vocabulary))
