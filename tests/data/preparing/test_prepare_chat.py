"""Conversations to shards: every token and its mask by hand, through workers, kills, copies, cuts and other files."""

import gzip
import json
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stopped_often import stops_until_done

from conftest import folder_bytes, shard_tokens
from hub_server import FakeHub
from regpt2.base.errors import DataError, UsageError
from regpt2.cli import main
from regpt2.data.checks.integrity import Findings, check_data
from regpt2.data.preparing import encode_part, pack_shards
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.sources.filters import Filters
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens

pytestmark = pytest.mark.seconds  # all of them together

EOT, START, END = 256, 257, 258  # of the bytes tokenizer with the two special tokens
Conversation = list[dict[str, str]]


def conversations() -> list[Conversation]:
    """Of one or two turns, some with a system message; contents of any length, with what looks like a special token."""
    rng, found = random.Random(3), list[Conversation]()
    for n in range(120):
        texts = [f"{n} " + rng.choice(["é—x ", "a<|im_end|>b\n", "<|endoftext|>"]) * rng.randint(1, 9) for _ in "abcd"]
        roles = ["user", "assistant"] * rng.randint(1, 2)
        system = [{"role": "system", "content": "Be brief."}] if n % 3 == 0 else []
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        found.append([*system, *turns])
    found[7] = found[2]  # a copy
    return found


def by_hand(conversation: Conversation) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation and which of them count, by the description in docs/data.md."""
    ids, counted = [EOT], [False]
    for message in conversation:
        text, answers = message["content"].strip().encode(), message["role"] == "assistant"
        head = [START, *f"{message['role']}\n".encode()]
        ids += [*head, *text, END, *b"\n"]
        counted += [False] * len(head) + [answers] * (len(text) + 1) + [False]
    return ids, counted


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    lines = [json.dumps({"messages": conversation, "id": n}) for n, conversation in enumerate(conversations())]
    (folder / "a.jsonl").write_text("\n".join(lines[:50]))
    (folder / "b.jsonl").write_text("\n".join(lines[50:]))
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.data.sources.plan.PART_BYTES", 5_000)
    monkeypatch.setattr("regpt2.data.sources.records.PART_BYTES", 5_000)


def options_for(place: Path, out: Path, **changes: object) -> PrepareOptions:
    values = {"workers": 1, "tokenizer": "bytes", "shard_tokens": 4_000} | changes
    return PrepareOptions(dataset="chat", out=out, input=place, **values)  # type: ignore[arg-type]


def masks(out: Path, split: str) -> list[bool]:
    """From the files themselves, by their names."""
    files = sorted(out.glob(f"chat_{split}_*.mask"))
    return np.concatenate([np.fromfile(file, dtype=np.uint8) for file in files]).astype(bool).tolist()


def test_every_token_and_its_mask_are_those_of_the_template(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(options_for(corpus, tmp_path, val_tokens=2_000))
    pairs = [by_hand(conversation) for conversation in conversations()]
    ids, counted = (list(chain.from_iterable(each)) for each in zip(*pairs, strict=True))
    assert shard_tokens(tmp_path, "val") + shard_tokens(tmp_path, "train") == ids
    assert masks(tmp_path, "val") + masks(tmp_path, "train") == counted
    assert len(manifest.splits["train"].shards) > 3, "documents go on over shards"
    assert (manifest.vocab_size, manifest.added) == (259, ("<|im_start|>", "<|im_end|>"))
    for split in ("val", "train"):
        assert manifest.splits[split].counted == sum(masks(tmp_path, split))
    assert manifest.splits["train"].documents + manifest.splits["val"].documents == len(pairs)
    assert manifest == Manifest.read(tmp_path)


def test_any_stretch_of_the_mask_can_be_read(corpus: Path, tmp_path: Path) -> None:
    prepare(options_for(corpus, tmp_path))
    expected = np.array(masks(tmp_path, "train"))
    with open_tokens(tmp_path, "train") as stream:
        assert stream.tokenizer().decode([START]) == "<|im_start|>" and stream.tokenizer().eot == EOT
        for start, count in ((0, stream.n_tokens), (3_990, 20), (3_999, 4_002), (stream.n_tokens, 0)):
            assert np.array_equal(stream.read_mask(start, count), expected[start : start + count])
        with pytest.raises(ValueError, match="of a stream of"):
            stream.read_mask(1, stream.n_tokens)


@pytest.mark.parametrize("choice", [{"val_fraction": 0.3}, {"dedup": True, "val_tokens": 4_000}])
def test_stopped_at_every_write_it_ends_with_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict[str, object]
) -> None:
    manifest = prepare(options_for(corpus, tmp_path / "reference", **choice))
    reasons = "documents left out as copies of earlier ones"
    assert manifest.skipped.get(reasons, 0) == ("dedup" in choice)
    out = tmp_path / "out"
    writes = [(pack_shards, "write_shard"), (pack_shards, "write_mask"), (encode_part, "write_atomic")]
    places = [*writes, (pack_shards.Ledger, "write")]
    assert stops_until_done(lambda: prepare(options_for(corpus, out, **choice)), places, monkeypatch) > 5
    prepare(options_for(corpus, out, **choice))
    assert folder_bytes(out) == folder_bytes(tmp_path / "reference")
    pairs = [by_hand(conversation) for conversation in conversations()]
    left = [pair for n, pair in enumerate(pairs) if n != 7 or "dedup" not in choice]
    assert sum(masks(out, "train")) + sum(masks(out, "val")) == sum(sum(counted) for _, counted in left)


@pytest.mark.process
def test_two_workers_write_the_same_bytes_as_one(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(options_for(corpus, tmp_path / str(workers), workers=workers, dedup=True, disk_limit=0.001))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


def as_sharegpt(conversation: Conversation) -> list[dict[str, str]]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in conversation]


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "parquet", "sharegpt", "nested"])
def test_all_kinds_of_files_give_the_same_tokens(corpus: Path, tmp_path: Path, kind: str) -> None:
    records = [{"messages": conversation, "id": "x"} for conversation in conversations()]
    prepare(options_for(corpus, tmp_path / "reference"))
    place, field = tmp_path / f"corpus.{kind}", ""
    if kind == "parquet":
        pq.write_table(pa.table({"messages": [r["messages"] for r in records]}), place, row_group_size=40)
    elif kind == "json":
        place.write_text(json.dumps(records))
    elif kind == "jsonl.gz":
        place.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    else:
        place, field = tmp_path / "corpus.parquet", "conversations" if kind == "sharegpt" else "meta.messages"
        values = [as_sharegpt(r["messages"]) if kind == "sharegpt" else {"messages": r["messages"]} for r in records]
        pq.write_table(pa.table({field.partition(".")[0]: values}), place)
    prepare(options_for(place, tmp_path / "out", field=field))
    for split in ("train", "val"):
        assert shard_tokens(tmp_path / "out", split) == shard_tokens(tmp_path / "reference", split)
        assert masks(tmp_path / "out", split) == masks(tmp_path / "reference", split)


def test_a_data_set_on_the_hub_gives_the_same_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"messages": conversations(), "source": ["x"] * 120})
    pq.write_table(table, tmp_path / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}
    with FakeHub({f"owner/talk@{'a' * 40}": files}) as hub:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
        options = {"workers": 1, "tokenizer": "bytes", "val_tokens": 2_000, "repo": "owner/talk", "revision": "a" * 40}
        prepare(PrepareOptions(dataset="chat", out=tmp_path / "out", **options))  # type: ignore[arg-type]
    expected = [token for conversation in conversations() for token in by_hand(conversation)[0]]
    assert shard_tokens(tmp_path / "out", "val") + shard_tokens(tmp_path / "out", "train") == expected


def user(text: object) -> dict[str, object]:
    return {"role": "user", "content": text}


MISFITS = {
    "lines without a field 'messages'": {"conversations": []},
    "lines whose field 'messages' is not a list of messages": {"messages": "hello"},
    "lines whose field 'messages' has no message": {"messages": []},
    "lines whose field 'messages' has a message without the texts role and content": {"messages": [user(None)]},
    "lines whose field 'messages' has no answer": {"messages": [user("hello")]},
    "lines whose field 'messages' has no user and assistant in turn, after a system message or none": {
        "messages": [user("hello"), user("hello")]
    },
}


def test_records_that_do_not_fit_are_counted_by_reason_with_the_first_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = [{"messages": conversation} for conversation in conversations()[:20]]
    records = [*MISFITS.values(), {"messages": [{"role": "tool", "content": "x"}]}, *fitting]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, records)))
    manifest = prepare(options_for(tmp_path / "talk.jsonl", tmp_path / "out", val_fraction=0.5))
    assert manifest.skipped == dict.fromkeys(MISFITS, 1) | {list(MISFITS)[-1]: 2}
    assert all(place.startswith("talk.jsonl") for place in manifest.first_skipped.values())
    assert manifest.first_skipped["lines without a field 'messages'"].endswith("--field can be conversations")
    assert "count in the loss" in capsys.readouterr().out
    assert sum(split.documents for split in manifest.splits.values()) == 20


def test_without_a_conversation_there_is_one_message_and_no_folder_of_halves(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [user("hello")]}))
    with pytest.raises(DataError, match=r"no document in the input \(.*has no answer: 1, first in talk\.jsonl"):
        prepare(options_for(tmp_path / "talk.jsonl", tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "chat needs either --input PATH"),
        (["--input", "FILE", "--repo", "a/b"], "chat needs either --input PATH"),
        (["--input", "missing.jsonl"], "no such file or folder"),
        (["--input", "FILE", "--split", "test"], "chat with --input takes no --split"),
        (["--input", "FOLDER"], "no .jsonl, .json or .parquet"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "a.txt").write_text("no conversation")
    (tmp_path / "FILE").write_text("{}")
    given = [str(tmp_path / one) if one.isupper() else one for one in arguments]
    assert main(["prepare", "chat", *given, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_mask_is_found_wherever_data_is_checked(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(options_for(corpus, out))
    fingerprint, path = Manifest.read(out).fingerprint, out / "chat_train_000001.mask"
    whole = path.read_bytes()
    path.write_bytes(bytes([1 - whole[0]]) + whole[1:])
    findings = Findings()
    check_data(out, findings)
    (bad,) = [finding for finding in findings.all if finding.status == "BAD"]
    assert "chat_train_000001.mask has SHA-256" in bad.text
    for damaged, message in ((b"\2" + whole[1:], "expected 0 or 1"), (whole[:-1], "truncated"), (None, "is missing")):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(DataError, match=message), open_tokens(out, "train") as stream:
            stream.read_mask(0, stream.n_tokens)
    text = (out / "manifest.json").read_text().replace(Manifest.read(out).splits["train"].shards[1].mask_sha256, "0")  # type: ignore[arg-type]
    (out / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="fingerprint"):
        Manifest.read(out)
    assert fingerprint not in text.replace(fingerprint, "", 1)


def test_inspect_shows_the_share_and_reshard_refuses(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    split = prepare(options_for(corpus, out)).splits["train"]
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"count in the loss: {sum(masks(out, 'train')) / split.tokens:.1%}" in shown
    assert "│ <|im_start|>system" in shown and "<|im_start|> <|im_end|>" in shown
    for to in ("native", "nanogpt"):
        assert main(["reshard", str(out), str(tmp_path / to), "--to", to]) == 2
        assert "a mask says which of their tokens count" in capsys.readouterr().err
        assert not (tmp_path / to).exists()


def test_filters_and_an_own_field_apply_to_conversations(corpus: Path, tmp_path: Path) -> None:
    filters = Filters(min_chars=150)
    manifest = prepare(options_for(corpus, tmp_path / "out", filters=filters))
    assert 0 < manifest.skipped["documents shorter than 150 characters"] < len(conversations())
    with pytest.raises(UsageError, match="holds another preparation: its field is 'messages'"):
        prepare(options_for(corpus, tmp_path / "out", filters=filters, field="other"))
