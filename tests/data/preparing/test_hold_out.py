"""Small inputs: whatever 1 to 30 documents there are, both splits get some, and every document is in exactly one."""

import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import folder_bytes
from regpt2.base.errors import DataError
from regpt2.data.preparing.encode_part import EncodeJob
from regpt2.data.preparing.hold_out import WINDOW_TOKENS, HoldOut, end_for_validation
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.sources import plan as plan_module
from regpt2.data.sources import records
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import verify

EOT = 256  # of the tokenizer "bytes"


class Killed(BaseException):
    """In the place of a SIGKILL."""


def options_for(source: Path, out: Path, **changes: object) -> PrepareOptions:
    values = {"workers": 1, "tokenizer": "bytes"} | changes
    return PrepareOptions(dataset="text_files", out=out, input=source, **values)  # type: ignore[arg-type]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(out: Path, split: str) -> list[str]:
    """The documents of a split, read from its shards by the description of the format alone."""
    files = [path.read_bytes() for path in sorted(out.glob(f"*_{split}_*.bin"))]
    ids = np.concatenate([np.frombuffer(data, "<u2", offset=1024) for data in files])
    starts = [*np.flatnonzero(ids == EOT), len(ids)]
    return [bytes(ids[a + 1 : b].astype("u1")).decode() for a, b in itertools.pairwise(starts)]


def expected_splits(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    """The rule of docs/data.md for two different texts or more."""
    digest = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts}
    in_val = {text for text in texts if int(digest[text][:16], 16) / 2**64 < val_fraction}
    if not in_val or in_val == set(texts):
        in_val = {min(texts, key=digest.__getitem__)}
    return {"train": [t for t in texts if t not in in_val], "val": [t for t in texts if t in in_val]}


WORDS = st.lists(st.sampled_from(["a", "bc", "größer", "\n", "\n\n", "."]), min_size=2, max_size=8)
TEXTS = WORDS.map(lambda words: f"<{' '.join(words)}>")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=30),
    val_fraction=st.sampled_from([0.01, 0.05, 0.5]),
    shard_tokens=st.sampled_from([60, 10**8]),
    part_bytes=st.sampled_from([40, 300, 1 << 21]),
    dedup=st.booleans(),
    kills=st.lists(st.integers(1, 40), max_size=3),
)
def test_any_few_documents_give_two_splits_that_hold_each_once_wherever_it_is_killed(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    val_fraction: float,
    shard_tokens: int,
    part_bytes: int,
    dedup: bool,
    kills: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("few")
    source = write_lines(folder / "in.jsonl", texts)
    how = {"val_fraction": val_fraction, "shard_tokens": shard_tokens, "dedup": dedup}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "PART_BYTES", part_bytes)
        patch.setattr(records, "PART_BYTES", part_bytes)
        patch.setattr(os, "fsync", lambda descriptor: None)  # nearly all of the time, on a busy disk
        prepare(options_for(source, folder / "out", **how))
        for kill in kills:
            with pytest.MonkeyPatch.context() as killing:
                kill_at(killing, kill)
                try:
                    prepare(options_for(source, folder / "killed", **how))
                except Killed:
                    continue
        manifest = prepare(options_for(source, folder / "killed", **how))
    assert folder_bytes(folder / "killed") == folder_bytes(folder / "out")
    assert verify(folder / "out") == []
    found = {split: texts_of(folder / "out", split) for split in ("train", "val")}
    kept = list(dict.fromkeys(texts)) if dedup else texts
    if len(set(texts)) > 1:
        assert found == expected_splits(kept, val_fraction)
    else:  # one text: each copy is cut at the same place
        assert [a + b for a, b in zip(found["train"], found["val"], strict=True)] == kept
        assert all(half.strip() for halves in found.values() for half in halves)
        assert manifest.options["held_out"] == "the end of the only document (in.jsonl)"
    skipped = {"documents left out as copies of earlier ones": len(texts) - len(kept)} if len(kept) < len(texts) else {}
    assert manifest.skipped == skipped


def kill_at(patch: pytest.MonkeyPatch, n: int) -> None:
    """Have the n-th change of a folder's names fail as if the process ended there."""
    left = [n]

    def wrapped(change: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return change(*arguments, **named)  # type: ignore[operator]

        return call

    for name in ("replace", "unlink"):
        patch.setattr(os, name, wrapped(getattr(os, name)))
    patch.setattr(Path, "unlink", wrapped(Path.unlink))


@pytest.mark.process
@pytest.mark.seconds
def test_two_workers_hold_out_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "PART_BYTES", 100)
    monkeypatch.setattr(records, "PART_BYTES", 100)
    source = write_lines(tmp_path / "in.jsonl", [f"document {n} of a few, all in train" for n in range(12)])
    for workers in (1, 2):
        prepare(options_for(source, tmp_path / str(workers), workers=workers, val_fraction=1e-9, shard_tokens=50))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")
    assert len(texts_of(tmp_path / "1", "val")) == 1


def test_a_text_of_a_few_pieces_holds_out_the_end_of_one_of_them(tmp_path: Path) -> None:
    """100 kB in a file are four pieces, of which by number none falls to validation."""
    text = "".join(f"Paragraph {n} of a text.\n\n" for n in range(4000))
    (tmp_path / "text.txt").write_text(text)
    manifest = prepare(options_for(tmp_path / "text.txt", tmp_path / "out"))
    assert [manifest.splits[name].documents for name in ("train", "val")] == [4, 1]
    assert manifest.splits["val"].tokens >= WINDOW_TOKENS, "a run with GPT-2's windows can be validated"
    assert manifest.splits["val"].tokens < 2 * WINDOW_TOKENS, "and the most of little text is for training"
    assert manifest.options["held_out"].startswith("the end of the piece with the lowest SHA-256")
    others, (end,) = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert Counter("".join([*others, end]).split("\n\n")) == Counter(text.split("\n\n"))
    pieces = [piece + end if piece + end in text else piece for piece in others]
    assert "".join(pieces) == text, "each piece begins where the one before ends"
    long = [piece for piece in pieces if len(piece) >= 8192]
    assert min(long, key=lambda piece: hashlib.sha256(piece.encode()).digest()).endswith(end)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_end_of_a_text_has_a_window_and_begins_at_a_paragraph(name: str) -> None:
    tokenizer = load_tokenizer(name)
    text = "".join(f"Paragraph {n} of a text, größer as ever.\r\n\n" for n in range(900))
    head, end = end_for_validation(text, tokenizer.encode_to_numpy(text), tokenizer, 0.05) or ("", "")
    assert head + end == text and end.startswith("Paragraph") and head.endswith("\n\n")
    n_tokens = len(tokenizer.encode(text))
    assert 0 <= len(tokenizer.encode(end)) + 1 - max(WINDOW_TOKENS, 0.05 * n_tokens) < 1000


def test_a_short_text_is_cut_in_the_middle_and_a_line_without_spaces_anywhere() -> None:
    tokenizer = load_tokenizer("bytes")

    def cut(text: str, val_fraction: float = 0.05) -> tuple[str, str] | None:
        return end_for_validation(text, tokenizer.encode_to_numpy(text), tokenizer, val_fraction)

    assert cut("one two three four five six seven") == ("one two three", " four five six seven")
    assert cut("ab") == ("a", "b") and cut(" \n a b \n") == (" \n a", " b \n")
    assert cut("x" * 100_000, 0.1) == ("x" * 90_000, "x" * 10_000)
    assert cut("ü" * 9) == ("ü" * 4, "ü" * 5)
    spaces = " " * 100
    assert cut(f"ab{spaces}") == ("a", f"b{spaces}") and cut(f"{spaces}ab") == (f"{spaces}a", "b")
    assert cut("a") is None and cut("\n a \n") is None and cut(" \n ") is None


def test_one_character_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    for _ in range(2):
        with pytest.raises(DataError, match="the only document is one character"):
            prepare(options_for(tmp_path / "a.txt", tmp_path / "out"))
    (tmp_path / "a.txt").write_text("a b\n")
    assert prepare(options_for(tmp_path / "a.txt", tmp_path / "out")).splits["val"].documents == 1


def test_what_was_held_out_and_a_split_shorter_than_a_window_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for n in range(3):
        (source / f"{n}.txt").write_text(f"text {n}")
    digests = {n: hashlib.sha256(f"text {n}".encode()).hexdigest() for n in range(3)}
    lowest = min(digests, key=digests.__getitem__)
    manifest = prepare(options_for(source, tmp_path / "out", val_fraction=1e-9))
    printed = capsys.readouterr()
    line = f"the document with the lowest SHA-256, {digests[lowest][:16]} ({lowest}.txt)"
    assert manifest.options["held_out"] == Manifest.read(tmp_path / "out").options["held_out"] == line
    assert f"held out for validation instead: {line}" in printed.out
    assert printed.err.count("warning:") == 1 and "the val split has 7 tokens, fewer than the 1,025" in printed.err
    assert "--batch.seq-len 4 or less" in printed.err
    assert prepare(options_for(source, tmp_path / "out", val_fraction=1e-9)) == manifest  # complete already
    assert "warning" not in capsys.readouterr().err


def test_equal_halves_are_no_copies_of_each_other(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["abab", "abab"])
    manifest = prepare(options_for(source, tmp_path / "out", dedup=True))
    assert texts_of(tmp_path / "out", "train") == texts_of(tmp_path / "out", "val") == ["ab"]
    assert manifest.skipped == {"documents left out as copies of earlier ones": 1}


def test_filters_come_before_the_choice(tmp_path: Path) -> None:
    from regpt2.data.sources.filters import Filters

    source = write_lines(tmp_path / "in.jsonl", ["short", "a text that is long enough", "another that is as long"])
    prepare(options_for(source, tmp_path / "out", filters=Filters(min_chars=10), val_fraction=1e-9))
    assert sorted(len(texts_of(tmp_path / "out", split)) for split in ("train", "val")) == [1, 1]


def test_the_rule_travels_to_tasks_that_read_it_from_a_file(tmp_path: Path) -> None:
    from regpt2.data.preparing.cluster import SharedWork
    from regpt2.data.sources.filters import Filters

    hold_out = HoldOut("ab" * 32, True, "a.txt")
    job = EncodeJob("text_files", "bytes", None, "tiktoken", 0.05, Filters(), False, tmp_path, hold_out=hold_out)
    work = SharedWork(job, [], 1, 1, str(tmp_path))
    assert SharedWork.from_json(work.to_json()) == work
