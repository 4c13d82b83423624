"""`regpt2 inspect`: figures against plain counting, text and differences against folders written by hand."""

import json
import statistics
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Run, write_data
from regpt2.cli import main
from regpt2.data.checks import counts, excerpts
from regpt2.data.checks import look as look_module
from regpt2.data.checks.counts import count_tokens
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import open_tokens, write_shard

GPT2_EOT, BYTES_EOT = 50256, 256


def llmc(folder: Path, shards: list[list[int]], split: str = "train") -> Path:
    """A folder of llm.c's shards, written from the format's description; GPT-2's ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, ids in enumerate(shards):
        head = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
        (folder / f"made_{split}_{n:06d}.bin").write_bytes(head + struct.pack(f"<{len(ids)}H", *ids))
    return folder


def prepared(folder: Path, shards: list[list[int]], *, documents: int | None = None, revision: str = "1") -> Path:
    """A prepared folder of byte tokens with a train split alone."""
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer("bytes")
    records = tuple(
        write_shard(folder / f"made_train_{n:06d}.bin", len(ids), [np.array(ids, dtype=np.uint16)])
        for n, ids in enumerate(shards)
    )
    stream = [token for ids in shards for token in ids]
    n_text = sum(token < 256 for token in stream)
    n_documents = stream.count(BYTES_EOT) if documents is None else documents
    splits = {"train": Split(n_documents, len(stream), n_text, records)}
    Manifest("made", "by a test", revision, "bytes", tokenizer.fingerprint, 257, {"field": "text"}, splits,
             {"documents empty": 3}).write(folder)  # fmt: skip
    return folder


def byte_ids(*documents: str) -> list[int]:
    return [token for text in documents for token in (BYTES_EOT, *text.encode())]


def cut(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code, and everything said."""
    capsys.readouterr()
    code = main(["inspect", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


def figures(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> dict:
    """What --json says."""
    out = folder.parent / "found.json"
    assert run(capsys, folder, "--json", out, *arguments)[0] == 0
    return json.loads(out.read_text())


def documents_by_hand(ids: list[int], eot: int) -> tuple[int, list[int]]:
    """(tokens before the first document, length of each), by walking from token to token."""
    if ids[0] != eot and ids[-1] == eot:  # end of text comes last
        head, lengths, under_way = 0, [], 0
        for token in ids:
            under_way += 1
            if token == eot:
                lengths.append(under_way)
                under_way = 0
        return head, lengths
    head, lengths = 0, []
    for token in ids:
        if token == eot:
            lengths.append(1)
        elif lengths:
            lengths[-1] += 1
        else:
            head += 1
    return head, lengths


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.sampled_from([0, 1, 2, 50255, GPT2_EOT]), min_size=1, max_size=60),
    size=st.integers(1, 20),
    stretch=st.integers(1, 9),
)
def test_counts_equal_plain_counting(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, ids: list[int], size: int, stretch: int
) -> None:
    """However the split is cut into files and read."""
    monkeypatch.setattr(counts, "STRETCH_TOKENS", stretch)
    with open_tokens(llmc(tmp_path_factory.mktemp("made"), cut(ids, size)), "train") as stream:
        found = count_tokens(stream, GPT2_EOT)
    head, lengths = documents_by_hand(ids, GPT2_EOT)
    assert found.is_whole and found.n_read == len(ids)
    assert {token: int(found.ids[token]) for token in set(ids)} == Counter(ids) and found.ids.sum() == len(ids)
    assert found.n_used == len(set(ids))
    assert (found.head, found.lengths, found.n_documents) == (head, Counter(lengths), ids.count(GPT2_EOT))
    assert found.most_common(9) == sorted(Counter(ids).items(), key=lambda pair: (-pair[1], pair[0]))
    buckets = Counter(2 ** (len(f"{length:b}") - 1) for length in lengths)
    assert {first: documents for first, documents in found.histogram() if documents} == buckets
    if lengths:
        ranked = sorted(lengths)
        assert found.length_at(50) == statistics.median_low(ranked)
        assert found.length_at(95) == next(x for x in ranked if 100 * sum(y <= x for y in ranked) >= 95 * len(ranked))
        assert (found.length_at(100), found.length_summary()["mean"]) == (
            ranked[-1],
            pytest.approx(statistics.mean(ranked)),
        )


def test_a_sample_takes_evenly_spread_stretches_and_scales_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counts, "STRETCH_TOKENS", 100)
    monkeypatch.setattr(look_module, "STRETCH_TOKENS", 100)
    ids = [token for n in range(400) for token in (GPT2_EOT, *[n // 10] * 9)]  # 400 documents of 10 tokens
    folder = llmc(tmp_path / "made", cut(ids, 333))
    found = figures(capsys, folder, "--sample", 5)["counts"]["train"]
    seen = [token for start in (0, 800, 1600, 2400, 3200) for token in ids[start : start + 100]]
    assert (found["tokens"], found["tokens_counted"], found["documents"]) == (4000, 500, 400)
    assert {row["id"]: row["times"] for row in found["most_common"]} == Counter(seen)
    assert found["documents_seen_whole"] == 45  # nine of each ten: where the tenth ends is not in the stretch
    assert found["length"] == {"median": 10, "mean": 10, "percent_95": 10, "longest": 10}
    _, said = run(capsys, folder, "--sample", 5)
    assert "a sample of 500 of 4,000 tokens counted" in said and "about 400 documents, 45 of them seen whole" in said

    monkeypatch.setattr(look_module, "MOST_COUNTED", 3999)
    monkeypatch.setattr(look_module, "DEFAULT_STRETCHES", 3)
    assert figures(capsys, folder)["counts"]["train"]["tokens_counted"] == 300, "a large split is sampled by itself"
    assert figures(capsys, folder, "--all")["counts"]["train"]["tokens_counted"] == 4000
    assert figures(capsys, folder, "--sample", 40)["counts"]["train"]["tokens_counted"] == 4000


def test_manifest_and_counts_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = byte_ids("aaaa bb", "c" * 100, "é\n\tn")
    folder = prepared(tmp_path / "made", cut(ids, 50))
    code, said = run(capsys, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert code == 0
    for part in (manifest["fingerprint"], "made, by a test", "documents empty: 3", "field text", "bytes, 257 ids"):
        assert part in said
    assert "3 documents; each begins with end of text" in said
    assert "median 8, mean 38, 95 % at most 101, longest 101" in said
    assert "'c'" in said and "'\\n'" in said and "b'\\xc3'" in said and "'<|endoftext|>'" in said
    assert max(map(len, said.splitlines())) <= 100
    found = figures(capsys, folder)
    assert found["manifest"]["fingerprint"] == manifest["fingerprint"]
    assert found["manifest"]["splits"] == manifest["splits"]
    assert found["counts"]["train"]["most_common"][0] == {"id": 99, "token": "'c'", "times": 100}
    assert found["excerpts"][0]["ids"] == ids[:64]


def test_documents_that_the_manifest_does_not_count_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = byte_ids("one", "two")
    assert "but the manifest says 5 documents" in run(capsys, prepared(tmp_path / "made", [ids], documents=5))[1]
    assert "but the manifest" not in run(capsys, prepared(tmp_path / "right", [ids]))[1]


def test_a_split_that_begins_in_the_middle_of_a_document_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "made", [[*b"the end of one", *byte_ids("whole", "cut")]])
    _, said = run(capsys, folder)
    assert "2 documents; the first 14 tokens are the end of one that began before this split" in said
    assert figures(capsys, folder)["counts"]["train"]["continued_tokens"] == 14
    cut_at_a_beginning = prepared(tmp_path / "cut", [[*b"rest", *byte_ids("whole", "")]])
    found = figures(capsys, cut_at_a_beginning)["counts"]["train"]
    assert (found["end_of_text"], found["continued_tokens"], found["documents"]) == ("first", 4, 2)


def test_end_of_text_after_each_document_and_none_at_all_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hello, world = load_tokenizer("gpt2").encode("hello"), load_tokenizer("gpt2").encode(" world of text")
    nanogpt = tmp_path / "nanogpt"
    nanogpt.mkdir()
    ids = [*hello, GPT2_EOT, *world, GPT2_EOT]
    (nanogpt / "train.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    (nanogpt / "val.bin").write_bytes(struct.pack("<2H", *world[:2]))
    _, said = run(capsys, nanogpt)
    assert "2 documents; end of text ends each one" in said and "no manifest.json" in " ".join(said.split())
    assert "no end of text (id 50256) among them" in said  # val
    first, second = figures(capsys, nanogpt, "--split", "train")["excerpts"][0]["pieces"]
    assert (first["text"], first["begins_document"], first["position"]) == ("hello", True, 0)
    assert (second["text"], second["begins_document"], second["position"]) == (" world of text", True, len(hello) + 1)
    rest = figures(capsys, nanogpt, "--at", len(hello) + 1)["excerpts"][0]["pieces"]
    assert [piece["begins_document"] for piece in rest] == [True], "the end of text before it is known"
    middle = figures(capsys, nanogpt, "--at", len(hello) + 2)["excerpts"][0]["pieces"]
    assert [piece["begins_document"] for piece in middle] == [False]


def test_text_is_shown_at_any_position_across_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = byte_ids("the first", "second", "and the third document")
    folder = prepared(tmp_path / "made", cut(ids, 7))
    for at in range(len(ids)):
        shown = figures(capsys, folder, "--at", at, "--tokens", 12)["excerpts"][0]
        assert shown["ids"] == ids[at : at + 12]
        assert (
            "".join(piece["text"] for piece in shown["pieces"])
            == bytes(token for token in ids[at : at + 12] if token != BYTES_EOT).decode()
        )
        begins = [piece["position"] for piece in shown["pieces"] if piece["begins_document"]]
        assert begins == [n for n in range(at, min(at + 12, len(ids))) if ids[n] == BYTES_EOT]
        assert (shown["file"], shown["file_position"]) == (f"made_train_{at // 7:06d}.bin", at % 7)
    code, said = run(capsys, folder, "--at", 2, "--at", 12, "--tokens", 9)
    assert code == 0 and "counted" not in said
    assert "train from token 2: made_train_000000.bin, its token 2" in said
    assert "train from token 12: made_train_000001.bin, its token 5" in said
    assert "  │ he first\n  ├─ token 10: a document begins\n" in said
    assert "the split ends" not in said and "the split ends" in run(capsys, folder, "--at", len(ids) - 1)[1]


def test_gpt2_text_with_a_cut_character_and_terminal_escapes_is_safe_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "plain \x1b[31mred\x07 \u202eright to left\r and <|endoftext|> as text, \u65e5\u672c" * 3
    ids = [GPT2_EOT, *load_tokenizer("gpt2").encode(text)]
    folder = llmc(tmp_path / "made", [ids])
    code, said = run(capsys, folder, "--tokens", len(ids))
    assert code == 0
    assert not set(said) & set("\x1b\x07\r\u202e")
    assert "\\x1b[31mred\\x07" in said and "\\u202e" in said and said.count("a document begins") == 1
    everywhere = [word for at in range(len(ids)) for word in ("--at", at)]
    code, said = run(capsys, folder, "--tokens", 1, *everywhere)
    assert code == 0 and not set(said) & set("\x1b\x07\r\u202e") and "\ufffd" in said


def against(capsys: pytest.CaptureFixture[str], a: Path, b: Path, *more: object) -> tuple[int, str, dict]:
    out = a.parent / "against.json"
    code, said = run(capsys, a, "--against", b, "--json", out, *more)
    return code, said, json.loads(out.read_text())


def test_equal_tokens_in_other_shards_or_another_format_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(excerpts, "STRETCH_TOKENS", 5)
    ids = [GPT2_EOT, *load_tokenizer("gpt2").encode("some text that is cut in several ways")]
    a = llmc(tmp_path / "a", cut(ids, 3))
    b = tmp_path / "b"
    b.mkdir()
    np.save(b / "text_train_000000.npy", np.array(ids, dtype=np.uint16))
    code, said, found = against(capsys, a, b)
    assert code == 0 and found["equal"] and found["splits"] == {"train": {"equal": True}}
    assert f"train: equal, {len(ids)} tokens, in 3 files and in 1 file" in said and "Their tokens are equal." in said
    other = prepared(tmp_path / "other", [byte_ids("a", "b")])
    code, said, _ = against(capsys, other, prepared(tmp_path / "cut", cut(byte_ids("a", "b"), 1), revision="2"))
    assert code == 0 and "Their tokens are equal." in said
    assert "splits.train.shards" in said and "revision" in said and "dataset" not in said


@pytest.mark.parametrize("stretch", [1, 4, 1000])
@pytest.mark.parametrize("at", [0, 1, 4, 9, 10, 15])
def test_the_first_difference_is_found_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, at: int, stretch: int
) -> None:
    monkeypatch.setattr(excerpts, "STRETCH_TOKENS", stretch)
    ids = byte_ids("first one", "later")  # the second document begins at token 10
    changed = [*ids[:at], ord("#"), *[ord("?")] * (len(ids) - at - 1)]
    code, said, found = against(
        capsys, prepared(tmp_path / "a", cut(ids, 6)), prepared(tmp_path / "b", cut(changed, 100)), "--tokens", 8
    )
    split = found["splits"]["train"]
    assert code == 1 and not found["equal"]
    assert (split["position"], split["document"]) == (at, ids[: at + 1].count(BYTES_EOT))
    assert f"train: equal up to token {at}, in document {split['document']} of A" in said
    assert f"├─ token {at}: the first difference" in said and "Their tokens are different." in said
    start = max(0, at - 4)
    assert split["a"]["ids"] == ids[start : start + 8] and split["b"]["ids"] == changed[start : start + 8]
    assert split["a"]["file"] == f"made_train_{start // 6:06d}.bin"


@pytest.mark.parametrize(("shorter", "longer"), ["AB", "BA"])
def test_one_that_is_the_beginning_of_the_other_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shorter: str, longer: str
) -> None:
    ids = byte_ids("first one", "later")
    folders = {
        shorter: prepared(tmp_path / "short", [ids[:12]]),
        longer: prepared(tmp_path / "long", cut(ids, 5)),
    }
    code, said, found = against(capsys, folders["A"], folders["B"])
    assert code == 1 and found["splits"]["train"]["position"] == 12
    assert f"train: {shorter} is the beginning of {longer}, which has 4 tokens more after these 12" in said
    assert f"token 12: {shorter} has ended" in said


def test_another_tokenizer_and_a_missing_split_make_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [*b"only low ids"]
    code, said, found = against(capsys, llmc(tmp_path / "a", [ids]), prepared(tmp_path / "b", [ids]))
    assert code == 1 and found["splits"]["train"]["equal"] and not found["equal"]
    assert found["fields"]["tokenizer"] == ["gpt2", "bytes"] and "tokenizer" in said
    both = llmc(llmc(tmp_path / "both", [ids]), [ids], "val")
    code, said, found = against(capsys, both, tmp_path / "a")
    assert code == 1 and "val: only A has it" in said and found["splits"]["train"]["equal"]
    assert against(capsys, both, tmp_path / "a", "--split", "train")[0] == 0


def test_verify_finds_damage_and_stops_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_data(tmp_path / "data")
    code, said = run(capsys, folder, "--verify", "--split", "val")
    assert code == 0 and "none bad" in said and "val: all 2,000 tokens counted" in said
    shard = folder / "tiny_train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[1026] ^= 1
    shard.write_bytes(content)
    code, said = run(capsys, folder, "--verify")
    assert code == 1 and f"BAD  {shard}" in said and "counted" not in said
    assert run(capsys, folder)[0] == 0, "without --verify hashes are not looked at"
    code, said = run(capsys, write_data(tmp_path / "good"), "--verify", "--against", folder)
    assert code == 1 and "BAD" in said and "Their tokens" not in said


def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "made", [byte_ids("text")])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / ".prepare.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for arguments, code, message in [
        ([tmp_path / "nowhere"], 2, "there is no such data folder"),
        ([folder, "--against", tmp_path / "nowhere"], 2, "there is no such data folder"),
        ([folder, "--at", 5], 2, "--at 5 is outside the train split of 5 tokens: give 0 to 4."),
        ([folder, "--at=-1"], 2, "--at -1 is outside"),
        ([folder, "--tokens", 0], 2, "--tokens 0 must be at least 1"),
        ([folder, "--sample", 0], 2, "--sample 0 must be at least 1"),
        ([folder, "--sample", 1, "--all"], 2, "exclude each other"),
        ([folder, "--against", folder, "--at", 1], 2, "leave out --at"),
        ([folder, "--json", tmp_path], 2, "must be a file"),
        ([folder, "--split", "val"], 1, "no val split; it has: train"),
        ([unfinished], 1, "its preparation is not finished"),
        ([tmp_path / "empty"], 1, "no train tokens here"),
    ]:
        got, said = run(capsys, *arguments)
        assert (got, said.count("\n")) == (code, 1), said
        assert message in said


def test_an_unknown_split_is_refused_and_the_command_itself_runs(
    tmp_path: Path, regpt2_process: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path / "made", [byte_ids("text")])
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(folder), "--split", "test"])
    assert "train" in capsys.readouterr().err
    done = regpt2_process("inspect", folder)
    assert done.returncode == 0 and "1 document; each" in done.stdout
