"""Preparing what is elsewhere: the real command against a hub on loopback that fails in every way, killed for real."""

import io
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import folder_bytes, shard_tokens
from hub_server import FakeHub
from regpt2.base.errors import DownloadError, UsageError
from regpt2.data.datasets import fineweb_edu
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest

pytestmark = pytest.mark.seconds  # all of them together

REPO = "HuggingFaceFW/fineweb-edu"
COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
N_FILES = 6


def parquet(texts: list[str], other_bytes: int = 10) -> bytes:
    """A file as FineWeb-Edu's are: the text among other columns."""
    columns = {"text": texts, "id": [os.urandom(other_bytes) for _ in texts], "score": [3.0] * len(texts)}
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=100, compression="zstd")
    return file.getvalue()


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    rng = random.Random(7)
    words = [f"{rng.getrandbits(40):x}" for _ in range(5000)] + ["é", "中文", "<|endoftext|>", "\n\n"]
    return [[" ".join(rng.choices(words, k=rng.choice([1, 30, 300]))) for _ in range(250)] for _ in range(N_FILES)]


@pytest.fixture(scope="module")
def published(texts: list[list[str]]) -> dict[str, bytes]:
    return {f"sample/10BT/{n:03d}_00000.parquet": parquet(each) for n, each in enumerate(texts)}


@pytest.fixture
def hub(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    with FakeHub({f"{REPO}@{COMMIT}": published}) as running:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
        yield running


def options_for(out: Path, **changes: object) -> PrepareOptions:
    values = {"workers": 1, "val_tokens": 20_000, "shard_tokens": 50_000, "encoder": "tiktoken"} | changes
    return PrepareOptions(dataset="fineweb_edu", out=out, **values)  # type: ignore[arg-type]


def command_for(out: Path, workers: int) -> list[str]:
    choices = ["--val-tokens", "20000", "--shard-tokens", "50000", "--encoder", "tiktoken", "--workers", str(workers)]
    return [sys.executable, "-m", "regpt2", "prepare", "fineweb_edu", "--out", str(out), *choices]


def test_every_document_is_there_in_the_order_of_the_files(
    hub: FakeHub, texts: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, gpt2 = tmp_path / "out", load_tokenizer("gpt2")
    manifest = prepare(options_for(out))
    expected = [token for each in texts for text in each if text.strip() for token in (50256, *gpt2.encode(text))]
    assert shard_tokens(out, "val") == expected[:20_000]
    assert shard_tokens(out, "train") == expected[20_000:]
    assert (manifest.revision, manifest.source) == (COMMIT, f"{REPO}, sample-10BT")
    told = capsys.readouterr().out
    assert f"{N_FILES} files, " in told and "GB to download; about " in told and " GB free)" in told
    assert {path.name for path in out.iterdir()} == {".lock", "manifest.json", *(s.file for s in manifest.shards)}


def test_workers_kills_and_a_failing_hub_make_no_difference(hub: FakeHub, tmp_path: Path) -> None:
    """20 kills at random; meanwhile answers are cut, wrong, refused, without ranges, or come from a login page."""
    prepare(options_for(tmp_path / "reference"))
    reference = folder_bytes(tmp_path / "reference")
    for workers in (2, 4):
        prepare(options_for(tmp_path / str(workers), workers=workers))
        assert folder_bytes(tmp_path / str(workers)) == reference
    rng, out, kills = random.Random(11), tmp_path / "out", 0
    paths = [f"sample/10BT/{n:03d}_00000.parquet" for n in range(N_FILES)]
    for attempt in range(60):
        faults = [("dies", rng.randrange(1, 90_000)), ("short", rng.randrange(1, 90_000)), ("wrong", 0)]
        faults += [("status", 503), ("rangeless", 0), ("badrange", 0), ("slow", 20_000), ("chunked", 0)]
        for path in paths if kills < 20 else []:
            kind, at = rng.choice(faults) if rng.random() < 0.3 else ("slow", 1500)
            hub.plant(path, kind, at=at, times=1)
        process = subprocess.Popen(
            command_for(out, (1, 2, 4)[attempt % 3]),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _, told = process.communicate(timeout=rng.uniform(0.3, 1.2) if kills < 20 else 60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode == 0:
            break
        assert process.returncode == 1 and told.count(b"\n") <= 2, told.decode()
    assert process.returncode == 0
    assert kills >= 10, "it was too quick to be killed"
    assert folder_bytes(out) == reference


def test_wrong_content_is_refused_with_one_message_and_nothing_is_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant("sample/10BT/002_00000.parquet", "wrong", times=None)
    with pytest.raises(DownloadError, match=r"002_00000\.parquet gave .* with SHA-256 .*, expected .*nothing was kept"):
        prepare(options_for(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.bin")) or not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out" / ".parts").glob("raw-000002*"))


def test_the_first_files_and_a_local_copy_give_the_same_shards(
    hub: FakeHub, published: dict[str, bytes], tmp_path: Path
) -> None:
    prepare(options_for(tmp_path / "two", first=2))
    assert [request.path for request in hub.requests if "002_00000" in request.path] == []
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in published.items():
        (copy / Path(name).name).write_bytes(data)
    hub.plant("api", "status", at=500, times=None)
    prepare(options_for(tmp_path / "local", input=copy, first=2))
    here, there = (Manifest.read(tmp_path / name) for name in ("two", "local"))
    assert here.fingerprint == there.fingerprint
    assert (here.source, here.splits) == (there.source, there.splits)


@pytest.mark.process
def test_the_disk_never_holds_more_than_the_limit(
    hub: FakeHub, texts: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is on the disk only while it is read; a limit lets fewer be there at once."""
    large = {f"sample/10BT/{n:03d}_00000.parquet": parquet(each, 4000) for n, each in enumerate(texts)}
    hub.put(f"{REPO}@{COMMIT}", large)
    for path in large:
        hub.plant(path, "stall", at=0.7, times=1)
    counted = replace(fineweb_edu.FINEWEB_EDU, n_tokens={"sample-10BT": 990_000})
    monkeypatch.setattr(fineweb_edu, "FINEWEB_EDU", counted)
    with pytest.raises(
        UsageError, match=r"--disk-limit 1e-06 is too little: .* GB of shards and one file at a time need"
    ):
        prepare(options_for(tmp_path / "out", disk_limit=1e-6))
    limit_bytes = 4_000_000
    assert 2_000_000 < _most_bytes(tmp_path / "limited", limit_bytes) <= limit_bytes


def _most_bytes(out: Path, limit_bytes: int) -> int:
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            sizes = 0
            for path in out.rglob("*"):
                try:
                    sizes += path.stat().st_size
                except FileNotFoundError:
                    continue
            most = max(most, sizes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prepare(options_for(out, workers=4, disk_limit=limit_bytes / 1e9))
    finally:
        stop.set()
        watcher.join()
    return most
