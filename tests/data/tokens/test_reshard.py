"""Token folders to other formats, held against readers that follow each format's description alone."""

import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from regpt2.base import shelves
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.cli import main
from regpt2.data.token_formats import megatron as megatron_format
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens import reshard as reshard_module
from regpt2.data.tokens import writing
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.reshard import ReshardOptions, reshard
from regpt2.data.tokens.shards import open_tokens, verify, write_shard

EOT = 50256
FORMATS = shelves.entries("data.token_formats")
SHARDED = ("llmc", "native", "npy")


def documents(n: int, seed: int) -> list[list[int]]:
    """Random documents of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOT, rng.integers(1, 31)).tolist() for _ in range(n)]


TRAIN, VAL = documents(400, 1), documents(40, 2)


def eot_first(docs: list[list[int]]) -> list[int]:
    return [token for doc in docs for token in (EOT, *doc)]


def eot_last(docs: list[list[int]]) -> list[int]:
    return [token for doc in docs for token in (*doc, EOT)]


def flat(docs: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(docs))


def write_native(folder: Path, shard_tokens: int = 1000) -> Path:
    """A prepared folder of TRAIN and VAL with GPT-2's ids."""
    tokenizer, splits = load_tokenizer("gpt2"), {}
    for split, docs in (("train", TRAIN), ("val", VAL)):
        ids = np.array(eot_first(docs), dtype=np.uint16)
        shards = [
            write_shard(folder / f"made_{split}_{n:06d}.bin", len(piece), [piece])
            for n, piece in enumerate(np.split(ids, range(shard_tokens, len(ids), shard_tokens)))
        ]
        text_bytes = sum(len(tokenizer.decode_bytes(doc)) for doc in docs)
        splits[split] = Split(len(docs), len(ids), text_bytes, tuple(shards))
    Manifest(
        "made", "random", "1", "gpt2", tokenizer.fingerprint, 50257, {"shard_tokens": str(shard_tokens)}, splits, {}
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_native(tmp_path_factory.mktemp("native"))


def to(format_name: str, source: Path, out: Path, **options: object) -> Path:
    shard_tokens = 1000 if format_name in SHARDED else None
    reshard(replace(ReshardOptions(source, out, format_name, shard_tokens), **options))
    return out


# Readers, from the descriptions.


def read_header_shards(folder: Path, pattern: str) -> list[int]:
    """What llm.c's dataloader.h checks of each shard, and modded-nanogpt's _load_data_shard."""
    tokens: list[int] = []
    for path in sorted(folder.glob(pattern)):
        header = np.fromfile(path, dtype=np.int32, count=256)
        assert header[0] == 20240520 and header[1] == 1 and header[2] > 0
        assert path.stat().st_size == 256 * 4 + int(header[2]) * 2
        buffer = np.empty(header[2], dtype=np.uint16)
        with path.open("rb", buffering=0) as file:
            file.seek(256 * 4)
            assert file.readinto(buffer) == 2 * header[2]
        tokens += buffer.tolist()
    return tokens


def read_megatron(prefix: Path) -> list[list[int]]:
    """The documents of a Megatron IndexedDataset: each a run of sequences."""
    index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, n_sequences, n_documents = struct.unpack_from("<QBQQ", index, 9)
    assert (version, code) == (1, 8)
    place, arrays = 34, []
    for kind, count in ((np.int32, n_sequences), (np.int64, n_sequences), (np.int64, n_documents)):
        arrays.append(np.frombuffer(index, kind, count, place))
        place += arrays[-1].nbytes
    assert place == len(index)
    lengths, pointers, document_index = arrays
    assert document_index[0] == 0 and document_index[-1] == n_sequences
    sequences = [
        np.frombuffer(data, np.uint16, length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return [flat(sequences[a:b]) for a, b in pairwise(document_index)]


def read_datatrove(path: Path) -> list[list[int]]:
    """The documents of a datatrove file, cut at the ends in its index."""
    tokens = np.fromfile(path, dtype=np.uint16)
    ends = np.fromfile(f"{path}.index", dtype=np.uint64).astype(int)
    assert ends[-1] == len(tokens)
    name, n_tokens, _ = Path(f"{path}.metadata").read_text().split("\n")
    assert (name.split("|"), int(n_tokens)) == (["gpt2", "2"], len(tokens))
    return [piece.tolist() for piece in np.split(tokens, ends[:-1])]


def test_llmc_and_modded_nanogpt_read_what_we_write(native: Path, tmp_path: Path) -> None:
    out = to("llmc", native, tmp_path / "out", name="fineweb")
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names[-1] == "fineweb_val_000000.bin"
    assert read_header_shards(out, "fineweb_train_*.bin") == eot_first(TRAIN)
    assert read_header_shards(out, "fineweb_val_*.bin") == eot_first(VAL)


def test_build_nanogpt_reads_what_we_write(native: Path, tmp_path: Path) -> None:
    out = to("npy", native, tmp_path / "out", name="edufineweb")
    for split, docs in (("train", TRAIN), ("val", VAL)):
        shards = sorted(path for path in out.iterdir() if split in path.name)
        arrays = [np.load(path) for path in shards]
        assert all(array.dtype == np.uint16 for array in arrays)
        assert np.concatenate(arrays).astype(np.int64).tolist() == eot_first(docs)
        np.save(tmp_path / "theirs.npy", arrays[0])
        assert (tmp_path / "theirs.npy").read_bytes() == shards[0].read_bytes()
    assert (out / "edufineweb_val_000000.npy").exists() and (out / "edufineweb_train_000001.npy").exists()


def test_nanogpt_reads_what_we_write(native: Path, tmp_path: Path) -> None:
    out = to("nanogpt", native, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["train.bin", "val.bin"]
    assert np.fromfile(out / "train.bin", dtype=np.uint16).tolist() == eot_last(TRAIN)
    assert np.fromfile(out / "val.bin", dtype=np.uint16).tolist() == eot_last(VAL)


@pytest.mark.parametrize("at_once", [1 << 16, 7])
def test_megatron_reads_what_we_write(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(megatron_format, "_AT_ONCE", at_once)
    monkeypatch.setattr(reshard_module, "READ_TOKENS", 64)
    out = to("megatron", native, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "made_train.bin", "made_train.idx", "made_val.bin", "made_val.idx"
    ]  # fmt: skip
    assert read_megatron(out / "made_train") == [[*doc, EOT] for doc in TRAIN]
    assert read_megatron(out / "made_val") == [[*doc, EOT] for doc in VAL]


def test_datatrove_reads_what_we_write(native: Path, tmp_path: Path) -> None:
    out = to("datatrove", native, tmp_path / "out", name="made_test")
    assert read_datatrove(out / "00000_made_test_train.ds") == [[*doc, EOT] for doc in TRAIN]
    assert read_datatrove(out / "00000_made_test_val.ds") == [[*doc, EOT] for doc in VAL]


@pytest.mark.seconds
@pytest.mark.parametrize("read_tokens", [1 << 20, 1])
@pytest.mark.parametrize("format_name", FORMATS)
def test_there_and_back_gives_the_same_fingerprint(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, read_tokens: int
) -> None:
    monkeypatch.setattr(reshard_module, "READ_TOKENS", read_tokens)
    there = to(format_name, native, tmp_path / "there")
    back = to("native", there, tmp_path / "back", name="made")
    before, after = Manifest.read(native), Manifest.read(back)
    assert after.fingerprint == before.fingerprint
    assert after.splits == before.splits  # documents, tokens, bytes of text, shards
    assert verify(back) == []
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


# The verb.


def test_the_first_tokens_become_the_validation_split(tmp_path: Path) -> None:
    np.array(eot_last(TRAIN), dtype=np.uint16).tofile(tmp_path / "train.bin")
    out = to("native", tmp_path, tmp_path / "out", val_tokens=1500, max_tokens=2000)
    got = {}
    for split in ("val", "train"):
        with open_tokens(out, split) as stream:
            got[split] = stream.read(0, stream.n_tokens).tolist()
    assert got == {"val": eot_first(TRAIN)[:1500], "train": eot_first(TRAIN)[1500:3500]}
    manifest = Manifest.read(out)
    assert manifest.splits["train"].documents == got["train"].count(EOT)
    assert manifest.options == {"shard_tokens": "1000", "val_tokens": "1500", "max_tokens": "2000"}
    again = to("megatron", out, tmp_path / "again")
    documents = read_megatron(again / "tokens_train")
    assert flat(documents) == got["train"], "tokens that begin within a document stay as they are"
    assert all(document[-1] == EOT for document in documents[:-1])


def test_a_validation_split_there_is_comes_before_train(native: Path, tmp_path: Path) -> None:
    out = to("llmc", native, tmp_path / "out", val_tokens=2000)
    every = eot_first(VAL) + eot_first(TRAIN)
    assert read_header_shards(out, "made_val_*.bin") == every[:2000]
    assert read_header_shards(out, "made_train_*.bin") == every[2000:]


def test_ids_of_bytes_keep_their_tokenizer(tiny_data: Path, tmp_path: Path) -> None:
    there = to("datatrove", tiny_data, tmp_path / "there")
    back = to("native", there, tmp_path / "back", tokenizer="bytes", shard_tokens=10_000)
    assert Manifest.read(back).tokenizer_fingerprint == Manifest.read(tiny_data).tokenizer_fingerprint
    for split in ("train", "val"):
        with open_tokens(tiny_data, split) as a, open_tokens(back, split) as b:
            assert a.read(0, a.n_tokens).tolist() == b.read(0, b.n_tokens).tolist()
    np.array([300], dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="holds id 300"):
        to("native", tmp_path, tmp_path / "out", tokenizer="bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "mds"}, "there is no 'mds'"),
        ({"to": "nanogpt", "shard_tokens": 10}, "one file for each split"),
        ({"shard_tokens": 0}, "--shard-tokens 0 must be at least 1"),
        ({"shard_tokens": 2**31}, "must be below"),
        ({"val_tokens": 10**9}, "must leave some of the"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"name": "../x"}, "choose a --name"),
        ({"name": "evaluation"}, "choose a --name"),
        ({"tokenizer": "bytes"}, "says gpt2; leave it out"),
    ],
)
def test_impossible_options_are_refused_and_write_nothing(
    native: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        reshard(replace(ReshardOptions(native, tmp_path / "out", "native"), **options))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused(native: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    for out in ("full", "file"):
        with pytest.raises(UsageError, match="not an empty folder"):
            to("npy", native, tmp_path / out)
    (tmp_path / "empty").mkdir()
    assert open_tokens(to("npy", native, tmp_path / "empty"), "val").n_tokens == len(eot_first(VAL))


def test_too_small_a_disk_is_said_before_anything_is_written(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regpt2.base.files.free_bytes", lambda _: 1000)
    with pytest.raises(Problem, match=r"needs .* free"):
        to("npy", native, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", FORMATS)
def test_tokens_that_read_back_differently_are_not_left(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    entry = shelves.load("data.token_formats", format_name)
    write = entry.write

    def damage(folder: Path, data: writing.TokenData) -> None:
        write(folder, data)
        path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".npy", ".ds"))
        content = bytearray(path.read_bytes())
        content[-4] ^= 1  # the last token but one
        path.write_bytes(content)

    monkeypatch.setattr(entry, "write", damage)
    with pytest.raises(DataError, match="does not read back as the same train tokens"):
        to(format_name, native, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_document_too_long_for_a_megatron_sequence_is_refused(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_format, "MOST_TOKENS", 20)
    with pytest.raises(DataError, match="more than a Megatron sequence can hold"):
        to("megatron", native, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reshard", str(native), str(tmp_path / "a"), "--to", "nanogpt"]) == 0
    said = capsys.readouterr()
    assert f"{len(eot_first(VAL)):,} val tokens, {len(eot_first(TRAIN)):,} train tokens as nanogpt" in said.out
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "nowhere"]) == 2
    (tmp_path / "a" / "val.bin").write_bytes(b"")
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "native"]) == 0
    said = capsys.readouterr()
    assert "taken to be GPT-2's" in said.err
    assert "no validation split; --val-tokens N" in said.out


def until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end, "the command did not come so far"
        time.sleep(0.001)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_leaves_no_folder_and_the_same_command_ends_well(tmp_path: Path) -> None:
    data, out, part = tmp_path / "data", tmp_path / "out", tmp_path / ".out.tmp"
    data.mkdir()
    ids = np.random.default_rng(4).integers(0, EOT, 4_000_000).astype(np.uint16)
    ids.tofile(data / "train.bin")
    command = [sys.executable, "-m", "regpt2", "reshard", data, out, "--to", "native", "--shard-tokens", "20000"]
    for n_shards in (1, 30, 120):  # of 200
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda n=n_shards: len(list(part.glob("*_train_*.bin"))) >= n)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    assert verify(out) == [] and not part.exists()
    with open_tokens(out, "train") as stream:
        assert np.array_equal(stream.read(0, stream.n_tokens), ids)
