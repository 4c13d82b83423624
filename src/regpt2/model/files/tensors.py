"""The safetensors format. In: a file that need not be trusted; out: its tensors, or a text of its metadata."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.model.files.contract import CONFIG, QUANTIZED, WEIGHTS

TENSOR_NAME = re.compile(r"[A-Za-z0-9_./-]{1,256}")
MAX_HEADER_BYTES = 4 << 20  # GPT-2 XL's is 54 kB, its optimizer's 176 kB, one with 65,000 merges 1.5 MB
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}  # as safetensors calls them


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a CheckpointError if it is missing, cut short, or no safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a model folder holds {WEIGHTS} beside {CONFIG}.")
    try:
        _check_header(path)
        return load_file(path)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or no safetensors file ({error}); copy it again."
        ) from None


def _check_header(path: Path) -> None:
    """Refuse what the library accepts: a long header, odd names, types that no GPT has. It checks sizes itself."""
    header = _header(path)
    for name, value in header.items() if isinstance(header, dict) else ():
        dtype = str(value.get("dtype")) if isinstance(value, dict) else None
        if str(dtype).startswith(("F4", "F6_", "F8_")):
            raise CheckpointError(f"{path}: tensor {name!r:.80} is of type {dtype!r:.20}: {QUANTIZED}")
        if name != "__metadata__" and (not TENSOR_NAME.fullmatch(name) or dtype not in DTYPES):
            raise ValueError(f"a tensor {name!r:.80} of type {dtype!r:.20}")


def _header(path: Path) -> Any:
    with open(path, "rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {n_bytes:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        return json.loads(file.read(n_bytes).decode(), object_pairs_hook=_unique)


def peek_metadata(path: Path, key: str) -> str | None:
    """The text under `key` in the metadata of a safetensors file; None if there is none, or it is another file."""
    try:
        metadata = _header(path)["__metadata__"] if path.is_file() else {}
        return metadata[key] if isinstance(metadata[key], str) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which readers take different ones."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return found
