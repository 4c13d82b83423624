"""Files that need not be trusted. In: bytes, an open file, a state dict; out: numbers, tensors, a model's shape.

Nothing here reads beyond the end of a file, or takes more memory than the file has bytes.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.model.files.contract import QUANTIZED
from regpt2.model.kernels.activation import Activation
from regpt2.model.language_model import SIZES, GPTConfig

MOST_LAYERS = 1000  # GPT-3 has 96; a header must not make us build millions of empty ones
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal ones, saved as if they were weights


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that was cut short, altered, or written by another program."""
    return CheckpointError(f"{path} is damaged: {why}; copy it again.")


def begins_with(path: Path, magic: bytes) -> bool:
    """Is this a plain file that begins with these bytes?"""
    try:
        if not path.is_file():  # reading a pipe would block
            return False
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


class Cursor:
    """Reads little-endian values one after the other, never beyond the end of its bytes."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, n_bytes: int) -> bytes:
        """The next bytes; a CheckpointError if fewer are left."""
        left = len(self.data) - self.at
        if not 0 <= n_bytes <= left:
            raise damaged(self.path, f"{n_bytes:,} bytes expected at byte {self.at:,}, {left:,} are left")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def value(self, code: str) -> Any:
        """One number, of a kind of the `struct` module: "I", "Q", "f"."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def varint(self) -> int:
        """A whole number in groups of seven bits, the lowest first, as in protocol buffers."""
        number = 0
        for shift in range(0, 64, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise damaged(self.path, f"a number that does not end at byte {self.at:,}")

    def text(self, n_bytes: int) -> str:
        """UTF-8 text of this many bytes."""
        try:
            return self.take(n_bytes).decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"text that is not UTF-8 before byte {self.at:,} ({error.reason})") from None


def read_array(file: IO[bytes], path: Path, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The next numbers of an open file, of numpy's type `dtype`; the caller has compared the size with the file's."""
    count = int(np.prod(shape, dtype=np.int64))
    values = np.fromfile(file, dtype, count)
    if len(values) < count:
        raise damaged(path, f"it ends {count - len(values):,} numbers too early")
    return torch.from_numpy(values).view(shape)


def config_of(
    path: Path, sizes: Mapping[str, Any], dropout: float = 0.0, activation: Activation = "gelu_tanh"
) -> GPTConfig:
    """The shape of a model from the sizes in a file; a CheckpointError if one is missing or impossible."""
    for name in SIZES:
        if type(sizes.get(name)) is not int:
            raise CheckpointError(f"{path}: {name} = {sizes.get(name)!r:.80}, expected a whole number.")
    if sizes["n_layer"] > MOST_LAYERS:
        raise CheckpointError(f"{path}: n_layer = {sizes['n_layer']:,}, expected at most {MOST_LAYERS:,}.")
    try:
        return GPTConfig(**{name: sizes[name] for name in SIZES}, dropout=dropout, activation=activation)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def own_weights(path: Path, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with GPT's names, in fp32; masks, and what compiled and parallel models add to names, are dropped.

    Raises:
        CheckpointError: two tensors have the same name and differ, or one is quantized.
    """
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in raw.items():
        name = ".".join(part for part in theirs.split(".") if part not in _WRAPPERS).removeprefix("transformer.")
        if name.endswith(_MASKS):
            continue
        if not tensor.is_floating_point() and tensor.dtype != torch.bool:
            raise CheckpointError(f"{path}: tensor {theirs} is of type {str(tensor.dtype)[6:]}: {QUANTIZED}")
        if name in tensors and not torch.equal(tensors[name], tensor.to(torch.float32)):
            raise CheckpointError(f"{path}: {theirs} is a second {name}, with other numbers; remove one.")
        tensors[name] = tensor.to(torch.float32)
    return tensors


def drop_equal_head(path: Path, tensors: dict[str, Tensor]) -> None:
    """Drop a head that only repeats `wte`; a CheckpointError if it differs."""
    head, wte = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and (wte is None or not torch.equal(head, wte)):
        raise CheckpointError(f"{path}: lm_head.weight differs from wte.weight, this GPT-2 has one for both.")
