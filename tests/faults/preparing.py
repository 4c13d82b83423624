"""Preparation of data (15, 17). In: a bench; out: nasty text counted to the byte, killed runs equal byte for byte?"""

import gzip
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import trial
from suite import Bench, Fault, Outcome

from regpt2 import cli
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens

MAX_RSS_BYTES, MAX_S = 512 << 20, 30.0


def nasty_documents(bench: Bench) -> Outcome:
    """Text of every bad kind: every byte accounted for, in bounded memory and time."""
    outcome = Outcome()
    for what, write in NASTY.items() if bench.planned >= N_NASTY else list(NASTY.items())[: bench.planned]:
        folder, source = bench.new("data"), bench.new("text")
        source.mkdir()
        texts = write(source)
        code, said = _prepare(bench, source, folder)
        wrong = [f"exit code {code}: {said[-300:]}"] if code or "Traceback" in said else _accounted_for(folder, texts)
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
    if bench.planned >= N_NASTY:
        _nothing_at_all(bench, outcome)
        _large(bench, outcome, 10 if bench.lane == "full" else 1)
    return outcome


def _large(bench: Bench, outcome: Outcome, factor: int) -> None:
    """Much text, through the real command: bounded memory and time."""
    worst, slowest, source, folder = 0, 0.0, bench.new("text"), bench.new("data")
    for what, write in LARGE.items():
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        source.mkdir()
        texts = write(source, factor)
        started_at, rss_bytes = time.monotonic(), 0
        with open(bench.new("log"), "w") as output:
            process = bench.start(*_command(source, folder, 1), stdout=output, stderr=output)
            while process.poll() is None:
                rss_bytes = max(rss_bytes, _largest_memory(process.pid))
                time.sleep(0.01)
        elapsed_s = time.monotonic() - started_at
        wrong = _accounted_for(folder, texts) if process.returncode == 0 else [f"exit code {process.returncode}"]
        wrong += [f"{rss_bytes >> 20} MB"] if rss_bytes > MAX_RSS_BYTES else []
        wrong += [f"{elapsed_s:.1f} s"] if elapsed_s > MAX_S * factor else []
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
        worst, slowest = max(worst, rss_bytes), max(slowest, elapsed_s)
    outcome.remark = f"{worst >> 20} MB and {slowest:.1f} s at most"


def _command(source: Path, folder: Path, workers: int) -> list[str]:
    options = ["--input", source, "--out", folder, "--workers", workers, "--tokenizer", "bytes"]
    return ["prepare", "text_files", *map(str, options), "--shard-tokens", "1000000", "--val-fraction", "0.2"]


def _prepare(bench: Bench, source: Path, folder: Path) -> tuple[int, str]:
    """Forked, with one worker: exit code, and what it said."""
    process = bench.fork(lambda: cli.main(_command(source, folder, 1)))
    return process.wait(), process.said


def _largest_memory(pid: int) -> int:
    """The most memory that a process has had since its program began; 0 if it is gone."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return 1024 * int(found[1])
    return 0


def _accounted_for(folder: Path, texts: list[str]) -> list[str]:
    """Documents and bytes in = documents and tokens out, in the manifest and in the shards themselves."""
    manifest = Manifest.read(folder)
    eot = load_tokenizer("bytes").eot
    wrong, got = [], b""
    for name, split in manifest.splits.items():
        with open_tokens(folder, name) as tokens:
            ids = tokens.read(0, tokens.n_tokens)
        got += ids[ids != eot].astype(np.uint8).tobytes()
        counts = (split.documents, split.tokens, split.text_bytes)
        found = (int((ids == eot).sum()), len(ids), int((ids != eot).sum()))
        wrong += [] if counts == found else [f"{name}: the manifest says {counts}, the shards hold {found}"]
    kept = b"".join(text.encode() for text in texts)
    if not np.array_equal(_histogram(got), _histogram(kept)):
        wrong.append(f"{len(kept):,} bytes went in, {len(got):,} came out")
    return wrong


def _histogram(data: bytes) -> np.ndarray[Any, Any]:
    """How often each byte occurs: the splits have taken the documents apart, so their order is not compared."""
    return np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)


def _with_fill(write: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """The nasty file among plain ones, so that both splits have documents; returns all texts that should come out."""

    def written(source: Path) -> list[str]:
        texts = [f"a plain document, number {n}\n" for n in range(60)]
        for n, text in enumerate(texts):
            (source / f"plain-{n:02d}.txt").write_text(text)
        return texts + write(source)

    return written


def _raw(data: bytes, *texts: str, name: str = "nasty.txt") -> Callable[[Path], list[str]]:
    def write(source: Path) -> list[str]:
        (source / name).write_bytes(data)
        return list(texts)

    return _with_fill(write)


def _json_lines(*records: str, texts: list[str]) -> Callable[[Path], list[str]]:
    return _raw("\n".join(records).encode(), *texts, name="nasty.jsonl")


def _tiny(source: Path, factor: int) -> list[str]:
    texts = [f"{number:x}" for number in range(50_000 * factor)]
    (source / "tiny.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def _bomb(source: Path, factor: int) -> list[str]:
    """Little on the disk, much in memory, for who unpacks it whole."""
    text = "0" * (40_000_000 * factor)
    (source / "bomb.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    (source / "other.jsonl").write_text(json.dumps({"text": text[: 4_000_000 * factor]}) + "\n")
    return [text, text[: 4_000_000 * factor]]


_BAD = b"caf\xe9 \xff\xfe \xc3\x28 \xed\xa0\x80 end"
_LONG = "x" * 5_000_000
_WORDS = "a document longer than three shards, with lines\n\n" * 65_000
NASTY: dict[str, Callable[[Path], list[str]]] = {
    "invalid UTF-8": _raw(_BAD, _BAD.decode("utf-8", "replace")),
    "NUL and controls": _raw(b"a\x00b\x1b[31m\x7f\x00", "a\x00b\x1b[31m\x7f\x00"),
    "lone surrogates": _json_lines('{"text": "a\\ud800b"}', '{"text": "\\udfff"}', texts=["a\ufffdb", "\ufffd"]),
    "empty and blank": _json_lines('{"text": ""}', '{"text": " \\n\\t"}', '{"text": "x"}', texts=["x"]),
    "an empty file": _raw(b""),
    "a byte-order mark": _raw(b"\xef\xbb\xbftext", "text"),
    "5 MB without a space": _raw(_LONG.encode(), _LONG),
    "5 MB in one record": _json_lines(json.dumps({"text": _LONG}), texts=[_LONG]),
    "longer than three shards": _raw(_WORDS.encode(), _WORDS),
    "the end-of-text marker as text": _raw(b"a<|endoftext|>b", "a<|endoftext|>b"),
    "broken records": _json_lines(
        '{"text": 5}', "{", "[]", '{"other": "x"}', '{"text": "good"}', "null", texts=["good"]
    ),
}
LARGE: dict[str, Callable[[Path, int], list[str]]] = {"tiny documents": _tiny, "a gzip bomb": _bomb}
N_NASTY, N_LARGE = len(NASTY) + 1, len(LARGE)


def _nothing_at_all(bench: Bench, outcome: Outcome) -> None:
    """No document: an error that says so, and no data folder that looks finished."""
    folder, source = bench.new("data"), bench.new("text")
    source.mkdir()
    (source / "empty.txt").write_text("")
    code, said = _prepare(bench, source, folder)
    ok = (
        code == 1
        and "Traceback" not in said
        and not (folder / "manifest.json").exists()
        and not list(folder.glob("*.bin"))
    )
    outcome.fired(ok, f"no documents: exit code {code}: {said[-300:]}")


N_BYTES = 8_000_000
SPAN_S = 2.0  # about what the whole preparation takes


def killed_preparation(bench: Bench) -> Outcome:
    """kill -9 at random times, with one and two workers by turns; the end is the same folder, byte for byte."""
    outcome = Outcome()
    source = trial.write_text(bench.folder / "text" / "a.txt", N_BYTES).parent
    whole = bench.new("whole")
    code, said = _prepare(bench, source, whole)
    assert code == 0, said
    expected = trial.hashes(whole)
    outcome.same(_prepared_by_command(bench, source, bench.new("two"), 2), expected, "two workers")
    while outcome.injected < bench.planned:
        folder, workers = bench.new("data"), 1 + outcome.injected % 2
        while outcome.injected < bench.planned and _killed(bench, source, folder, workers):
            wrong = _partial(folder)
            outcome.fired(not wrong, "; ".join(wrong))
        outcome.same(
            _prepared_by_command(bench, source, folder, 3 - workers), expected, f"{workers}, {3 - workers} workers"
        )
        shutil.rmtree(folder)
    outcome.remark = f"{len(expected)} files of {sum(path.stat().st_size for path in whole.iterdir()) / 1e6:.0f} MB"
    return outcome


def _prepared_by_command(bench: Bench, source: Path, folder: Path, workers: int) -> dict[str, str]:
    """The real command, to its end; what it leaves."""
    process = bench.start(*_command(source, folder, workers))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, (output + errors)[-1500:]
    return trial.hashes(folder)


def _killed(bench: Bench, source: Path, folder: Path, workers: int) -> bool:
    """Was it killed, or had it ended before?"""
    process = bench.start(*_command(source, folder, workers))
    deadline = time.monotonic() + 20
    while not (folder / ".prepare.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)  # past the imports
    time.sleep(bench.rng.uniform(0, SPAN_S / workers))
    process.kill()
    process.communicate(timeout=30)
    return process.returncode == -signal.SIGKILL


def _partial(folder: Path) -> list[str]:
    """Shards under their final names that are not whole."""
    wrong = []
    for path in folder.glob("*.bin"):
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or path.stat().st_size != 1024 + 2 * int(header[2]):
            wrong.append(f"{path.name} is not whole")
    return wrong


FAULTS = [
    Fault(15, "nasty documents", (N_NASTY + N_LARGE, N_NASTY + N_LARGE), nasty_documents),
    Fault(17, "kill -9 of preparation", (6, 20), killed_preparation),
]
