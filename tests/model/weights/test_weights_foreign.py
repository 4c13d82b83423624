"""llm.c, nanoGPT and GGUF: read from files made by hand from the formats' descriptions; what lies is refused."""

import random
import struct
import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gpt import SHAPES, random_gpt
from test_weights_shelf import unpickle_here
from torch import nn

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf, llmc, nanogpt

CONFIG = SHAPES[2]  # 3 layers, 4 heads, n_embd 48, 32 positions, 257 tokens of 320 rows
BYTES = Vocabulary("bytes", load_tokenizer("bytes").fingerprint, eot=256)
KINDS = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]


def same(a: GPT, b: GPT) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    return str(caught.value)


# --- llm.c ---


def llmc_by_hand(model: GPT, version: int = 3) -> bytes:
    """As train_gpt2.py of llm.c writes it, from NumPy alone."""
    config, state = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    rows = (config.vocab_size + 127) // 128 * 128
    state["wte.weight"] = np.concatenate(
        [state["wte.weight"][: config.vocab_size], np.zeros((rows - config.vocab_size, config.n_embd), np.float32)]
    )
    sizes = [config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, rows]
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, *sizes]
    names = [f"h.{i}.{kind}.{part}" for kind in KINDS for part in ("weight", "bias") for i in range(config.n_layer)]
    arrays = [state[name] for name in ("wte.weight", "wpe.weight", *names, "ln_f.weight", "ln_f.bias")]
    numbers = np.concatenate([array.reshape(-1) for array in arrays])
    if version == 5:
        bits = numbers.view("<u4")
        numbers = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")  # to the nearest, halves to even
    return header.tobytes() + numbers.tobytes()


@pytest.mark.parametrize(("dtype", "version"), [("fp32", 3), ("bf16", 5)])
def test_llmc_files_are_those_of_the_description(tmp_path: Path, dtype: str, version: int) -> None:
    model = random_gpt(CONFIG)
    by_hand = llmc_by_hand(model, version)
    llmc.write(model, tmp_path, BYTES, dtype)
    assert (tmp_path / "model.bin").read_bytes() == by_hand
    (tmp_path / "gpt2_124M.bin").write_bytes(by_hand)
    rounded = random_gpt(CONFIG).to(torch.bfloat16 if version == 5 else torch.float32).float()
    assert same(load_model(tmp_path / "gpt2_124M.bin").model, rounded)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_llmc_gets_the_tokenizers_file(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(name)
    merges = find_vocab().read_bytes() if name == "gpt2" else None
    llmc.write(random_gpt(SHAPES[0]), tmp_path, Vocabulary(name, tokenizer.fingerprint, tokenizer.eot, merges))
    data = (tmp_path / "gpt2_tokenizer.bin").read_bytes()
    assert struct.unpack_from("<4I", data) == (20240328, 2, tokenizer.vocab_size, tokenizer.eot)
    at, tokens = 1024, []
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    assert tokens == [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 1, "has version 1 of llm.c's format, expected 3 (fp32) or 5 (bf16)"),
        (1, 5, "bytes, expected"),
        (2, -1, "model.block_size = -1 must be at least 1"),
        (3, 10**9, "rows for 1000000000 tokens"),
        (4, 2**31 - 1, "n_layer = 2,147,483,647, expected at most 1,000"),
        (4, 2, "bytes, expected"),
        (5, 5, "model.n_embd = 48 must be a multiple of model.n_head = 5"),
        (6, 2**31 - 4, "expected 664,082,788,105,242,800,240 for"),
        (7, 256, "256 rows for 257 tokens"),
        (7, -(2**31), "rows for 257 tokens"),
    ],
)
def test_an_llmc_header_that_lies_is_refused(tmp_path: Path, place: int, value: int, message: str) -> None:
    data = bytearray(llmc_by_hand(random_gpt(CONFIG)))
    struct.pack_into("<i", data, 4 * place, value)
    (tmp_path / "model.bin").write_bytes(data)
    assert message in refusal(tmp_path / "model.bin")


# --- nanoGPT and build-nanogpt ---


def their_state(model: GPT, prefix: str = "", bias: bool = True) -> dict[str, Any]:
    """With the head and the causal masks that their modules have."""
    state: dict[str, Any] = {
        f"{prefix}transformer.{name}": p.detach().clone()
        for name, p in model.named_parameters()
        if bias or not name.endswith("bias")
    }
    state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(model.config.n_layer)}
    return state | {f"{prefix}lm_head.weight": state[f"{prefix}transformer.wte.weight"]}


def arguments(config: GPTConfig, **changed: Any) -> dict[str, Any]:
    """nanoGPT's `model_args`: no padding is known there."""
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    return sizes | {"bias": True, "vocab_size": config.padded_vocab_size, "dropout": 0.0} | changed


WHOLE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64)  # no padding rows


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.module."])
def test_a_checkpoint_of_nanogpt_is_read(tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its optimizer, of which nothing is kept, and its settings."""
    unpickle_here(monkeypatch)
    model = random_gpt(WHOLE)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "iter_num": 7, "best_val_loss": torch.tensor(3.2)}
    state |= {"model": their_state(model, prefix), "model_args": arguments(WHOLE), "config": {"dataset": "x"}}
    torch.save(state, tmp_path / "ckpt.pt")
    assert same(load_model(tmp_path / "ckpt.pt").model, model)


@pytest.mark.process
def test_what_is_no_tensor_beside_the_model_is_left_out(tmp_path: Path) -> None:
    """Losses that were counted with NumPy, states of every generator. By the real child."""
    model, numbers = random_gpt(WHOLE), np.random.default_rng(0).standard_normal(5)
    losses = {"best_val_loss": np.float64(3.2), "losses": numbers, "steps": np.arange(3), "half": np.float32(0.5)}
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    state = {
        "model": their_state(model),
        "model_args": arguments(WHOLE),
        "rng": states,
        "config": {"lr": np.float32(1)},
    }
    torch.save(state | losses, tmp_path / "ckpt.pt")
    assert same(load_model(tmp_path / "ckpt.pt").model, model)


def test_a_model_without_biases_is_one_with_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle_here(monkeypatch)
    model = random_gpt(WHOLE)
    state = {"model": their_state(model, bias=False), "model_args": arguments(WHOLE, bias=False)}
    torch.save(state, tmp_path / "ckpt.pt")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    assert same(load_model(tmp_path / "ckpt.pt").model, model)


def object_of_script(name: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """What build-nanogpt has as `config`: of a dataclass in its script, which is `__main__`."""
    sizes = {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 2, "n_embd": 8}
    made: Any = make_dataclass(name, sizes, namespace={"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], name, made, raising=False)
    return made(**sizes)


@pytest.mark.process
def test_a_checkpoint_of_build_nanogpt_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 50304 rows are GPT-2's 50257 tokens and padding, which is cut off. By the real child."""
    model = random_gpt(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16))
    config = object_of_script("GPTConfig", monkeypatch)
    torch.save({"model": their_state(model), "config": config, "step": 19072, "val_loss": 3.07}, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt").model
    assert loaded.config.vocab_size == 50257 and same(loaded, model)


def test_an_object_of_any_other_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle_here(monkeypatch)
    torch.save({"model": {}, "config": object_of_script("Other", monkeypatch)}, tmp_path / "model.pt")
    said = refusal(tmp_path / "model.pt")
    assert "refers to __main__.Other, which may run code" in said and "damaged" not in said


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {}}, "no 'model_args' and no 'config'"),
        ({"wte.weight": torch.ones(3)}, "holds 1 tensors and no settings: their shapes do not tell n_head"),
        (
            {"state_dict": {}, "epoch": 3},
            "a dict with 'state_dict', 'epoch', expected a dict with 'model'",
        ),
        ([1], "is no training checkpoint: a list with no keys"),
        ({"model": [], "model_args": arguments(WHOLE)}, "holds more than tensors: a list instead of a dict"),
        ({"model": {"a": np.ones(3)}, "model_args": arguments(WHOLE)}, "than tensors: a is an array of NumPy"),
        ({"model": {}, "model_args": {"bias": True}}, "n_layer = None, expected a whole number"),
        ({"model": {}, "model_args": arguments(WHOLE)}, "is impossible with"),
        (
            {"model": {}, "model_args": arguments(WHOLE, n_layer=10**9)},
            "n_layer = 1,000,000,000, expected at most 1,000",
        ),
        ({"model": {}, "model_args": arguments(WHOLE, n_embd=float("nan"))}, "n_embd = nan, expected a whole number"),
        ({"model": {}, "model_args": {"x": "y" * 2_000_000}}, "characters of settings"),
        (their_state(random_gpt(WHOLE)), "holds 31 tensors and no settings"),
        ({"model": their_state(random_gpt(WHOLE)), "model_args": arguments(WHOLE, vocab_size=63)}, "expected [63, 16]"),
    ],
)
def test_what_is_no_checkpoint_of_nanogpt_is_refused(
    tmp_path: Path, state: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpickle_here(monkeypatch)
    torch.save(state, tmp_path / "ckpt.pt")
    assert message in refusal(tmp_path / "ckpt.pt")


def test_an_untied_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle_here(monkeypatch)
    state = their_state(random_gpt(WHOLE))
    state["lm_head.weight"] = state["lm_head.weight"] * 1.001
    torch.save({"model": state, "model_args": arguments(WHOLE)}, tmp_path / "ckpt.pt")
    assert "lm_head.weight differs from wte.weight" in refusal(tmp_path / "ckpt.pt")


def test_nanogpt_gets_its_own_names_and_arguments(tmp_path: Path) -> None:
    """`sample.py` does GPTConfig(**model_args) and loads the model strictly."""
    model = random_gpt(CONFIG)
    nanogpt.write(model, tmp_path / "ckpt.pt", BYTES)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"] == arguments(CONFIG, vocab_size=257)
    ours = tensors_of(model)
    assert checkpoint["model"].keys() == {"lm_head.weight"} | {f"transformer.{name}" for name in ours}
    assert all(torch.equal(checkpoint["model"][f"transformer.{name}"], tensor) for name, tensor in ours.items())


# --- GGUF ---


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, value: str | int | float | bytes) -> bytes:
    """A key with text, a uint32, a float32, or bytes that are kind and value."""
    if isinstance(value, bytes):
        return text(name) + value
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    kind, code = (4, "I") if isinstance(value, int) else (6, "f")
    return text(name) + struct.pack("<I" + code, kind, value)


KEYS: dict[str, str | int | float | bytes] = {
    "general.architecture": "gpt2",
    "gpt2.block_count": 1,
    "gpt2.context_length": 4,
    "gpt2.embedding_length": 8,
    "gpt2.attention.head_count": 2,
    "gpt2.attention.layer_norm_epsilon": 1e-5,
}


def tensor(name: str, shape: list[int], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


WTE = tensor("token_embd.weight", [3, 8])


def file(keys: dict[str, Any], tensors: list[bytes], data: bytes = bytes(96), **counts: int) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, counts.get("n_tensors", len(tensors)), counts.get("n_keys", len(keys)))
    head += b"".join(key(name, value) for name, value in keys.items()) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


LIES: dict[str, tuple[bytes, str]] = {
    "no version": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1 of GGUF, expected 2 or 3"),
    "2**64 keys": (file(KEYS, [WTE], n_keys=2**64 - 1), "bytes expected at byte"),
    "2**64 tensors": (file(KEYS, [WTE], n_tensors=2**64 - 1), "the tensor '' twice"),
    "a text of 2**63": (file(KEYS | {"a": struct.pack("<IQ", 8, 2**63)}, [WTE]), "9,223,372,036,854,775,808 bytes"),
    "a list of 2**60": (file(KEYS | {"a": struct.pack("<IIQ", 9, 10, 2**60)}, [WTE]), "bytes expected at byte"),
    "texts to 2**60": (file(KEYS | {"a": struct.pack("<IIQ", 9, 8, 2**60)}, [WTE]), "bytes expected at byte"),
    "a list of lists": (file(KEYS | {"a": struct.pack("<IIQ", 9, 9, 1)}, [WTE]), "a value of kind 9"),
    "a kind that is none": (file(KEYS | {"a": struct.pack("<I", 99)}, [WTE]), "a value of kind 99"),
    "no UTF-8": (file(KEYS | {"a": struct.pack("<IQ", 8, 1) + b"\xff"}, [WTE]), "text that is not UTF-8"),
    "a key twice": (file({"x": 1, "y": 1}, [WTE]).replace(text("y"), text("x")), "the key 'x' twice"),
    "a tensor twice": (file(KEYS, [WTE, WTE]), "the tensor 'token_embd.weight' twice"),
    "a llama": (file(KEYS | {"general.architecture": "llama"}, [WTE]), "holds a 'llama', expected a 'gpt2'"),
    "no architecture": (file({}, [WTE]), "holds a None, expected a 'gpt2'"),
    "another epsilon": (file(KEYS | {"gpt2.attention.layer_norm_epsilon": 1e-6}, [WTE]), "expected 1e-05"),
    "NaN for epsilon": (file(KEYS | {"gpt2.attention.layer_norm_epsilon": float("nan")}, [WTE]), "expected 1e-05"),
    "a billion layers": (file(KEYS | {"gpt2.block_count": 10**9}, [WTE]), "n_layer = 1,000,000,000, expected at most"),
    "text for layers": (file(KEYS | {"gpt2.block_count": "1"}, [WTE]), "n_layer = '1', expected a whole number"),
    "no heads": (file(KEYS | {"gpt2.attention.head_count": 0}, [WTE]), "model.n_head = 0 must be at least 1"),
    "an alignment of 0": (file(KEYS | {"general.alignment": 0}, [WTE]), "an alignment of 0"),
    "five dimensions": (file(KEYS, [tensor("token_embd.weight", [1] * 5)]), "5 dimensions"),
    "an empty tensor": (file(KEYS, [tensor("token_embd.weight", [0, 2**63])]), "is empty"),
    "2**120 numbers": (file(KEYS, [tensor("token_embd.weight", [2**60, 2**60])]), "bytes after the end"),
    "an offset of 2**63": (
        file(KEYS, [tensor("token_embd.weight", [3, 8], offset=2**63)]),
        "bytes after the end",
    ),
    "overlapping tensors": (file(KEYS, [WTE, tensor("output.weight", [3, 8])]), "its tensors overlap"),
    "a type that is not read": (
        file(KEYS, [tensor("token_embd.weight", [3, 8], kind=12)]),
        "is of type 12, expected F32",
    ),
    "half a block": (file(KEYS, [tensor("token_embd.weight", [3, 8], kind=8)]), "ends within a block"),
    "a name of no GPT-2": (file(KEYS, [tensor("rope.weight", [3, 8])]), "'rope.weight' belongs to no GPT-2"),
    "a name without a dot": (file(KEYS, [tensor("", [3, 8])]), "belongs to no GPT-2"),
    "one of many tensors": (file(KEYS, [WTE]), "is missing: got 1 tensors, expected 16"),
    "no embedding": (file(KEYS, [tensor("output_norm.bias", [8])]), "model.vocab_size = 0 must be at least 1"),
    "nothing but the magic": (b"GGUF", "bytes expected at byte"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_gguf_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    data, message = LIES[what]
    (tmp_path / "a.gguf").write_bytes(data)
    assert message in refusal(tmp_path / "a.gguf")


def test_q8_0_needs_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="n_embd = 48 is not a multiple of 32"):
        gguf.write(random_gpt(CONFIG), tmp_path / "a.gguf", None, "q8_0")
    assert not list(tmp_path.iterdir())


def test_q8_0_of_zeros_and_of_tiny_weights(tmp_path: Path) -> None:
    """No division by zero; what fp16 cannot hold as a step becomes zero."""
    model = random_gpt(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=4, vocab_size=8))
    with torch.no_grad():
        model.wte.weight[0], model.wte.weight[1] = 0.0, 1e-12
    gguf.write(model, tmp_path / "a.gguf", None, "q8_0")
    assert not load_model(tmp_path / "a.gguf").model.wte.weight[:2].any()
