"""OpenAI's checkpoints, against a writer of TensorFlow's format that shares nothing with the reader."""

import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpt import random_gpt

from regpt2.base.errors import CheckpointError
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import openai_tf

CONFIG = GPTConfig(n_layer=11, n_head=2, n_embd=16, block_size=8, vocab_size=20)  # h10 sorts before h2
MODEL, INDEX, DATA = "model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"


@functools.cache  # the same tensors again and again
def checksum(data: bytes) -> int:
    """CRC-32C bit by bit, and the mask over it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    crc = register ^ 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(entries: list[tuple[bytes, bytes]], share: bool, kind: int) -> bytes:
    """Keys, of which every 16th is whole if they share prefixes, values, restart points; kind and checksum."""
    out, restarts, before = b"", [], b""
    for n, (key, value) in enumerate(entries):
        shared = 0
        if share and n % 16:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    out += b"".join(struct.pack("<I", place) for place in restarts) + struct.pack("<I", len(restarts)) + bytes([kind])
    return out + struct.pack("<I", checksum(out))


def table(entries: dict[bytes, bytes], n_blocks: int, share: bool = True, kind: int = 0) -> bytes:
    keys = sorted(entries)
    size = -(-len(keys) // n_blocks)
    out, handles = b"", []
    for at in range(0, len(keys), size):
        made = block([(key, entries[key]) for key in keys[at : at + size]], share, kind)
        handles.append((keys[min(at + size, len(keys)) - 1] + b"~", varint(len(out)) + varint(len(made) - 5)))
        out += made
    meta, index = block([], share, 0), block(handles, False, 0)
    footer = varint(len(out)) + varint(len(meta) - 5) + varint(len(out) + len(meta)) + varint(len(index) - 5)
    return out + meta + index + footer.ljust(40, b"\0") + struct.pack("<II", 0x8B80FB57, 0xDB477524)


def their_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """As OpenAI's code names and shapes them."""
    state, n = {k: v.detach() for k, v in model.named_parameters()}, model.config.vocab_size
    tensors = {"model/wte": state["wte.weight"][:n], "model/wpe": state["wpe.weight"]}
    pairs = [("ln_f", "ln_f")]
    for layer in range(model.config.n_layer):
        pairs += [(f"h{layer}/{part}", f"h.{layer}.{part}") for part in ("ln_1", "ln_2")]
        for part in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            ours = f"h.{layer}.{part.replace('/', '.')}"
            tensors[f"model/h{layer}/{part}/w"] = state[f"{ours}.weight"].T.unsqueeze(0)
            tensors[f"model/h{layer}/{part}/b"] = state[f"{ours}.bias"]
    for theirs, ours in pairs:
        tensors[f"model/{theirs}/g"], tensors[f"model/{theirs}/b"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
    return tensors


def write(folder: Path, model: GPT, entry: dict[str, bytes] | None = None, **options: Any) -> None:
    """The three files. `entry` replaces what the index says of a tensor."""
    config, data, index = model.config, b"", {b"": field(1, 1) + field(3, field(1, 1))}
    for name, tensor in sorted(their_tensors(model).items()):
        numbers = tensor.contiguous().numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
        place = (field(4, len(data)) if data else b"") + field(5, len(numbers))
        crc = varint(6 << 3 | 5) + struct.pack("<I", checksum(numbers))
        index[name.encode()] = (entry or {}).get(name, field(1, 1) + field(2, shape) + place + crc)
        data += numbers
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes |= {"n_ctx": config.block_size, "n_vocab": config.vocab_size}
    (folder / "hparams.json").write_text(json.dumps(sizes))
    (folder / INDEX).write_bytes(table(index, **{"n_blocks": 1} | options))
    (folder / DATA).write_bytes(data)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt(CONFIG)


@pytest.mark.seconds
@pytest.mark.parametrize("n_blocks", [1, 3, 200])
@pytest.mark.parametrize("share", [True, False])
def test_a_checkpoint_of_tensorflow_is_read(tmp_path: Path, model: GPT, n_blocks: int, share: bool) -> None:
    write(tmp_path, model, n_blocks=n_blocks, share=share)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    loaded = load_model(tmp_path)
    assert all(map(torch.equal, model.parameters(), loaded.model.parameters()))
    assert loaded.tokenizer is not None and loaded.tokenizer.name == "gpt2"
    assert loaded.tokenizer != TokenizerRef("gpt2", "")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 1000, -60])
def test_a_bit_in_the_index_is_seen(tmp_path: Path, model: GPT, at: int) -> None:
    write(tmp_path, model)
    flip(tmp_path / INDEX, at)
    with pytest.raises(CheckpointError, match=r"index is damaged: the checksum of its block at [\d,]+ differs"):
        load_model(tmp_path)


@pytest.mark.parametrize("at", [0, 12345, -1])
def test_a_bit_in_the_numbers_is_seen(tmp_path: Path, model: GPT, at: int) -> None:
    write(tmp_path, model)
    flip(tmp_path / DATA, at)
    with pytest.raises(CheckpointError, match=r"data-00000-of-00001 is damaged: the checksum of 'model/.*' differs"):
        load_model(tmp_path)


def test_a_compressed_index_is_refused(tmp_path: Path, model: GPT) -> None:
    write(tmp_path, model, kind=1)
    with pytest.raises(CheckpointError, match=r"is compressed \(kind 1\), expected a plain index"):
        load_model(tmp_path)


SHAPE = field(2, b"".join(field(2, field(1, size)) for size in (8, 16)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (field(1, 19) + SHAPE + field(5, 512), "of type 19"),
        (field(1, 1) + SHAPE + field(5, 516), "has 516 bytes"),
        (field(1, 1) + field(2, field(2, field(1, 2**62))) + field(5, 2**64 - 1), "expected fp32"),
        (field(1, 1) + field(2, field(2, field(1, 2**60))) + field(5, 2**62), "its index describes 4,611,686,018,427"),
        (field(1, 1) + SHAPE + field(4, 2**63) + field(5, 512), "its index describes 9,223,372,036,854,776,320"),
        (field(1, 1) + field(2, field(2, field(1, 1)) * 5) + field(5, 4), "expected fp32"),
        (field(1, 1) + b"\x13", "a field of kind 3"),
        (field(1, 1) + b"\x80" * 20, "a number that does not end"),
        (varint(2 << 3 | 2) + varint(10**6), "bytes expected at byte"),
        (b"", "expected fp32"),
    ],
    ids=str,
)
def test_an_index_that_lies_is_refused(tmp_path: Path, model: GPT, entry: bytes, message: str) -> None:
    write(tmp_path, model, {"model/wpe": entry})
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not end as a table"),
        (bytes(48), "does not end as a table"),
        (b"\xff" * 40 + struct.pack("<Q", openai_tf.MAGIC), "a number that does not end"),
        ((b"\0" * 2 + varint(2**40) + varint(9)).ljust(40, b"\0") + struct.pack("<Q", openai_tf.MAGIC), "expected at"),
        (bytes(2 << 20), "2,097,152 bytes, expected at most 1,048,576"),
    ],
    ids=["empty", "zeros", "endless", "outside", "long"],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, model: GPT, data: bytes, message: str) -> None:
    write(tmp_path, model)
    (tmp_path / INDEX).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_missing_parts_are_named(tmp_path: Path, model: GPT) -> None:
    write(tmp_path, model)
    (tmp_path / DATA).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{DATA} is missing"):
        load_model(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / DATA)
    (tmp_path / "hparams.json").write_text('{"n_layer": "11"}')
    with pytest.raises(CheckpointError, match=r"hparams\.json: n_layer = '11', expected a whole number"):
        load_model(tmp_path)
