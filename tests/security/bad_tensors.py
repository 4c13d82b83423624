"""Safetensors files and configurations of models that lie, climb, or ask for too much."""

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import ODD_THINGS, Case, Content, sparse
from safetensors.torch import save

from regpt2.model.files.load import load_model
from regpt2.model.files.tensors import read_tensors
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import huggingface, native
from regpt2.training import checkpoint

WEIGHTS = "model.safetensors"
SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 5}
DEEP = "[" * 200_000 + "]" * 200_000


def written(entry: Any) -> dict[str, bytes]:
    """The files of a small model in a format."""
    with tempfile.TemporaryDirectory() as folder:
        entry.write(GPT(GPTConfig(**SHAPE)), Path(folder), None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def safetensors(header: object, data: bytes = bytes(16), n_bytes: int | None = None) -> bytes:
    """A file of this header, given as text or to be written as JSON, which may lie about its length."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if n_bytes is None else n_bytes) + raw + data


def one(name: str = "a", dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    """A header of one tensor."""
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def headers() -> dict[str, bytes]:
    """Safetensors files by what is wrong with them."""
    two = one() | one("b", offsets=(0, 16))
    twice = json.dumps(one())[:-1] + "," + json.dumps(one())[1:]
    wrong = {
        "a header of 2**63": safetensors(one(), n_bytes=2**63),
        "a header of 2**64 - 1": safetensors(one(), n_bytes=2**64 - 1),
        "a header of 99 MB": safetensors(one(), n_bytes=99_000_000),
        "a header of 5 MB": safetensors(json.dumps(one()) + " " * (5 << 20)),
        "a header beyond the file": safetensors(one(), n_bytes=10_000),
        "an empty header": safetensors(""),
        "7 bytes": b"\0" * 7,
        "no object": safetensors([]),
        "a number": safetensors("7"),
        "deep JSON": safetensors(DEEP),
        "deep JSON in a value": safetensors('{"a": ' + DEEP + "}"),
        "no UTF-8": safetensors(one()).replace(b'"a"', b'"\xff"'),
        "half a surrogate": safetensors('{"\udc80": 1}'),
        "comments": safetensors(json.dumps(one()) + "// harmless"),
        "NaN": safetensors(one(shape=float("nan"))),
        "a tensor twice": safetensors(twice),
        "overlapping tensors": safetensors(two),
        "a hole": safetensors(one(offsets=(4, 20)), bytes(20)),
        "bytes that belong to nobody": safetensors(one(), bytes(99)),
        "negative offsets": safetensors(one(offsets=(-16, 0))),
        "offsets backwards": safetensors(one(offsets=(16, 0))),
        "offsets beyond the file": safetensors(one(shape=[2**40], offsets=(0, 2**42))),
        "offsets of 2**63": safetensors(one(offsets=(0, 2**63))),
        "offsets of 2**70": safetensors(one(offsets=(0, 2**70))),
        "one offset": safetensors(one(offsets=[0])),
        "offsets of text": safetensors(one(offsets=["0", "16"])),
        "a negative size": safetensors(one(shape=[-4])),
        "sizes that overflow to 16": safetensors(one(shape=[2**32, 2**32, 4])),
        "a size of 2**64": safetensors(one(shape=[2**64])),
        "more elements than bytes": safetensors(one(shape=[10**11])),
        "a thousand dimensions": safetensors(one(shape=[2] * 1000)),
        "a shape of floats": safetensors(one(shape=[4.0])),
        "an unknown type": safetensors(one(dtype="F128")),
        "a type that no GPT has": safetensors(one(dtype="C64", shape=[2])),
        "an 8-bit float": safetensors(one(dtype="F8_E4M3", shape=[16])),
        "a number for a type": safetensors(one(dtype=7)),
        "no type": safetensors({"a": {"shape": [4], "data_offsets": [0, 16]}}),
        "text for a tensor": safetensors({"a": "x"}),
        "a name with NUL": safetensors(one("a\0b")),
        "a name of escapes": safetensors(one("\x1b]52;c;aGk=\x07")),
        "a name that climbs out of sight": safetensors(one("a\u202eb")),
        "an empty name": safetensors(one("")),
        "a name of 5,000": safetensors(one("a" * 5000)),
        "metadata of numbers": safetensors(one() | {"__metadata__": {"a": 1}}),
        "20,000 names": safetensors(
            {f"n{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
        ),
    }
    return wrong


def configurations() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What `config.json` may say of a model: the format, and the keys that are changed."""
    huge = 10**9
    natives: dict[str, dict[str, Any]] = {
        "a billion layers": {"n_layer": huge},
        "a billion wide": {"n_embd": huge},
        "a context of a billion": {"block_size": huge},
        "a billion tokens": {"vocab_size": huge},
        "padded to 10**12": {"vocab_multiple": 10**12},
        "layers beyond 64 bits": {"n_layer": 2**70},
        "a width beyond 64 bits": {"n_embd": 2**70},
        "no heads": {"n_head": 0},
        "minus one layer": {"n_layer": -1},
        "a dropout of NaN": {"dropout": float("nan")},
        "a dropout of infinity": {"dropout": float("inf")},
        "layers of text": {"n_layer": "1"},
        "layers in a list": {"n_layer": [1]},
        "an unknown key": {"__class__": "os.system"},
    }
    foreign: dict[str, dict[str, Any]] = {
        "a billion layers": {"n_layer": huge},
        "a billion wide": {"n_embd": huge},
        "a billion positions": {"n_positions": huge},
        "layers of text": {"n_layer": "1"},
        "layers in a list": {"n_layer": []},
        "half a layer": {"n_layer": 0.5},
        "a width of NaN": {"n_embd": float("nan")},
        "a width in an object": {"n_embd": {}},
        "heads of null": {"n_head": None},
        "a vocabulary of true": {"vocab_size": True},
        "code of its own": {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}},
        "a model type in a list": {"model_type": ["gpt2"]},
        "a note of ours of another kind": {"regpt2": {"tokenizer": {"name": {}, "fingerprint": []}}, "n_layer": 2},
    }
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        f"native config: {what}": (native, {"model": SHAPE | changed}) for what, changed in natives.items()
    }
    cases |= {f"hf config: {what}": (huggingface, changed) for what, changed in foreign.items()}
    cases["native config: a model in a list"] = (native, {"model": [1]})
    cases["native config: a version of NaN"] = (native, {"version": float("nan")})
    cases["native config: a tokenizer in a list"] = (native, {"tokenizer": ["gpt2"]})
    cases["native config: a tokenizer of numbers"] = (native, {"tokenizer": {"name": 1, "fingerprint": 2}})
    return cases


def model_files() -> dict[str, Content]:
    """Models in one file: GGUF and llm.c by their first numbers, and what only begins like one."""

    def gguf(n_tensors: int, n_keys: int, rest: bytes) -> bytes:
        return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + rest

    def llmc(*sizes: int) -> bytes:
        return struct.pack("<8i", 20240326, 3, *sizes).ljust(1024, b"\0")

    key = struct.pack("<Q", 1) + b"a"
    places = b"".join(struct.pack("<Q4sIQIQ", 4, f"{n:04}".encode(), 1, 1000, 0, 0) for n in range(4000))
    wide = struct.pack("<Q4sI4QIQ", 4, b"wide", 4, *[2**62] * 4, 0, 2**63)
    return {
        "gguf of 2**64 keys": gguf(0, 2**64 - 1, bytes(1000)),
        "gguf of 2**64 tensors": gguf(2**64 - 1, 0, bytes(1000)),
        "gguf with a text of 2**63": gguf(0, 1, key + struct.pack("<IQ", 8, 2**63)),
        "gguf with a list of 2**60 numbers": gguf(0, 1, key + struct.pack("<IIQ", 9, 10, 2**60)),
        "gguf with a million empty texts": gguf(0, 1, key + struct.pack("<IIQ", 9, 8, 2**60) + bytes(8 << 20)),
        "gguf with lists in lists": gguf(0, 1, key + struct.pack("<IIQ", 9, 9, 1) * 1000),
        "gguf with 4,000 tensors in one place": gguf(4000, 0, places + bytes(4096)),
        "gguf with 2**248 numbers": gguf(1, 0, wide),
        "gguf with 8 GB of zeros": sparse(8 << 30, gguf(0, 0, b"")),
        "llm.c of two billion layers": llmc(4, 5, 2**31 - 1, 1, 4, 5),
        "llm.c of two billion tokens": llmc(4, 2**31 - 1, 1, 1, 4, 2**31 - 1),
        "llm.c of negative sizes": llmc(-4, -5, -1, -1, -4, -5),
        "llm.c with 8 GB of zeros": sparse(8 << 30, llmc(4, 5, 1, 1, 4, 5)),
        "safetensors with a note of no JSON": safetensors(one() | {"__metadata__": {"regpt2": DEEP}}),
        "safetensors with a note of no model": safetensors(one() | {"__metadata__": {"regpt2": '{"version": 1}'}}),
        "safetensors with a note of a billion layers": safetensors(
            one() | {"__metadata__": {"regpt2": json.dumps({"version": 1, "model": SHAPE | {"n_layer": 10**9}})}}
        ),
        **{f"that is {what}": thing for what, thing in ODD_THINGS.items() if what != "a folder"},
    }


def texts() -> dict[str, bytes]:
    """JSON that is hardly any: in place of config.json, an index, a manifest, a state."""
    return {
        "deep lists": DEEP.encode(),
        "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        "no JSON": b"{'a': 1}",
        "no UTF-8": b'{"model_type": "\xff"}',
        "a list": b"[1]",
        "a number of 10,000 digits": b'{"model_type": ' + b"9" * 10_000 + b"}",
        "half": b'{"model_type": "gpt2", ',
        "17 MB": b'{"a": "' + b"x" * (17 << 20) + b'"}',
        "UTF-16": '{"model_type": "gpt2"}'.encode("utf-16"),
    }


def indexes() -> dict[str, Any]:
    """What an index of weights may say."""
    return {
        "climbing": {"weight_map": {"wte.weight": "../../../etc/passwd"}},
        "absolute": {"weight_map": {"wte.weight": "/etc/passwd"}},
        "of Windows": {"weight_map": {"wte.weight": "..\\..\\model.safetensors"}},
        "the folder": {"weight_map": {"wte.weight": ".."}},
        "empty name": {"weight_map": {"wte.weight": ""}},
        "with NUL": {"weight_map": {"wte.weight": "model\0.safetensors"}},
        "300 characters": {"weight_map": {"wte.weight": "a" * 300}},
        "a device": {"weight_map": {"wte.weight": "/dev/zero"}},
        "a list of files": {"weight_map": {"wte.weight": ["model.safetensors"]}},
        "a list of tensors": {"weight_map": ["wte.weight"]},
        "nothing": {"weight_map": {}},
        "itself": {"weight_map": {"wte.weight": "model.safetensors.index.json"}},
    }


def manifests() -> dict[str, Any]:
    """What the manifest of a checkpoint may say."""
    entry = {"bytes": 1, "sha256": "0" * 64}
    return {
        "no files": {},
        "files in a list": {"files": [WEIGHTS]},
        "numbers for files": {"files": {WEIGHTS: 1, "config.json": 1}},
        "bytes of text": {"files": {WEIGHTS: entry | {"bytes": "1"}, "config.json": entry}},
        "bytes in an object": {"files": {WEIGHTS: entry | {"bytes": {}}, "config.json": entry}},
        "bytes of NaN": {"files": {WEIGHTS: entry | {"bytes": float("nan")}, "config.json": entry}},
        "bytes of 10**400": {"files": {WEIGHTS: entry | {"bytes": 10**400}, "config.json": entry}},
        "a hash of a million": {"files": {WEIGHTS: entry | {"sha256": "x" * 10**6}, "config.json": entry}},
        "a hash of null": {"files": {WEIGHTS: entry | {"sha256": None}, "config.json": entry}},
    }


def _load_file(folder: Path) -> object:
    return load_model(folder / "model")


def tensor_cases(canary: Path) -> list[Case]:
    """All of them."""
    ours, theirs = written(native), written(huggingface)
    config = json.loads(ours["config.json"])

    def of_model(what: str, **changed: Content) -> Case:
        return Case(what, load_model, ours | {name.replace("__", "."): content for name, content in changed.items()})

    cases = [
        Case(f"safetensors: {what}", lambda f: read_tensors(f / WEIGHTS), {WEIGHTS: d}) for what, d in headers().items()
    ]
    cases += [
        of_model(f"load_model: safetensors, {what}", model__safetensors=d) for what, d in list(headers().items())[:12]
    ]
    cases += [Case(f"a model {what}", _load_file, {"model": content}) for what, content in model_files().items()]
    for what, (entry, changed) in configurations().items():
        files = ours if entry is native else theirs
        document = json.dumps(json.loads(files["config.json"]) | changed)
        cases.append(Case(what, load_model, files | {"config.json": document}))
    for what, content in (texts() | ODD_THINGS).items():
        cases.append(of_model(f"config.json: {what}", config__json=content))
        missing = what in ("a link to nothing", "a link to itself")  # a model need not have a manifest
        cases.append(Case(f"manifest.json: {what}", load_model, ours | {"manifest.json": content}, fine=missing))
        index = {"config.json": theirs["config.json"], "model.safetensors.index.json": content}
        cases.append(Case(f"index: {what}", load_model, index))
    for what, content in ODD_THINGS.items():
        cases.append(of_model(f"weights: {what}", model__safetensors=content))
    for what, document in indexes().items():
        files = {"config.json": theirs["config.json"], "model.safetensors.index.json": json.dumps(document)}
        cases.append(Case(f"index: {what}", load_model, files))
    for what, document in manifests().items():
        cases.append(of_model(f"manifest.json: {what}", manifest__json=json.dumps(document)))
    nan = save({name: torch.full_like(t, float("nan")) for name, t in native.tensors(GPT(GPTConfig(**SHAPE))).items()})
    cases.append(Case("weights of NaN", load_model, ours | {WEIGHTS: nan}, fine=True))
    for what, state in {
        "a list": b"[]",
        "no step": b"{}",
        "deep": DEEP.encode(),
        "a step of text": b'{"step": "x"}',
    }.items():
        files = {"config.json": json.dumps(config), WEIGHTS: ours[WEIGHTS], "state.json": state}
        cases.append(
            Case(f"state.json: {what}", checkpoint.read, files | {"optimizer.safetensors": safetensors(one())})
        )
    return cases
