"""The files of llm.c. In: a `.bin` of version 3 (fp32) or 5 (bf16); out: a model's files, and back.

A header of 256 int32 (magic, version, block_size, vocab_size, n_layer, n_head, n_embd, padded vocab_size), then the
weights: wte with its padding rows, wpe, each kind of tensor for all layers together, ln_f. Linear weights are (out, in)
as here. A written folder also has the tokenizer's file, with which llm.c decodes ids.
"""

import math
import struct
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.byte_level.merges import END_OF_TEXT
from regpt2.base.errors import CheckpointError
from regpt2.base.files import atomic_file, write_atomic
from regpt2.model.files.binary import begins_with, config_of, read_array
from regpt2.model.files.contract import TORCH_DTYPES, ModelFiles, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.vocabulary import text_bytes, token_texts
from regpt2.model.gpt import GPT

MODEL, TOKENIZER = "model.bin", "gpt2_tokenizer.bin"
FILES = (MODEL, TOKENIZER)
ACTIVATION = "gelu_tanh"
DTYPES = ("fp32", "bf16")
MAGIC, TOKENIZER_MAGIC = 20240326, 20240328
VERSIONS = {"fp32": 3, "bf16": 5}
HEADER_BYTES, ROW_MULTIPLE = 1024, 128
KINDS = [  # in the order of the file, with their shapes in units of n_embd
    *(("ln_1.weight", (1,)), ("ln_1.bias", (1,)), ("attn.c_attn.weight", (3, 1)), ("attn.c_attn.bias", (3,))),
    *(("attn.c_proj.weight", (1, 1)), ("attn.c_proj.bias", (1,)), ("ln_2.weight", (1,)), ("ln_2.bias", (1,))),
    *(("mlp.c_fc.weight", (4, 1)), ("mlp.c_fc.bias", (4,)), ("mlp.c_proj.weight", (1, 4)), ("mlp.c_proj.bias", (1,))),
]


def matches(path: Path) -> bool:
    """Does the file, or `model.bin` in the folder, begin with the magic number?"""
    return begins_with(_file(path), struct.pack("<i", MAGIC))


def read(path: Path) -> ModelFiles:
    """The model in the file, or in the folder's `model.bin`; bf16 as fp32."""
    path = _file(path)
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
        _, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = struct.unpack_from("<8i", header)
        if version not in VERSIONS.values():
            raise CheckpointError(f"{path} has version {version} of llm.c's format, expected 3 (fp32) or 5 (bf16).")
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size)
        config = config_of(path, sizes)
        per_layer = sum(math.prod(size * n_embd for size in shape) for _, shape in KINDS)
        n_weights = (padded + block_size + 2) * n_embd + n_layer * per_layer
        expected = HEADER_BYTES + n_weights * (4 if version == 3 else 2)
        if padded < vocab_size or path.stat().st_size != expected:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, expected {expected:,} for n_layer = {n_layer}, n_embd = "
                f"{n_embd}, block_size = {block_size} and {padded} rows for {vocab_size} tokens; copy it again."
            )
        tensors = {
            "wte.weight": _floats(file, path, version, (padded, n_embd))[:vocab_size],
            "wpe.weight": _floats(file, path, version, (block_size, n_embd)),
        }
        for name, shape in KINDS:
            stacked = _floats(file, path, version, (n_layer, *(size * n_embd for size in shape)))
            tensors |= {f"h.{layer}.{name}": tensor for layer, tensor in enumerate(stacked)}
        tensors["ln_f.weight"] = _floats(file, path, version, (n_embd,))
        tensors["ln_f.bias"] = _floats(file, path, version, (n_embd,))
    return ModelFiles(config, tensors)


def write(model: GPT, folder: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write `model.bin`, and if the vocabulary is available, the tokenizer's file."""
    if (texts := token_texts(vocabulary)) is not None:
        write_atomic(folder / TOKENIZER, _tokenizer_file(texts))
    config, tensors = model.config, tensors_of(model)
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    rows = -(-config.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
    tensors["wte.weight"] = F.pad(tensors["wte.weight"], (0, 0, 0, rows - config.vocab_size))
    layered = [f"h.{layer}.{name}" for name, _ in KINDS for layer in range(config.n_layer)]
    with atomic_file(folder / MODEL) as file:
        header = struct.pack("<8i", MAGIC, VERSIONS[dtype], *sizes, rows)
        file.write(header.ljust(HEADER_BYTES, b"\0"))
        for name in ("wte.weight", "wpe.weight", *layered, "ln_f.weight", "ln_f.bias"):
            file.write(tensors[name].to(TORCH_DTYPES[dtype]).cpu().view(torch.uint8).numpy().data)


def _file(path: Path) -> Path:
    return path / MODEL if path.is_dir() else path


def _floats(file: IO[bytes], path: Path, version: int, shape: tuple[int, ...]) -> Tensor:
    if version == 3:
        return read_array(file, path, "<f4", shape)
    return read_array(file, path, "<i2", shape).view(torch.bfloat16).to(torch.float32)


def _tokenizer_file(texts: list[str]) -> bytes:
    """A header of 256 uint32 (magic, version 2, tokens, end of text), then each token's length and bytes."""
    header = struct.pack("<4I", TOKENIZER_MAGIC, 2, len(texts), len(texts) - 1).ljust(HEADER_BYTES, b"\0")
    tokens = [*map(text_bytes, texts[:-1]), END_OF_TEXT.encode()]
    return header + b"".join(bytes([len(token)]) + token for token in tokens)
