"""Good files of each kind, by the real writers: what the fuzzers start from. In: nothing; out: bytes."""

import io
import json
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regpt2.config.recipe_files import RECIPES
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import to_toml
from regpt2.data.tokenizer import find_vocab
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import write_shard
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf, huggingface, llmc, native, openai_tf, safetensors
from regpt2.training import checkpoint

CORPUS = Path(__file__).parent / "corpus"
STEP = 3
TOKENS = np.array([256, 72, 101, 108, 108, 111, 256, 72, 105], dtype="<u2")
MAGIC = 20240520


def shard(tokens: NDArray[np.uint16]) -> bytes:
    """A shard, by hand."""
    return struct.pack("<3i", MAGIC, 1, len(tokens)).ljust(1024, b"\0") + tokens.tobytes()


TRAIN_BYTES = shard(TOKENS)


def inputs(target: str) -> list[bytes]:
    """What a target starts from: good files, and what is kept in the corpus."""
    kept = (path for path in sorted((CORPUS / target).glob("*")) if path.is_file())
    return [*good(target), *(path.read_bytes() for path in kept)]


@cache
def good(target: str) -> list[bytes]:
    """Files that a target's reader accepts."""
    hf = huggingface_files()
    run = {"event": "run", "step": 0, "config": {"seed": 1}}
    events = [run, {"event": "train", "step": 3, "loss": 2.5, "lr": 1e-3}, {"event": "note", "step": 9, "text": "a"}]
    files = {
        "shards": [TRAIN_BYTES, numpy_file(TOKENS), TOKENS.tobytes()],
        "manifest": [data_files()["manifest.json"]],
        "weights": [model_files()["model.safetensors"], hf["model.safetensors"]],
        "model_file": [one_file(gguf), one_file(safetensors), llmc_files()["model.bin"]],
        "model_config": [model_files()["config.json"], hf["config.json"]],
        "recipe": [to_toml(RunConfig()).encode(), (RECIPES / "demo.toml").read_bytes()],
        "tokenizer": ["Hello, I'm a language model,\n\n  né 中 👍 <|endoftext|> 'll 123".encode(), TOKENS.tobytes()],
        "vocabulary": [b"#version: 0.3\n"],
        "record": [b"".join(json.dumps(event).encode() + b"\n" for event in events)],
        "checkpoint": [checkpoint_files()["manifest.json"], checkpoint_files()["state.json"]],
    }
    return files[target]


def numpy_file(tokens: NDArray[np.uint16]) -> bytes:
    """A `.npy` file, by numpy."""
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


def true_tokens(data: bytes) -> NDArray[np.uint16]:
    """The tokens of a file of any of the three kinds, by numpy."""
    if data.startswith(b"\x93NUMPY"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            loaded: NDArray[np.uint16] = np.load(io.BytesIO(data), allow_pickle=False)
        return loaded
    return np.frombuffer(data, "<u2", offset=1024 if data[:4] == struct.pack("<i", MAGIC) else 0)


@cache
def data_files() -> dict[str, bytes]:
    """A prepared folder of two shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, val = write_shard(folder / "train.bin", 9, [TOKENS]), write_shard(folder / "val.bin", 5, [TOKENS[:5]])
        splits = {"train": Split(2, 9, 7, (train,)), "val": Split(1, 5, 4, (val,))}
        Manifest("tiny", "made", "1", "bytes", "f" * 64, 257, {"a": "1"}, splits, {"empty": 1}).write(folder)
        return _contents(folder)


@cache
def _model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5, vocab_multiple=1))


@cache
def model_files() -> dict[str, bytes]:
    """A model in the native format."""
    with tempfile.TemporaryDirectory() as name:
        native.write(_model(), Path(name), None)
        return _contents(Path(name))


@cache
def huggingface_files() -> dict[str, bytes]:
    """The same as transformers has it."""
    with tempfile.TemporaryDirectory() as name:
        huggingface.write(_model(), Path(name), None)
        return _contents(Path(name))


def one_file(entry: Any) -> bytes:
    """The same in a format of one file."""
    with tempfile.TemporaryDirectory() as name:
        entry.write(_model(), Path(name) / "model", None)
        return (Path(name) / "model").read_bytes()


@cache
def llmc_files() -> dict[str, bytes]:
    """The same as llm.c has it."""
    with tempfile.TemporaryDirectory() as name:
        llmc.write(_model(), Path(name), None)
        return _contents(Path(name))


@cache
def tensorflow_files() -> dict[str, bytes]:
    """What stands beside the index of such a model (corpus/model_file/tensorflow_index) in TensorFlow's format."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_ctx": 4, "n_vocab": 5}
    numbers = sum(p.numel() for p in _model().parameters())
    return {"hparams.json": json.dumps(sizes).encode(), openai_tf.DATA: bytes(4 * numbers)}


@cache
def checkpoint_files() -> dict[str, bytes]:
    """A checkpoint."""
    model = _model()
    optimizer = {"wte.weight/exp_avg": torch.zeros(5, 4)}
    state = {"step": STEP, "guard": {"losses": [2.5], "skipped_in_a_row": 0}, "seed": 1}
    config = native.config_json(model, None)
    with tempfile.TemporaryDirectory() as name:
        snap = checkpoint.snapshot(STEP, config, native.tensors(model), optimizer, state)
        return _contents(checkpoint.write(Path(name), snap))


@cache
def vocabulary_bytes() -> bytes:
    """GPT-2's vocab.bpe."""
    return find_vocab().read_bytes()


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
