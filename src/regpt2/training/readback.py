"""Does the disk hold what was written? In: a file, the tensors or bytes meant; out: its SHA-256, or a problem."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regpt2.base.errors import Problem
from regpt2.base.files import CHUNK_BYTES, forget_cached, sha256_bytes, write_atomic
from regpt2.model.files.tensors import MAX_HEADER_BYTES

_DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_back(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a file as the disk gives it, once its header and every byte were found to be those of `tensors`.

    One pass does both, so that the hash is of the bytes that were compared.

    Raises:
        Problem: they differ.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        forget_cached(file)
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
        digest.update(length + header)
        for name in _in_order_of_the_file(path, header, tensors):
            meant = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(meant), CHUNK_BYTES):
                expected = meant[start : start + CHUNK_BYTES].tobytes()  # bytes compare at the speed of memory
                piece = file.read(len(expected))
                digest.update(piece)
                if piece != expected:
                    raise not_as_meant(path)
        if file.read(1):
            raise not_as_meant(path)
    return digest.hexdigest()


def _in_order_of_the_file(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of `tensors`, if the header has the same ones with their types and shapes."""
    try:
        entries = json.loads(header)
        described = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        begins = {name: entry["data_offsets"][0] for name, entry in entries.items()}
        in_order = sorted(begins, key=begins.__getitem__)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise not_as_meant(path) from None
    if described != {name: (_DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}:
        raise not_as_meant(path)
    return in_order


def not_as_meant(path: Path) -> Problem:
    """The problem to raise for a file that is not what was written."""
    return Problem(
        f"{path}: read back, it differs from what was written; the disk or the memory is failing. "
        "Choose a folder on another disk, and check this one."
    )


def write_small(path: Path, data: bytes) -> str:
    """Write a small file to the disk and read it back; its SHA-256.

    Raises:
        Problem: the disk returns other bytes.
    """
    write_atomic(path, data)
    with open(path, "rb") as file:
        forget_cached(file)
        if file.read() != data:
            raise not_as_meant(path)
    return sha256_bytes(data)
