"""One safetensors file. In: the file; out: a model's files, and back.

Tensors have the model's own names and orientation, and the metadata holds what a native folder has in `config.json`.
"""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from regpt2.base.files import write_atomic
from regpt2.model.files.contract import TORCH_DTYPES, ModelFiles, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.native_config import FORMAT, describe, parse
from regpt2.model.files.safe_json import parse_json
from regpt2.model.files.tensors import peek_metadata, read_tensors
from regpt2.model.language_model import LanguageModel

FILES: tuple[str, ...] = ()
DTYPES = ("fp32", "bf16", "fp16")
ANY_ARCHITECTURE = True
CHARACTERS_NOTE = ""


def matches(path: Path) -> bool:
    """Does the file's metadata describe a model?"""
    return peek_metadata(path, FORMAT) is not None


def read(path: Path) -> ModelFiles:
    """The model in the file, 16-bit weights as fp32."""
    raw = read_tensors(path)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in raw.items()}
    return replace(parse(path, parse_json(path, peek_metadata(path, FORMAT) or "")), tensors=tensors)


def write(model: LanguageModel, path: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write the file."""
    tensors = {name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in tensors_of(model).items()}
    description = describe(model, vocabulary)
    write_atomic(path, save(tensors, metadata={"format": "pt", FORMAT: description}))
