"""What is fuzzed: the public readers of files. In: any bytes, taken as a file of a kind; out: nothing, or a fault.

A reader may accept them, or refuse them with a Problem; any other exception is a fault. What it accepts is compared
with another way to read the same, so that accepting too much is a fault as well.
"""

import atexit
import contextlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from seeds import (
    STEP,
    TRAIN_BYTES,
    checkpoint_files,
    data_files,
    huggingface_files,
    model_files,
    tensorflow_files,
    true_tokens,
    vocabulary_bytes,
)

from regpt2.base.errors import Problem
from regpt2.base.record.metrics import MetricsLog, read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.toml_file import read_toml, to_toml
from regpt2.data import tokenizer as tokenizer_module
from regpt2.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens
from regpt2.data.tokens.shards import verify as verify_data
from regpt2.model.files.load import load_model
from regpt2.model.files.tensors import read_tensors
from regpt2.model.weights import openai_tf
from regpt2.training import checkpoint as checkpoints
from regpt2.training.schedule import learning_rate

MOST_S = 1.0  # of work, for one input
MOST_MESSAGE = 4100  # characters that a refusal may have: a hostile file must not flood a terminal


def shards(data: bytes) -> None:
    """As a token file of another project, behind a good one: llm.c, build-nanogpt, nanoGPT."""
    first = np.frombuffer(TRAIN_BYTES[1024:], "<u2")
    for name in ("b_train_000001.bin", "train.bin"):
        folder = _folder(name, {"a_train_000000.bin": TRAIN_BYTES})
        (folder / name).write_bytes(data)
        with may_refuse(), open_tokens(folder, "train") as stream:
            got = stream.read(0, stream.n_tokens)
            assert verify_data(folder) == []
            np.testing.assert_array_equal(got, np.concatenate([first, true_tokens(data)]))
            a, b = stream.n_tokens // 3, stream.n_tokens // 2
            np.testing.assert_array_equal(stream.read(a, b - a), got[a:b])


def manifest(data: bytes) -> None:
    """As the manifest.json of a prepared folder; also with the fingerprint that it should have, to come further."""
    folder, other = _folder("manifest", data_files()), _folder("manifest copy", {})
    for content in filter(None, (data, _with_its_fingerprint(data))):
        (folder / "manifest.json").write_bytes(content)
        with may_refuse():
            read = Manifest.read(folder)
            read.write(other)
            assert Manifest.read(other) == read
            assert all(split.text_bytes / max(1, split.tokens) >= 0 for split in read.splits.values())
            for split in ("train", "val"):
                with may_refuse(), open_tokens(folder, split) as stream:
                    files = [(folder / shard.file).read_bytes() for shard in read.splits[split].shards]
                    np.testing.assert_array_equal(
                        stream.read(0, stream.n_tokens), np.concatenate([np.frombuffer(f[1024:], "<u2") for f in files])
                    )
            bad = verify_data(folder)
            assert all(len(message) <= MOST_MESSAGE for message in bad)
            good = {name: sha256(content).hexdigest() for name, content in data_files().items()}
            assert bad or all(good[shard.file] == shard.sha256 for shard in read.shards)


def weights(data: bytes) -> None:
    """As the model.safetensors of a model in the native format."""
    folder = _folder("weights", model_files())
    (folder / "model.safetensors").write_bytes(data)
    with may_refuse():
        tensors = read_tensors(folder / "model.safetensors")
        start = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        assert tensors.keys() == header.keys()
        for name, tensor in tensors.items():
            a, b = header[name]["data_offsets"]
            assert list(tensor.shape) == header[name]["shape"]
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == data[start + a : start + b]
    with may_refuse():
        _runs(folder)


def model_file(data: bytes) -> None:
    """As a model in one file: GGUF, llm.c, safetensors; and as the index of one of TensorFlow."""
    path = _folder("model_file", {}) / "model"
    path.write_bytes(data if data[:2] != b"PK" else b"")  # an archive starts a child, which takes seconds
    with may_refuse():
        _runs(path)
    folder = _folder("tensorflow", tensorflow_files())
    (folder / openai_tf.INDEX).write_bytes(data)
    with may_refuse(), mock.patch.object(openai_tf, "masked", return_value=mock.ANY):  # every checksum is right
        _runs(folder)


def model_config(data: bytes) -> None:
    """As the config.json of a model in the native format, and in that of transformers."""
    for name, files in (("native", model_files()), ("huggingface", huggingface_files())):
        folder = _folder(name, files)
        (folder / "config.json").write_bytes(data)
        with may_refuse():
            _runs(folder)


def recipe(data: bytes) -> None:
    """As a recipe."""
    path = _folder("recipe", {}) / "r.toml"
    path.write_bytes(data)
    with may_refuse():
        config = load_recipe(str(path))
        path.write_text(to_toml(config), encoding="utf-8")
        assert read_toml(path) == config
        rates = (learning_rate(config.schedule, config.optim.lr, n, config.max_steps) for n in (1, config.max_steps))
        assert all(0 <= rate <= config.optim.lr for rate in rates)
        config.batch.grad_accum_steps(world_size=1)


def tokenizer(data: bytes) -> None:
    """As a text, and as ids."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    expected = re.sub("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]", _joined, text)
    for each in _tokenizers():
        ids = each.encode(text)
        assert each.decode(ids) == expected
        stream = StreamDecoder(each)
        assert "".join(map(stream.feed, ids)) + stream.end() == expected
        with mock.patch.object(tokenizer_module, "PIECE_CHARS", 3):
            assert each.encode(text) == ids
        with may_refuse():
            each.decode(np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist())


def vocabulary(data: bytes) -> None:
    """As vocab.bpe, and in place of its beginning, so that the size is right."""
    true = vocabulary_bytes()
    path = _folder("vocabulary", {}) / "vocab.bpe"
    for content in (data, data + true[len(data) :]):
        path.write_bytes(content)
        with may_refuse():
            load_tokenizer("gpt2", path)
            assert content == true


def record(data: bytes) -> None:
    """As the metrics.jsonl of a run that is resumed."""
    folder = _folder("record", {})
    path, aside = folder / "metrics.jsonl", folder / "metrics.jsonl.bad"
    path.write_bytes(data)
    aside.unlink(missing_ok=True)
    with may_refuse():
        list(read_events(path))
    with may_refuse():
        log = MetricsLog(path)
        log.cut_back(STEP)
        assert not aside.exists() or aside.read_bytes() == data
        events, content = list(read_events(path)), path.read_bytes()
        assert all(event["step"] <= STEP or event["event"] == "note" for event in events)
        log.cut_back(STEP)
        assert path.read_bytes() == content
        log.log("train", STEP + 1, loss=1.0)
        assert list(read_events(path))[:-1] == events and log.observed(STEP + 1) == []


def checkpoint(data: bytes) -> None:
    """As the manifest.json of a checkpoint, and as its state.json."""
    files = checkpoint_files()
    folder = _folder(f"manifest/step-{STEP:08d}", files)
    (folder / "manifest.json").write_bytes(data)
    with may_refuse():
        checkpoints.verify(folder)
        stated = json.loads(data)["files"]
        assert all(stated[name]["sha256"] == sha256(files[name]).hexdigest() for name in checkpoints.FILES)
        assert checkpoints.read(folder).step == STEP
    folder = _folder(f"state/step-{STEP:08d}", files)
    (folder / "state.json").write_bytes(data)
    assert data == files["state.json"] or checkpoints.fault(folder)
    with may_refuse():
        found = checkpoints.read(folder)
        assert type(found.step) is int and found.step == STEP


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        shards,
        manifest,
        weights,
        model_file,
        model_config,
        recipe,
        tokenizer,
        vocabulary,
        record,
        checkpoint,
    )
}


def feed(name: str, data: bytes) -> None:
    """Run a target on one input; a slow one is a fault too, if it is slow again: the first may be slowed by imports."""
    took_s = _took_s(name, data)
    took_s = took_s if took_s <= MOST_S else min(took_s, _took_s(name, data))
    assert took_s <= MOST_S, f"{name}: {len(data):,} bytes took {took_s:.1f} s"


def _took_s(name: str, data: bytes) -> float:
    before = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        TARGETS[name](data)
    return time.process_time() - before


@contextlib.contextmanager
def little_memory(room_bytes: int) -> Iterator[None]:
    """Let this process have only so many more bytes of addresses: what asks for more gets a MemoryError, at once."""
    if not Path("/proc/self/statm").exists():  # no Linux
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def may_refuse() -> Iterator[None]:
    """Here a reader may raise a Problem, with a message that can be shown."""
    try:
        yield
    except Problem as problem:
        n = len(str(problem))
        assert 0 < n <= MOST_MESSAGE, f"a message of {n:,} characters"


def _in_memory() -> str | None:
    """A folder where an fsync costs nothing; None if there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@cache
def _place() -> Path:
    folder = tempfile.mkdtemp(prefix="regpt2-fuzz-", dir=os.environ.get("TMPDIR") or _in_memory())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _folder(name: str, files: dict[str, bytes]) -> Path:
    """A folder that is made once, with these files."""
    folder = _place() / name
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
    return folder


def _runs(folder: Path) -> None:
    """The model in a folder loads and computes."""
    model = load_model(folder).model
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, dtype=torch.int64))
    assert logits.shape[:2] == (1, 1)


@cache
def _tokenizers() -> list[Tokenizer]:
    return [load_tokenizer("gpt2"), load_tokenizer("bytes")]


def _joined(found: re.Match[str]) -> str:
    """A whole surrogate pair is a character, half of one is none."""
    if len(found[0]) == 1:
        return "\ufffd"
    high, low = map(ord, found[0])
    return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)


def _with_its_fingerprint(data: bytes) -> bytes | None:
    """A manifest whose fingerprint is that of the hashes in it, where it has such."""
    try:
        document = json.loads(data)
        splits = [document["splits"][name] for name in ("train", "val") if name in document["splits"]]
        hashes = [shard["sha256"] for split in splits for shard in split["shards"]]
        document["fingerprint"] = sha256("\n".join([*hashes, document["tokenizer_fingerprint"]]).encode()).hexdigest()
        return json.dumps(document).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
