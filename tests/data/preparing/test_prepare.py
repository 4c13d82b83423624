"""The verb prepare as a user runs it: the real command in a process of its own, killed for real, on real files."""

import contextlib
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import folder_bytes
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.base.files import folder_lock
from regpt2.commands.prepare import main
from regpt2.data.preparing import pack_shards
from regpt2.data.preparing import prepare as prepare_module
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.preparing.workers import run_tasks
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens, verify

COMMAND = [sys.executable, "-c", "import sys; from regpt2.commands.prepare import main; sys.exit(main(sys.argv[1:]))"]
SHARD_TOKENS = 150_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of 1 MB: documents of many lengths, some twice, some empty; about 12 worker's tasks."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    words = ["the", "of", "GPT-2", "naïve", "中文", "2024", "<|endoftext|>", "it's", "\n", "👍", "transformer"]
    for n in range(6):
        lines: list[str] = []
        while sum(map(len, lines)) < 1_000_000:
            text = " ".join(rng.choices(words, k=rng.choice([0, 3, 50, 500, 3000])))
            lines += [json.dumps({"text": text}, ensure_ascii=False)] * rng.choice([1, 1, 1, 2])
        (folder / f"{n}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "long.txt").write_text("A paragraph of text, and more of it.\n\n" * 80_000)
    (folder / "wide.txt").write_text("Ein Absatz, größer als ein Stück.\n\n" * 10_000, encoding="utf-16")
    (folder / "wide2.txt").write_bytes(b"\xfe\xff" + "Ein \ud800Dokument.\n\n".encode("utf-16-be", "surrogatepass"))
    (folder / "table.xls").write_text("not read")
    return folder


def options_for(corpus: Path, out: Path, **changes: object) -> PrepareOptions:
    values = {"workers": 1, "tokenizer": "gpt2", "shard_tokens": SHARD_TOKENS} | changes
    return PrepareOptions(dataset="text_files", out=out, input=corpus, **values)  # type: ignore[arg-type]


def command_for(corpus: Path, out: Path, workers: int) -> list[str]:
    sizes = ["--shard-tokens", str(SHARD_TOKENS), "--workers", str(workers)]
    return [*COMMAND, "text_files", "--input", str(corpus), "--out", str(out), *sizes]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder as one worker makes it without interruption."""
    out = tmp_path_factory.mktemp("reference") / "out"
    prepare(options_for(corpus, out))
    return folder_bytes(out)


def independent_tokens(reference: dict[str, bytes], split: str) -> list[int]:
    """All tokens of a split's shards, from the description of the format alone."""
    tokens: list[int] = []
    for name in sorted(name for name in reference if f"_{split}_" in name):
        data = reference[name]
        magic, version, count = struct.unpack_from("<3i", data)
        assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
        tokens += struct.unpack_from(f"<{count}H", data, 1024)
    return tokens


def test_shards_hold_every_token_of_every_document_in_order(corpus: Path, reference: dict[str, bytes]) -> None:
    gpt2 = load_tokenizer("gpt2")
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for path in sorted(corpus.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            text = json.loads(line)["text"]
            if text.strip():
                in_val = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.05 * 2**64
                expected["val" if in_val else "train"] += [50256, *gpt2.encode(text)]
    pieces = ""
    for split in ("train", "val"):
        got = independent_tokens(reference, split)
        assert expected[split]
        assert got[: len(expected[split])] == expected[split]
        pieces += gpt2.decode(token for token in got[len(expected[split]) :] if token != 50256)
    whole = (corpus / "long.txt").read_text() + (corpus / "wide.txt").read_text(encoding="utf-16")
    whole += "Ein \ufffdDokument.\n\n"
    assert sorted(pieces.split("\n\n")) == sorted(whole.split("\n\n"))


def test_manifest_says_what_the_shards_hold(corpus: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in reference.items():
        (tmp_path / name).write_bytes(data)
    manifest = Manifest.read(tmp_path)
    assert verify(tmp_path) == []
    for name, split in manifest.splits.items():
        tokens = independent_tokens(reference, name)
        assert (split.tokens, split.documents) == (len(tokens), tokens.count(50256))
        assert [shard.tokens for shard in split.shards[:-1]] == [SHARD_TOKENS] * (len(split.shards) - 1)
        with open_tokens(tmp_path, name) as stream:
            assert stream.read(0, stream.n_tokens).tolist() == tokens
    assert len(manifest.splits["train"].shards) > 5
    lines = (line for path in corpus.glob("*.jsonl") for line in path.read_text(encoding="utf-8").split("\n"))
    empty = sum(not json.loads(line)["text"].strip() for line in lines)
    damaged, unread = "files kept with invalid UTF-16 replaced", "files of a kind not read (.xls)"
    assert manifest.skipped == {"documents empty": empty, damaged: 1, unread: 1}
    assert manifest.first_skipped == {"documents empty": "0.jsonl", damaged: "wide2.txt", unread: "table.xls"}
    assert (manifest.source, manifest.tokenizer) == ("corpus", "gpt2")
    assert set(reference) == {"manifest.json", *(shard.file for shard in manifest.shards)}


def test_two_workers_write_the_same_bytes_as_one(corpus: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    done = subprocess.run(command_for(corpus, tmp_path / "out", 2), capture_output=True, text=True, check=True)
    assert folder_bytes(tmp_path / "out") == reference
    assert "(the rest, as expected)" in done.stdout
    assert "documents empty" in done.stdout
    assert str(tmp_path) not in reference["manifest.json"].decode()


@pytest.mark.slow  # `make faults` kills it too
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    rng, out, kills = random.Random(1), tmp_path / "out", 0
    for attempt in range(40):
        workers = 1 + attempt % 2
        process = subprocess.Popen(
            command_for(corpus, out, workers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=rng.uniform(0.35, 0.8) * (1 + attempt / 10))
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if not (out / "manifest.json").exists():
                with pytest.raises(DataError):
                    open_tokens(out, "train")
    assert process.returncode == 0
    assert kills >= 2, "it was too quick to be killed"
    assert folder_bytes(out) == reference


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


@pytest.mark.seconds
def test_stopped_at_every_write_it_ends_with_the_same_bytes(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_shard, real_ledger, real_unlink, out = (
        pack_shards.write_shard,
        pack_shards.Ledger.write,
        Path.unlink,
        tmp_path / "out",
    )
    stops = 0

    def stop_after(real: object, chance: float) -> object:
        def act(*args: object, **named: object) -> object:
            result = real(*args, **named)  # type: ignore[operator]
            if rng.random() < chance:
                raise Killed
            return result

        return act

    rng = random.Random(2)
    for _ in range(200):
        with monkeypatch.context() as patch:
            patch.setattr(pack_shards, "write_shard", stop_after(real_shard, 0.2))
            patch.setattr(pack_shards.Ledger, "write", stop_after(real_ledger, 0.1))
            patch.setattr(Path, "unlink", stop_after(real_unlink, 0.05))
            try:
                prepare(options_for(corpus, out))
                break
            except Killed:
                stops += 1
    assert stops > 5
    prepare(options_for(corpus, out))
    assert folder_bytes(out) == reference


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(corpus: Path, tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        command_for(corpus, tmp_path / "out", 2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not list((tmp_path / "out" / ".parts").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(timeout=20)
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _session(process.pid)


def _session(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def _die(task: int, report: object) -> None:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def _start_mortal() -> object:
    return _die


def _run_out_of_memory(task: int, report: object) -> None:
    raise MemoryError


def _start_hungry() -> object:
    return _run_out_of_memory


@pytest.mark.process
@pytest.mark.parametrize(("start", "message"), [(_start_mortal, "exit code -9"), (_start_hungry, "out of memory")])
def test_a_worker_that_dies_ends_the_command_with_a_message(start: object, message: str) -> None:
    with pytest.raises(Problem, match=message):
        list(run_tasks(range(5), start, 2))  # type: ignore[arg-type]


def test_a_finished_folder_is_left_alone_and_another_preparation_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for n in range(40):
        (source / f"{n}.txt").write_text(f"document {n}")
    out = tmp_path / "out"
    first = prepare(options_for(source, out, tokenizer="bytes"))
    before = folder_bytes(out)
    assert prepare(options_for(source, out, tokenizer="bytes")) == first
    assert "complete already" in capsys.readouterr().out
    for change, message in (
        ({"tokenizer": "gpt2"}, "its tokenizer is 'bytes', this command's is 'gpt2'"),
        ({"tokenizer": "bytes", "val_fraction": 0.2}, "its val_fraction is '0.05', this command's is '0.2'"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare(options_for(source, out, **change))
    (source / "0.txt").write_text("a longer document")
    with pytest.raises(UsageError, match="its revision is"):
        prepare(options_for(source, out, tokenizer="bytes"))
    assert folder_bytes(out) == before


def test_inputs_that_change_on_the_way_are_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for n in range(40):
        (source / f"{n}.txt").write_text(f"document {n}")
    real = prepare_module._encode_and_pack

    def encode_then_touch(*args: object) -> object:
        packer = real(*args)  # type: ignore[arg-type]
        os.utime(source / "3.txt", ns=(1, 1))
        return packer

    monkeypatch.setattr(prepare_module, "_encode_and_pack", encode_then_touch)
    for _ in range(2):  # at the end of this run, and at the beginning of the next
        with pytest.raises(DataError, match=r"have changed .* remove the folder and run the command again"):
            prepare(options_for(source, tmp_path / "out", tokenizer="bytes"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], r"no document in the input \(documents empty: 1, first in 0\.txt\)"),
        (["1"], "the only document is one character"),
    ],
)
def test_an_empty_split_says_how_to_mend_and_leaves_the_folder_free(
    tmp_path: Path, texts: list[str], message: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for n, text in enumerate(texts):
        (source / f"{n}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(options_for(source, tmp_path / "out", tokenizer="bytes"))
    assert folder_bytes(tmp_path / "out") == {}


def test_wrong_options_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for change, message in (
        ({"val_fraction": 0.0}, "must be above 0 and at most 0.5"),
        ({"shard_tokens": 0}, "--shard-tokens 0 must be"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"tokenizer": "gtp2"}, "did you mean 'gpt2'"),
        ({"tokenizer": "bytes", "vocab": tmp_path / "a.txt"}, "bytes has no vocabulary"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare(options_for(tmp_path, tmp_path.parent / "out", **change))
    with pytest.raises(UsageError, match="must not lie inside --input"):
        prepare(options_for(tmp_path, tmp_path / "out"))
    with pytest.raises(UsageError, match="did you mean 'tiny_shakespeare'"):
        main(["tiny_shakespere", "--out", str(tmp_path.parent / "out")])
    assert not (tmp_path.parent / "out").exists()


def test_folders_in_use_or_with_other_tokens_are_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("text")
    with folder_lock(out), pytest.raises(UsageError, match="in use by process"):
        prepare(options_for(source, out, tokenizer="bytes"))
    (out / "fineweb_train_000001.bin").touch()
    with pytest.raises(UsageError, match="already holds tokens that this command did not write"):
        prepare(options_for(source, out, tokenizer="bytes"))


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.txt"
    source.write_text("text" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 100})())
    with pytest.raises(Problem, match=r"preparing 0\.0 MB of text needs .* free some space"):
        prepare(options_for(source, tmp_path / "out", tokenizer="bytes"))


def test_help_lists_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("text_files", "tiny_shakespeare", "python_library", "--val-fraction"):
        assert name in shown


def test_prepare_does_not_import_torch() -> None:
    code = "import sys, regpt2.commands.prepare; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_half_surrogates_are_repaired_and_counted(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot hold."""
    lines = [f'{{"text": "number {i}, half a pair: \\ud800"}}' for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = PrepareOptions(
        dataset="text_files",
        input=tmp_path / "in.jsonl",
        out=tmp_path / "out",
        tokenizer="bytes",
        workers=1,
        val_fraction=0.5,
    )
    manifest = prepare(options)
    assert manifest.skipped == {"documents kept with half surrogate pairs replaced": 20}
    assert sum(split.documents for split in manifest.splits.values()) == 20


def test_what_was_left_out_or_repaired_is_named_in_the_summary_and_in_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "one.txt").write_bytes(b" ")
    (source / "table.xls").write_text("text")
    (source / "loop").symlink_to(source)
    command = ["text_files", "--input", str(source), "--tokenizer", "bytes", "--workers", "1", "--out"]
    with pytest.raises(DataError, match="there is no document in the input") as told:
        main([*command, str(tmp_path / "out")])
    (source / "one.txt").write_bytes(b"caf\xe9")
    for n in range(40):
        (source / f"two{n}.TXT").write_bytes(b"na\xefve %d" % n)
    main([*command, str(tmp_path / "out")])
    shown = capsys.readouterr().out
    for said in (str(told.value), shown):
        assert "files of a kind not read (.xls): 1, first in table.xls" in said
        assert "folders behind a link: 1, first in loop" in said
        assert "nothing was skipped" not in said
    assert "documents kept with invalid UTF-8 replaced: 41, first in one.txt" in shown
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.first_skipped["documents kept with invalid UTF-8 replaced"] == "one.txt"


def test_text_without_a_mark_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("fine")
    (source / "b.txt").write_text("from Windows", encoding="utf-16-le")
    with pytest.raises(DataError, match=r"b\.txt looks like UTF-16 without a byte-order mark.*iconv -f UTF-16LE"):
        prepare(options_for(source, tmp_path / "out", tokenizer="bytes"))
    assert not (tmp_path / "out").exists()


def test_a_manifest_without_first_places_is_read_and_one_of_other_reasons_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(40)) + "{\n")
    written = prepare(options_for(tmp_path / "in.jsonl", tmp_path / "out", tokenizer="bytes"))
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    first = content.pop("first_skipped")
    assert first == written.first_skipped != {}
    path.write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "out") == replace(written, first_skipped={})
    for wrong in ({"another": "a.txt"}, {next(iter(first)): 5}, []):
        path.write_text(json.dumps(content | {"first_skipped": wrong}))
        with pytest.raises(DataError, match="first_skipped"):
            Manifest.read(tmp_path / "out")
