"""What shapes a preparation besides its text: the head as validation, copies and filters, the disk limit."""

import json
import random
from pathlib import Path

import pytest
from stopped_often import stops_until_done

from conftest import folder_bytes, shard_tokens
from regpt2.base.errors import DataError, UsageError
from regpt2.data.preparing import encode_part, pack_shards
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.sources.filters import Filters

pytestmark = pytest.mark.seconds  # all of them together

EOT = 256


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many parts; every third document came before, in the same file or in another."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    rng, texts = random.Random(3), list[str]()
    for n in range(4):
        lines = []
        for _ in range(400):
            copied = bool(texts) and rng.random() < 0.3
            text = rng.choice(texts) if copied else f"{len(texts)} " + "é—x " * rng.choice([1, 20, 200])
            texts.append(text)
            lines.append(json.dumps({"text": text}))
        (folder / f"{n}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.data.sources.plan.PART_BYTES", 20_000)
    monkeypatch.setattr("regpt2.data.sources.records.PART_BYTES", 20_000)


def texts_of(corpus: Path) -> list[str]:
    files = sorted(corpus.glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().split("\n")]


def options_for(corpus: Path, out: Path, **changes: object) -> PrepareOptions:
    values = {"workers": 1, "tokenizer": "bytes", "shard_tokens": 30_000} | changes
    return PrepareOptions(dataset="text_files", out=out, input=corpus, **values)  # type: ignore[arg-type]


def stream(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (EOT, *text.encode())]


@pytest.mark.parametrize("val_tokens", [1, 30_000, 77_777])
def test_the_first_tokens_are_validation_as_in_the_lecture(corpus: Path, tmp_path: Path, val_tokens: int) -> None:
    manifest = prepare(options_for(corpus, tmp_path / "out", val_tokens=val_tokens))
    expected = stream(texts_of(corpus))
    assert shard_tokens(tmp_path / "out", "val") == expected[:val_tokens]
    assert shard_tokens(tmp_path / "out", "train") == expected[val_tokens:]
    for name, tokens in (("val", expected[:val_tokens]), ("train", expected[val_tokens:])):
        split = manifest.splits[name]
        assert split.documents == tokens.count(EOT)
        assert (split.tokens, split.text_bytes) == (len(tokens), len(tokens) - tokens.count(EOT))
    assert manifest.options["val_tokens"] == str(val_tokens)
    assert "val_fraction" not in manifest.options


def test_more_for_validation_than_there_is_is_refused(corpus: Path, tmp_path: Path) -> None:
    n_tokens = len(stream(texts_of(corpus)))
    with pytest.raises(DataError, match=f"there are {n_tokens:,} tokens, no more than the {n_tokens:,} for validation"):
        prepare(options_for(corpus, tmp_path / "out", val_tokens=n_tokens))
    with pytest.raises(UsageError, match="both choose the validation split"):
        prepare(options_for(corpus, tmp_path / "out", val_tokens=1, val_fraction=0.1))


@pytest.mark.parametrize("validation", [{"val_tokens": 50_000}, {"val_fraction": 0.2}])
def test_copies_are_left_out_in_order_and_counted(corpus: Path, tmp_path: Path, validation: dict[str, float]) -> None:
    manifest = prepare(options_for(corpus, tmp_path / "out", dedup=True, **validation))
    texts = texts_of(corpus)
    kept = list(dict.fromkeys(texts))
    assert len(kept) < 0.8 * len(texts)
    assert manifest.skipped == {pack_shards.COPIES: len(texts) - len(kept)}
    assert sum(split.documents for split in manifest.splits.values()) == len(kept)
    got = {name: shard_tokens(tmp_path / "out", name) for name in ("train", "val")}
    if "val_tokens" in validation:
        assert got["val"] + got["train"] == stream(kept)
    else:
        plain = prepare(options_for(corpus, tmp_path / "plain", **validation))
        assert plain.skipped == {}
        for name, tokens in got.items():
            documents = _documents(shard_tokens(tmp_path / "plain", name))
            assert _documents(tokens) == list(dict.fromkeys(documents))


def _documents(tokens: list[int]) -> list[tuple[int, ...]]:
    starts = [place for place, token in enumerate(tokens) if token == EOT]
    return [tuple(tokens[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


@pytest.mark.seconds
@pytest.mark.parametrize("choice", [{"val_tokens": 45_000}, {"dedup": True}, {"dedup": True, "val_tokens": 45_000}])
def test_stopped_at_every_write_it_ends_with_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict[str, object]
) -> None:
    prepare(options_for(corpus, tmp_path / "reference", **choice))
    out = tmp_path / "out"
    places = [(pack_shards, "write_shard"), (pack_shards.Ledger, "write"), (encode_part, "write_atomic")]
    assert stops_until_done(lambda: prepare(options_for(corpus, out, **choice)), places, monkeypatch) > 5
    prepare(options_for(corpus, out, **choice))
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")


@pytest.mark.process
def test_workers_make_no_difference_to_copies_and_head(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(options_for(corpus, tmp_path / str(workers), workers=workers, dedup=True, val_tokens=45_000))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


def test_filters_leave_out_and_count(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(options_for(corpus, tmp_path / "out", filters=Filters(min_chars=50)))
    texts = texts_of(corpus)
    kept = [text for text in texts if len(text) >= 50]
    assert sum(split.documents for split in manifest.splits.values()) == len(kept)
    assert manifest.skipped == {"documents shorter than 50 characters": len(texts) - len(kept)}
    with pytest.raises(UsageError, match="its min_chars is '50', this command's is None"):
        prepare(options_for(corpus, tmp_path / "out"))
    with pytest.raises(UsageError, match="its dedup is None, this command's is 'True'"):
        prepare(options_for(corpus, tmp_path / "out", filters=Filters(min_chars=50), dedup=True))


def test_the_manifest_records_what_made_the_ids(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(options_for(corpus, tmp_path / "out", tokenizer="gpt2", encoder="tiktoken"))
    assert manifest.options["encoder"].startswith("tiktoken ")
    assert prepare(options_for(corpus, tmp_path / "out", tokenizer="gpt2", encoder="auto")) == manifest
