"""Megatron and datatrove folders, written here from each format's description alone, and damaged ones."""

import os
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from regpt2.base.errors import DataError
from regpt2.data.tokens.other_formats import token_file
from regpt2.data.tokens.shards import open_tokens

EOT = 50256
RNG = np.random.default_rng(1)
TRAIN, VAL = ([RNG.integers(0, EOT, RNG.integers(1, 31)).tolist() for _ in range(n)] for n in (400, 40))


def flat(docs: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(docs))


def eot_last(docs: list[list[int]]) -> list[int]:
    return flat([[*doc, EOT] for doc in docs])


def write_megatron(prefix: Path, docs: list[list[int]], kind: type = np.uint16, per_document: int = 1) -> None:
    """Each document in `per_document` sequences, as with --split-sentences."""
    sequences = [part for doc in docs for part in np.array_split(np.array(doc, dtype=kind), per_document)]
    lengths = np.array([len(part) for part in sequences], dtype=np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1]]) * kind().itemsize
    ends = np.arange(0, len(sequences) + 1, per_document)
    prefix.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in sequences))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, {np.uint16: 8, np.int32: 4}[kind], len(sequences), len(ends))
    prefix.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + pointers.astype(np.int64).tobytes() + ends.astype(np.int64).tobytes()
    )


def write_datatrove(path: Path, docs: list[list[int]], kind: type = np.uint16) -> None:
    np.array(flat(docs), dtype=kind).tofile(path)
    np.cumsum([len(doc) for doc in docs]).astype(np.uint64).tofile(f"{path}.index")


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
@pytest.mark.parametrize("per_document", [1, 3])
def test_megatron_folders_are_read(tmp_path: Path, kind: type, per_document: int) -> None:
    for name, docs in (("gpt2_train_text_document", TRAIN), ("gpt2_valid_text_document", VAL), ("test", TRAIN)):
        write_megatron(tmp_path / name, [[*doc, EOT] for doc in docs], kind, per_document)
    for split, docs in (("train", TRAIN), ("val", VAL)):
        with open_tokens(tmp_path, split) as stream:
            assert stream.read(0, stream.n_tokens).tolist() == eot_last(docs)
            assert stream.read(77, 5).tolist() == eot_last(docs)[77:82]
            assert "run together" not in stream.note


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_datatrove_folders_are_read_in_the_order_of_their_files(tmp_path: Path, kind: type) -> None:
    write_datatrove(tmp_path / "00001_unshuffled.ds", TRAIN[200:], kind)
    write_datatrove(tmp_path / "00000_unshuffled.ds", TRAIN[:200], kind)
    (tmp_path / "00000_unshuffled.ds.metadata").write_text("gpt2|2\n1\n1 T")
    with open_tokens(tmp_path, "train") as stream:
        assert stream.read(0, stream.n_tokens).tolist() == flat(TRAIN)
        assert "they run together" in stream.note
    with pytest.raises(DataError, match=r"no val tokens here .*reshard .* --val-tokens N"):
        open_tokens(tmp_path, "val")


def test_reading_an_index_in_pieces_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.data.tokens.other_formats._AT_ONCE", 7)
    write_megatron(tmp_path / "train", TRAIN)
    write_datatrove(tmp_path / "val.ds", VAL)
    for split, docs in (("train", TRAIN), ("val", VAL)):
        with open_tokens(tmp_path, split) as stream:
            assert stream.read(0, stream.n_tokens).tolist() == flat(docs)


def test_an_id_beyond_16_bits_is_refused_with_its_place(tmp_path: Path) -> None:
    for bad in (65536 + 5, -1):
        write_megatron(tmp_path / "train", [[1, 2], [3, bad, 4], [5, EOT]], np.int32)
        with (
            open_tokens(tmp_path, "train") as stream,
            pytest.raises(DataError, match=r"train\.bin holds id .* token 3"),
        ):
            stream.read(0, stream.n_tokens)


def fields(index: bytes, n: int) -> dict[str, int]:
    """Where things stand in the index of n one-sequence documents."""
    return {"version": 9, "type": 17, "sequences": 18, "documents": 26, "length": 34, "pointer": 34 + 4 * n,
            "last document": len(index) - 8}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "expected Megatron's"),
        ("type", 5, "type 5; expected Megatron's"),
        ("sequences", 5, "bytes, expected"),
        ("sequences", 2**63, "bytes, expected"),
        ("documents", 2**64 - 1, "bytes, expected"),
        ("length", -1, "sequence 0 has -1 tokens"),
        ("length", 2**31 - 1, "sequence 1 has"),
        ("pointer", 2, "sequence 0 .* at byte 2, expected byte 0"),
        ("pointer", -(2**63), "sequence 0"),
        ("last document", 3, "documents end at sequence 3, expected 4"),
    ],
)
def test_a_megatron_index_that_lies_is_refused(tmp_path: Path, field: str, value: int, message: str) -> None:
    write_megatron(tmp_path / "train", [[1, 2], [3], [4, 5, 6], [7]])
    path = tmp_path / "train.idx"
    index = bytearray(path.read_bytes())
    n_bytes = {"type": 1, "length": 4}.get(field, 8)
    at = fields(index, 4)[field]
    index[at : at + n_bytes] = value.to_bytes(n_bytes, "little", signed=value < 0)
    path.write_bytes(index)
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path, "train")


@pytest.mark.parametrize(
    "ends", [[2, 1, 5], [2, 3, 4], [2, 3, 6], [2, 3, 2**63], [2, 3, 2**64 - 1], [2**64 - 1, 5], [0] * 5 + [5]]
)
def test_a_datatrove_index_that_lies_is_refused(tmp_path: Path, ends: list[int]) -> None:
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "a.ds")
    np.array(ends, dtype=np.uint64).tofile(tmp_path / "a.ds.index")
    with pytest.raises(DataError, match=r"a\.ds"):
        open_tokens(tmp_path, "train")


@pytest.mark.parametrize("victim", ["train.bin", "train.idx", "val.ds", "val.ds.index"])
def test_every_damage_of_size_or_kind_is_one_clear_error(tmp_path: Path, victim: str) -> None:
    write_megatron(tmp_path / "train", TRAIN[:5])
    write_datatrove(tmp_path / "val.ds", VAL[:5])
    path, split = tmp_path / victim, victim.split(".")[0]
    whole = path.read_bytes()

    def is_refused() -> None:
        with pytest.raises(DataError, match=r"train\.|val\."):
            open_tokens(tmp_path, split)

    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        if victim == "train.bin" or length:
            is_refused()
    path.write_bytes(whole + bytes(8))
    is_refused()
    path.unlink()
    if victim not in ("train.idx", "val.ds"):  # without these nothing says that there is such a file
        is_refused()
    path.symlink_to(tmp_path / "nowhere")
    is_refused()
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        is_refused()


def test_any_change_of_a_byte_of_an_index_is_tokens_or_a_data_error(tmp_path: Path) -> None:
    write_megatron(tmp_path / "train", TRAIN[:3])
    write_datatrove(tmp_path / "val.ds", VAL[:3])
    rng = np.random.default_rng(5)
    for name, split in (("train.idx", "train"), ("val.ds.index", "val")):
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= int(rng.integers(1, 256))
            (tmp_path / name).write_bytes(changed)
            try:
                with open_tokens(tmp_path, split) as stream:
                    stream.read(0, stream.n_tokens)
            except DataError:
                pass


def test_a_split_in_two_formats_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens_train_000001.npy", np.arange(9, dtype="<u2"))
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")
    with open_tokens(tmp_path, "train") as tokens:
        assert tokens.n_tokens == 9
    np.arange(9, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"holds train tokens in several formats \(\.bin, \.npy\), perhaps the same"):
        open_tokens(tmp_path, "train")


def write_llmc(path: Path, magic: int, ids: list[int]) -> None:
    """A header of 256 numbers and the tokens, as every `.bin` of llm.c's begins."""
    path.write_bytes(struct.pack("<256i", magic, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))


@pytest.mark.parametrize("name", ["tiny_shakespeare", "TinyStories"])
def test_llm_c_s_token_files_that_end_with_the_split_are_read(tmp_path: Path, name: str) -> None:
    for split, docs in (("train", TRAIN), ("val", VAL)):
        write_llmc(tmp_path / f"{name}_{split}.bin", 20240520, flat(docs))
    for split, docs in (("train", TRAIN), ("val", VAL)):
        with open_tokens(tmp_path, split) as stream:
            assert stream.read(0, stream.n_tokens).tolist() == flat(docs)
            assert "left out" not in stream.note


def test_llm_c_s_hellaswag_beside_tokens_is_left_out_and_named(tmp_path: Path) -> None:
    write_llmc(tmp_path / "fineweb_train_000001.bin", 20240520, flat(TRAIN))
    write_llmc(tmp_path / "hellaswag_val.bin", 20240522, [65535, 4, 0, 0, 2])
    with open_tokens(tmp_path, "train") as stream:
        assert "hellaswag_val" not in stream.note
    with pytest.raises(DataError, match=r"no val tokens here .* hellaswag_val\.bin is left out: it holds .* questions"):
        open_tokens(tmp_path, "val")
    write_llmc(tmp_path / "fineweb_val_000000.bin", 20240520, flat(VAL))
    with open_tokens(tmp_path, "val") as stream:
        assert stream.read(0, stream.n_tokens).tolist() == flat(VAL)
        assert "hellaswag_val.bin is left out" in stream.note
    with pytest.raises(DataError, match=r"holds the questions of an evaluation.* --files hellaswag=PATH"):
        token_file(tmp_path / "hellaswag_val.bin")


def test_a_file_without_a_header_that_ends_with_the_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine_train.bin").write_bytes(struct.pack("<400H", *range(400)))
    with pytest.raises(DataError, match=r"mine_train\.bin starts with neither 20240520"):
        open_tokens(tmp_path, "train")
