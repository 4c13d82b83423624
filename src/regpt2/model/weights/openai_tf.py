"""The checkpoints that OpenAI published. In: their folder (models/124M); out: a model's files. It is only read.

A TensorFlow V2 checkpoint, without TensorFlow: `model.ckpt.index` is a table in LevelDB's format from names to type,
shape, place and checksum, each in protocol buffers; `model.ckpt.data-00000-of-00001` has the numbers, `hparams.json`
the sizes. Every checksum is verified.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.base.files import sha256_file
from regpt2.model.files.binary import Cursor, config_of, damaged, read_array
from regpt2.model.files.contract import ModelFiles, TokenizerRef, Vocabulary
from regpt2.model.files.safe_json import read_json
from regpt2.model.files.vocabulary import GPT2_SHA256

HPARAMS, INDEX, DATA = "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"
VOCAB = "vocab.bpe"
MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES, TRAILER_BYTES = 48, 5
MOST_INDEX_BYTES = 1 << 20  # GPT-2 XL's has 30 kB
FLOAT32 = 1
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_ctx", "vocab_size": "n_vocab"}
_POLYNOMIAL = 0x82F63B78  # of CRC-32C: Castagnoli's, reflected
_LANES = 1 << 14  # a power of two
_START = np.array([84, 100, 31, 100], np.uint8)  # takes an empty register to 0xFFFFFFFF, where a checksum starts
_NAMES = {"g": "weight", "b": "bias", "w": "weight"}

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class _Entry:
    """An entry of the index."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    checksum: int


def matches(path: Path) -> bool:
    """Does the folder hold the sizes and the index?"""
    return (path / HPARAMS).is_file() and (path / INDEX).is_file()


def read(path: Path) -> ModelFiles:
    """The model in folder `path`."""
    sizes = read_json(path / HPARAMS)
    config = config_of(path / HPARAMS, {ours: sizes.get(theirs) for ours, theirs in _SIZES.items()})
    entries = _read_index(path / INDEX)
    data = path / DATA
    if not data.is_file():
        raise CheckpointError(f"{data} is missing; it belongs beside {INDEX}.")
    ends = [entry.offset + entry.n_bytes for entry in entries.values()]
    described = max(sum(entry.n_bytes for entry in entries.values()), *ends, 0)
    if described > data.stat().st_size:
        raise damaged(data, f"it has {data.stat().st_size:,} bytes, its index describes {described:,}")
    tensors = {}
    with open(data, "rb") as file:
        for name, entry in entries.items():
            file.seek(entry.offset)
            tensor = read_array(file, data, "<f4", entry.shape)
            if masked(crc32c(tensor.numpy().reshape(-1).view(np.uint8))) != entry.checksum:
                raise damaged(data, f"the checksum of {name!r:.80} differs")
            tensors[_our_name(path, name)] = _our_orientation(name, tensor)
    return ModelFiles(config, tensors, _tokenizer(path / VOCAB))


def _tokenizer(vocab: Path) -> TokenizerRef | None:
    if not vocab.is_file():
        return None
    fingerprint = sha256_file(vocab)
    return Vocabulary("gpt2", fingerprint, merges=vocab.read_bytes() if fingerprint == GPT2_SHA256 else None)


def _our_name(path: Path, name: str) -> str:
    """`model/h3/attn/c_attn/w` -> `h.3.attn.c_attn.weight`."""
    match name.split("/"):
        case ["model", ("wte" | "wpe") as part]:
            return f"{part}.weight"
        case ["model", "ln_f", ("g" | "b") as kind]:
            return f"ln_f.{_NAMES[kind]}"
        case ["model", layer, *parts, ("g" | "b" | "w") as kind] if parts and layer[:1] == "h":
            return ".".join(["h", layer[1:], *parts, _NAMES[kind]])
    raise CheckpointError(f"{path / INDEX}: tensor {name!r:.80} belongs to no GPT-2.")


def _our_orientation(name: str, tensor: Tensor) -> Tensor:
    """Weights of linear layers are (1, in, out) there."""
    linear = name.endswith("/w") and tensor.dim() == 3 and tensor.shape[0] == 1
    return tensor[0].T.contiguous() if linear else tensor


def _read_index(path: Path) -> dict[str, _Entry]:
    """Every tensor by its name."""
    if path.stat().st_size > MOST_INDEX_BYTES:
        raise damaged(path, f"{path.stat().st_size:,} bytes, expected at most {MOST_INDEX_BYTES:,}")
    data = path.read_bytes()
    footer = Cursor(data[-FOOTER_BYTES:], path)
    if data[-8:] != MAGIC.to_bytes(8, "little"):
        raise damaged(path, "it does not end as a table of TensorFlow does")
    footer.varint(), footer.varint()  # the place of a second index, which is empty
    entries: dict[str, _Entry] = {}
    for _, handle in _block(path, data, footer.varint(), footer.varint()):
        place = Cursor(handle, path)
        for key, value in _block(path, data, place.varint(), place.varint()):
            name = key.decode("utf-8", "replace")
            if not key:
                _check_header(path, value)
            elif name in entries:
                raise damaged(path, f"the tensor {name!r:.80} twice")
            else:
                entries[name] = _entry(path, name, value)
    return entries


def _block(path: Path, data: bytes, offset: int, n_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block. A key is stored as the length that it shares with the one before it, and the rest."""
    cursor = Cursor(data, path)
    cursor.take(offset)
    content, kind, checksum = cursor.take(n_bytes), cursor.take(1), cursor.value("I")
    if masked(crc32c(np.frombuffer(content + kind, np.uint8))) != checksum:
        raise damaged(path, f"the checksum of its block at {offset:,} differs")
    if kind != b"\0":
        raise CheckpointError(f"{path} is compressed (kind {kind[0]}), expected a plain index, as OpenAI's are.")
    if len(content) < 4:
        raise damaged(path, f"its block at {offset:,} has no end")
    n_restarts = int.from_bytes(content[-4:], "little")  # places of whole keys, for searching: not needed
    block = Cursor(content[: max(0, len(content) - 4 * (n_restarts + 1))], path)
    key = b""
    while block.at < len(block.data):
        shared, rest, n_value = block.varint(), block.varint(), block.varint()
        if shared > len(key):
            raise damaged(path, f"a key that shares {shared} of {len(key)} bytes")
        key = key[:shared] + block.take(rest)
        yield key, block.take(n_value)


def _fields(path: Path, message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer."""
    cursor = Cursor(message, path)
    while cursor.at < len(message):
        tag = cursor.varint()
        match tag & 7:
            case 0:
                yield tag >> 3, cursor.varint()
            case 1 | 5 as kind:
                yield tag >> 3, cursor.value("Q" if kind == 1 else "I")
            case 2:
                yield tag >> 3, cursor.take(cursor.varint())
            case kind:
                raise damaged(path, f"a field of kind {kind}")


def _numbers(path: Path, message: int | bytes) -> dict[int, int]:
    return {number: value for number, value in _fields(path, bytes(message)) if isinstance(value, int)}


def _check_header(path: Path, message: bytes) -> None:
    header = _numbers(path, message)  # 1: number of data files; 2: not 0 where the highest byte comes first
    if header.get(1, 0) != 1 or header.get(2, 0) != 0:
        raise CheckpointError(f"{path}: {header.get(1, 0)} data files, expected 1, of little-endian numbers.")


def _entry(path: Path, name: str, message: bytes) -> _Entry:
    """dtype = 1, shape = 2 (with its sizes in dim = 2, size = 1), offset = 4, size = 5, crc32c = 6."""
    fields = dict(_fields(path, message))
    numbers = {number: value for number, value in fields.items() if isinstance(value, int)}
    dims = fields.get(2, b"")
    shape = tuple(
        _numbers(path, dim).get(1, 0)
        for number, dim in _fields(path, dims if isinstance(dims, bytes) else b"")
        if number == 2 and isinstance(dim, bytes)
    )
    entry = _Entry(numbers.get(1, 0), shape, numbers.get(4, 0), numbers.get(5, 0), numbers.get(6, 0))
    if len(shape) > 4 or entry.dtype != FLOAT32 or entry.n_bytes != 4 * math.prod(shape) or not entry.n_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r:.80} of type {entry.dtype} and shape {list(shape[:4])} has {entry.n_bytes:,} "
            "bytes, expected fp32 (type 1) and 4 bytes for each number."
        )
    return entry


def crc32c(data: npt.NDArray[np.uint8]) -> int:
    """CRC-32C of bytes, by NumPy at about 100 MB/s.

    The bytes are cut into lanes that are read side by side, one byte of each at a time. Neighboring lanes are then
    joined: the register is linear over bits, so what the zeros of a lane's length do to it is a table of 32 columns.
    """
    zeros_before = np.zeros(-(len(data) + len(_START)) % _LANES, np.uint8)  # they leave an empty register empty
    rows = np.concatenate([zeros_before, _START, data]).reshape(_LANES, -1).T
    lanes = _through(np.zeros(_LANES, np.uint32), rows)
    zeros = _through(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros((len(rows), 1), np.uint8))
    while len(lanes) > 1:
        lanes, zeros = _apply(zeros, lanes[0::2]) ^ lanes[1::2], _apply(zeros, zeros)
    return int(lanes[0]) ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """As TensorFlow and LevelDB store it: masked, because a CRC over data that contains CRCs is weak."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _through(registers: Words, rows: npt.NDArray[np.uint8]) -> Words:
    """Registers after each has read its column of bytes."""
    table = _table()
    for row in rows:
        registers = table[(registers ^ row) & 255] ^ (registers >> np.uint32(8))
    return registers


def _apply(columns: Words, registers: Words) -> Words:
    """A linear map, given by what it does to each bit, applied to registers."""
    out = np.zeros_like(registers)
    for bit, column in enumerate(columns):
        out ^= np.where(registers >> np.uint32(bit) & 1, column, np.uint32(0))
    return out


@cache
def _table() -> Words:
    """What one byte does to an empty register."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, values >> np.uint32(1) ^ np.uint32(_POLYNOMIAL), values >> np.uint32(1))
    return values
