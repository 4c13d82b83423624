"""Shards and token streams against a reader written from the format's description, and against damaged files."""

import hashlib
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt2.base.errors import DataError
from regpt2.data.tokens import shards
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import open_tokens, shard_name, verify, write_shard

VOCAB_SIZE = 1000


def independent_read(path: Path) -> list[int]:
    """The tokens of a shard, from the description of llm.c's format alone."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    assert len(data) == 1024 + 2 * header[2]
    return list(struct.unpack(f"<{header[2]}H", data[1024:]))


def write_folder(folder: Path, lengths: list[int], *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[int]:
    """A prepared folder whose train split has shards of these lengths, and val one of 5; its train tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, sum(lengths)).astype(np.uint16)
    starts = np.cumsum([0, *lengths])
    records = [
        write_shard(folder / shard_name("made", "train", n), length, [tokens[start : start + length]])
        for n, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]
    val = write_shard(
        folder / shard_name("made", "val", 0), 5, [np.arange(2, dtype=np.uint16), np.arange(3, dtype="u2")]
    )
    Manifest(
        dataset="made",
        source="random",
        revision="1",
        tokenizer="bytes",
        tokenizer_fingerprint="f" * 64,
        vocab_size=vocab_size,
        options={},
        splits={
            "train": Split(documents=1, tokens=sum(lengths), text_bytes=1, shards=tuple(records)),
            "val": Split(documents=1, tokens=5, text_bytes=1, shards=(val,)),
        },
        skipped={"because": 2},
    ).write(folder)
    return [int(token) for token in tokens]


def fails(folder: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        open_tokens(folder, "train").close()


def test_shards_follow_the_format_and_the_manifest(tmp_path: Path) -> None:
    tokens = write_folder(tmp_path, [7, 3])
    assert independent_read(tmp_path / "made_train_000000.bin") == tokens[:7]
    assert independent_read(tmp_path / "made_train_000001.bin") == tokens[7:]
    assert independent_read(tmp_path / "made_val_000000.bin") == [0, 1, 0, 1, 2]
    manifest = Manifest.read(tmp_path)
    for shard in manifest.shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), data=st.data())
def test_reading_anywhere_equals_slicing_the_whole(tmp_path: Path, lengths: list[int], data: st.DataObject) -> None:
    tokens = write_folder(tmp_path, lengths)
    with open_tokens(tmp_path, "train") as stream:
        assert stream.n_tokens == len(tokens)
        for _ in range(5):
            start = data.draw(st.integers(0, len(tokens)))
            count = data.draw(st.integers(0, len(tokens) - start))
            got = stream.read(start, count)
            assert got.dtype == np.uint16
            assert got.tolist() == tokens[start : start + count]


@pytest.mark.parametrize("has_pread", [True, False])
@pytest.mark.parametrize("max_open_files", [128, 1])
def test_threads_read_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pread: bool, max_open_files: int
) -> None:
    tokens = write_folder(tmp_path, [500, 300, 700])
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", max_open_files)
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    wrong: list[int] = []

    def reader(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, 1200, 200).tolist():
            if stream.read(start, 300).tolist() != tokens[start : start + 300]:
                wrong.append(start)

    with open_tokens(tmp_path, "train") as stream:
        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_stream_says_what_the_manifest_says(tmp_path: Path) -> None:
    write_folder(tmp_path, [4])
    with open_tokens(tmp_path, "val") as stream:
        assert (stream.tokenizer_name, stream.tokenizer_fingerprint) == ("bytes", "f" * 64)
        assert (stream.vocab_size, stream.note) == (VOCAB_SIZE, "")
        assert stream.fingerprint == Manifest.read(tmp_path).fingerprint
        for start, count in ((-1, 2), (4, 2), (0, -1)):
            with pytest.raises(ValueError, match="of a stream of 5"):
                stream.read(start, count)


def test_truncated_and_grown_shards_are_refused_with_both_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, [10, 10])
    path = tmp_path / "made_train_000001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    fails(tmp_path, "has 1,042 bytes, expected 1,044 .*truncated")
    assert len(verify(tmp_path)) == 1
    path.write_bytes(data + b"\0")
    fails(tmp_path, "has 1,045 bytes, expected 1,044 .*grown")
    path.write_bytes(data[:8] + struct.pack("<i", 9) + data[12:])
    fails(tmp_path, "made_train_000001.bin")
    path.write_bytes(data[:500])
    fails(tmp_path, "truncated")
    path.unlink()
    fails(tmp_path, "made_train_000001.bin is missing")
    assert "is missing" in verify(tmp_path)[0]
    path.mkdir()
    fails(tmp_path, "not a plain file")


def test_a_huge_count_in_a_header_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "x_train_000000.bin").write_bytes(struct.pack("<3i", 20240520, 1, 2**31 - 1) + bytes(1012))
    fails(tmp_path, "has 1,024 bytes, expected 4,294,968,318")
    (tmp_path / "x_train_000000.bin").write_bytes(struct.pack("<3i", 20240520, 1, -5) + bytes(1012))
    fails(tmp_path, "x_train_000000.bin")


def test_a_file_truncated_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_folder(tmp_path, [5000])
    with open_tokens(tmp_path, "train") as stream:
        stream.read(0, 10)
        os.truncate(tmp_path / "made_train_000000.bin", 1024 + 2 * 100)
        with pytest.raises(DataError, match="at token 100 of 5,000: truncated"):
            stream.read(50, 100)


def test_wrong_magic_and_version_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [10])
    path = tmp_path / "made_train_000000.bin"
    data = path.read_bytes()
    path.write_bytes(b"\1" + data[1:])
    fails(tmp_path, "starts with neither 20240520")
    path.write_bytes(data[:4] + struct.pack("<i", 7) + data[8:])
    fails(tmp_path, "format version 7, expected 1")


def test_every_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    write_folder(tmp_path, [50])
    assert verify(tmp_path) == []
    path = tmp_path / "made_train_000000.bin"
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * len(data), 50).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        bad = verify(tmp_path)
        assert len(bad) == 1
        assert "made_train_000000.bin has SHA-256" in bad[0]
    path.write_bytes(data)
    told: list[int] = []
    assert verify(tmp_path, told.append) == []
    assert sum(told) == sum(shard.bytes for shard in Manifest.read(tmp_path).shards)


def test_an_id_outside_the_vocabulary_is_named_with_shard_and_place(tmp_path: Path) -> None:
    write_folder(tmp_path, [10, 20])
    path = tmp_path / "made_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[1024 + 2 * 13 : 1024 + 2 * 14] = struct.pack("<H", VOCAB_SIZE)
    path.write_bytes(data)
    with open_tokens(tmp_path, "train") as stream:
        stream.read(0, 23)
        with pytest.raises(DataError, match=r"made_train_000001.bin holds id 1000 at token 13, .*1,000"):
            stream.read(5, 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this program reads 1"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"dataset": 3}, "manifest.dataset: got 3, expected str"),
        ({"vocab_size": True}, "manifest.vocab_size"),
        ({"vocab_size": -1}, "manifest.vocab_size"),
        ({"fingerprint": "0" * 64}, "manifest.json: fingerprint"),
        ({"splits": {"test": {}}}, r"unknown \['test'\]"),
        ({"splits": {"train": []}}, "splits.train: got list"),
        ({"skipped": {"x": "y"}}, "skipped.x"),
        ({"tokenizer_fingerprint": "0" * 64}, "manifest.json: fingerprint"),
    ],
)
def test_manifest_is_read_strictly(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_folder(tmp_path, [4])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(tmp_path, message)


def test_manifest_faults_within_a_shard_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, [4])
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    for old, new, message in (
        ("made_train_000000.bin", "../made_train_000000.bin", r"splits.train.shards\[0\].file"),
        ('"tokens": 4', '"tokens": 5', "splits.train"),
        ('"file"', '"fail"', r"missing keys \['file'\]"),
    ):
        path.write_text(whole.replace(old, new))
        fails(tmp_path, message)
    for text in ("", "{", "[]", "[" * 100_000, "\xff"):
        path.write_text(text, encoding="latin-1")
        fails(tmp_path, "manifest")


def test_missing_folder_empty_folder_and_unfinished_folder_say_how_to_mend(tmp_path: Path) -> None:
    fails(tmp_path / "absent", "no such data folder; make it with `regpt2 prepare DATASET --out")
    fails(tmp_path, "no train tokens here .* `regpt2 prepare DATASET --out")
    write_shard(tmp_path / "x_train_000000.bin", 1, [np.zeros(1, dtype=np.uint16)])
    (tmp_path / ".prepare.json").write_text("{}")
    fails(tmp_path, "not finished; run the same")


def test_ready_made_fineweb_shards_are_read_in_order(tmp_path: Path) -> None:
    for n in (2, 1):
        write_shard(tmp_path / f"fineweb_train_{n:06d}.bin", 3, [np.arange(3, dtype=np.uint16) + 10 * n])
    write_shard(tmp_path / "fineweb_val_000000.bin", 1, [np.array([50256], dtype=np.uint16)])
    (tmp_path / "README").write_text("not tokens")
    with open_tokens(tmp_path, "train") as stream:
        assert stream.read(0, 6).tolist() == [10, 11, 12, 20, 21, 22]
        assert (stream.tokenizer_name, stream.tokenizer_fingerprint, stream.vocab_size) == ("gpt2", None, 50257)
        assert "no manifest.json" in stream.note
        train_fingerprint = stream.fingerprint
    with open_tokens(tmp_path, "val") as stream:
        assert stream.read(0, 1).tolist() == [50256]
        assert stream.fingerprint != train_fingerprint
    assert verify(tmp_path) == []


def test_build_nanogpt_npy_shards_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_val_000000.npy", np.array([7], dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([1, 2, 3], dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000002.npy", np.array([4, 50257], dtype=np.uint16))
    with open_tokens(tmp_path, "train") as stream:
        assert stream.read(1, 3).tolist() == [2, 3, 4]
        with pytest.raises(DataError, match=r"000002\.npy holds id 50257 at token 1"):
            stream.read(0, 5)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("edu_fineweb10B/edu_fineweb_train_000001.bin", "fineweb_edu"),  # llm.c
        ("finewebedu10B/finewebedu_train_000001.bin", "fineweb_edu"),  # modded-nanogpt
        ("fineweb10B/fineweb_train_000001.bin", "fineweb"),
        ("edu_fineweb10B/edufineweb_train_000001.npy", "fineweb_edu"),  # build-nanogpt
        ("openwebtext/train.bin", "openwebtext"),  # nanoGPT
        ("mine/train.bin", None),
    ],
)
def test_the_names_of_ready_made_shards_say_what_text_it_is(tmp_path: Path, name: str, dataset: str | None) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    tokens = np.arange(5, dtype=np.uint16)
    if path.suffix == ".npy":
        np.save(path, tokens)
    elif path.stem == "train":
        tokens.tofile(path)
    else:
        write_shard(path, len(tokens), [tokens])
    with open_tokens(path.parent, "train") as stream:
        assert stream.dataset == dataset


def test_bad_npy_files_are_refused_without_allocation(tmp_path: Path) -> None:
    path = tmp_path / "a_train_0.npy"
    for array, message in (
        (np.zeros(3, dtype=np.int64), "holds int64"),
        (np.zeros((2, 2), dtype=np.uint16), r"shape \(2, 2\)"),
    ):
        np.save(path, array)
        fails(tmp_path, message)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    fails(tmp_path, "holds object")
    np.save(path, np.zeros(3, dtype=np.uint16))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(3,), }   ", b"(9999999,)"[:10]))
    fails(tmp_path, "a_train_0.npy")
    path.write_bytes(whole.replace(b"(3,), }        ", b"(20000000000,)}"))
    fails(tmp_path, "expected 40,000,000,128")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x01\x00\x40\x00{"]),
)
def test_any_bytes_are_tokens_or_a_data_error(tmp_path: Path, data: bytes, start: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(start + data)
    try:
        with open_tokens(tmp_path, "train") as stream:
            stream.read(0, stream.n_tokens)
    except DataError:
        pass


def test_nanogpt_raw_files_are_recognized_by_content(tmp_path: Path) -> None:
    np.array([5, 6, 7], dtype="<u2").tofile(tmp_path / "train.bin")
    write_shard(tmp_path / "val.bin", 2, [np.array([8, 9], dtype=np.uint16)])
    with open_tokens(tmp_path, "train") as train, open_tokens(tmp_path, "val") as val:
        assert train.read(0, 3).tolist() == [5, 6, 7]
        assert val.read(0, 2).tolist() == [8, 9]
    (tmp_path / "train.bin").write_bytes(b"abc")
    fails(tmp_path, "odd number")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
def test_pipes_folders_and_dead_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    os.mkfifo(path)
    fails(tmp_path, "not a plain file")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    fails(tmp_path, "is missing")
    path.unlink()
    path.mkdir()
    fails(tmp_path, "not a plain file")
