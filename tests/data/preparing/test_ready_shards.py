"""Ready-made shards: a hub on loopback in, a verified folder out; every fault ends with right bytes or a message."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Run
from hub_server import FakeHub
from regpt2.base.errors import DataError, DownloadError, Problem, UsageError
from regpt2.data.datasets import ready as entry
from regpt2.data.preparing.ready_shards import collect
from regpt2.data.sources.plan import Source
from regpt2.data.tokenizer import Tokenizer, load_tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens, verify

pytestmark = pytest.mark.seconds  # all of them together

REPO = entry.SETS["fineweb_edu_10B"].repo
EOT = 50256


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


def shard(ids: list[int]) -> bytes:
    """A shard as llm.c describes it, written without our code."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + np.array(ids, dtype="<u2").tobytes()


def token_ids(n: int, seed: int) -> list[int]:
    """Some documents of random ids, the first of them in the middle: it began in the shard before."""
    ids = np.random.default_rng(seed).integers(0, EOT, size=n)
    ids[5::97] = EOT
    return [int(token) for token in ids]


TRAIN = [token_ids(3000, 1), token_ids(3000, 2), token_ids(700, 3)]
VAL = token_ids(3000, 4)
FILES = {f"finewebedu_train_{n:06d}.bin": shard(ids) for n, ids in enumerate(TRAIN, 1)} | {
    "finewebedu_val_000000.bin": shard(VAL),
    "README.md": b"shards",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with FakeHub({REPO: FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def read(folder: Path, split: str) -> list[int]:
    with open_tokens(folder, split) as stream:
        return [int(token) for token in stream.read(0, stream.n_tokens)]


def assert_complete(folder: Path) -> None:
    assert read(folder, "train") == [token for ids in TRAIN for token in ids]
    assert read(folder, "val") == VAL
    assert verify(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES.keys() - {"README.md"}, "manifest.json"])


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_become_a_folder_that_says_what_it_holds(hub: FakeHub, out: Path, gpt2: Tokenizer, workers: int) -> None:
    manifest = collect(entry.shards(Source()), out, None, workers)
    assert_complete(out)
    assert manifest == Manifest.read(out)
    assert (manifest.dataset, manifest.source, manifest.revision) == ("fineweb_edu", REPO, hub.commits[REPO])
    assert manifest.tokenizer_fingerprint == gpt2.fingerprint
    train = [token for ids in TRAIN for token in ids]
    assert manifest.splits["train"].documents == train.count(EOT)
    assert manifest.splits["train"].text_bytes == sum(len(gpt2.decode_bytes([t])) for t in train if t != EOT)
    assert manifest.splits["val"].tokens == len(VAL)
    with open_tokens(out, "val") as stream:
        assert stream.dataset == "fineweb_edu"
        assert not stream.note


def test_the_first_train_shards_come_with_the_validation_shard(hub: FakeHub, out: Path) -> None:
    manifest = collect(entry.shards(Source(first=2)), out, None, 1)
    assert [shard.file for shard in manifest.shards] == [*sorted(FILES)[1:3], "finewebedu_val_000000.bin"]
    assert manifest.source == f"{REPO}, the first 2 train shards"


def test_a_complete_folder_is_left_as_it_is_and_no_other_set_is_put_there(hub: FakeHub, out: Path) -> None:
    first = collect(entry.shards(Source()), out, None, 1)
    sent = hub.n_sent("finewebedu_train_000001.bin")
    assert collect(entry.shards(Source()), out, None, 1) == first
    assert hub.n_sent("finewebedu_train_000001.bin") == sent
    with pytest.raises(UsageError, match="holds another preparation: its source"):
        collect(entry.shards(Source(first=1)), out, None, 1)


def test_tokens_from_elsewhere_are_not_mixed_in(hub: FakeHub, out: Path) -> None:
    (out / "mine_train_000000.bin").write_bytes(shard([1]))
    with pytest.raises(
        UsageError, match=r"already holds tokens that this command did not write \(mine_train_000000.bin\)"
    ):
        collect(entry.shards(Source()), out, None, 1)


def test_wrong_bytes_are_refused_and_the_folder_is_no_data_folder_yet(
    hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.plant("finewebedu_train_000002.bin", "wrong", times=None)
    with pytest.raises(DownloadError, match=r"finewebedu_train_000002.bin gave .* expected"):
        collect(entry.shards(Source()), out, None, 1)
    assert not (out / "finewebedu_train_000002.bin").exists()
    with pytest.raises(DataError, match="preparation is not finished"):
        open_tokens(out, "train")
    with pytest.raises(UsageError, match="holds another preparation: its source"):
        collect(entry.shards(Source(first=1)), out, None, 1)
    hub.heal()
    capsys.readouterr()
    collect(entry.shards(Source()), out, None, 1)
    assert "3 of 4 shards to get" in capsys.readouterr().out, "the first is not even counted again"
    assert_complete(out)
    assert hub.n_sent("finewebedu_train_000001.bin") == len(FILES["finewebedu_train_000001.bin"]), "fetched once"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard([EOT, 5, 50257, 6]), r"holds id 50257 at token 2, outside the vocabulary of 50,257"),
        (shard([EOT, 5, 6])[:-2], r"has 1,028 bytes, expected 1,030 .* truncated"),
        (b"<html>" * 300, "starts with neither 20240520"),
        (np.lib.format.magic(1, 0) + b"x", "npy header cannot be read"),
    ],
)
def test_what_is_published_must_be_gpt2_tokens(hub: FakeHub, out: Path, content: bytes, message: str) -> None:
    hub.put(REPO, FILES | {"finewebedu_train_000003.bin": content})
    with pytest.raises(DataError, match=message):
        collect(entry.shards(Source()), out, None, 1)
    assert not (out / "manifest.json").exists()


@pytest.mark.process
def test_a_problem_in_a_worker_is_one_message(hub: FakeHub, out: Path) -> None:
    hub.put(REPO, FILES | {"finewebedu_train_000003.bin": shard([EOT, 60000])})
    with pytest.raises(DataError, match="holds id 60000 at token 1"):
        collect(entry.shards(Source()), out, None, 2)


COMMAND = """
import sys
from pathlib import Path
from regpt2.data.datasets import ready as entry
from regpt2.data.sources.plan import Source
from regpt2.data.preparing.ready_shards import collect
if __name__ == "__main__":
    collect(entry.shards(Source()), Path(sys.argv[1]), None, int(sys.argv[2]))
"""


def test_a_script_without_a_main_guard_is_told_and_does_not_hang(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMMAND.replace("if __name__", "if True or __name__"))
    done = subprocess.run([sys.executable, script, out, "2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "a worker process ended by itself (exit code 1)" in done.stderr


@pytest.mark.process
def test_the_command_gets_them(hub: FakeHub, out: Path, regpt2: Run) -> None:
    done = regpt2("prepare", "ready", "--out", out, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{REPO}: 4 of 4 shards to get" in done.stdout
    (out / ".lock").unlink()
    assert_complete(out)
    wrong = regpt2("prepare", "ready", "--out", out, "--shard-tokens", 5)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "leave out --shard-tokens" in wrong.stderr


@pytest.mark.parametrize(
    ("workers", "is_time"),
    [
        (1, lambda out: (out / "finewebedu_train_000002.bin.part").exists()),
        (2, lambda out: (out / ".parts" / "finewebedu_train_000001.bin.json").exists()),
    ],
)
def test_killed_and_continued_it_is_the_same_and_nothing_comes_twice(
    hub: FakeHub, out: Path, tmp_path: Path, workers: int, is_time: Callable[[Path], bool]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    hub.plant("finewebedu_train_000002.bin", "slow", at=100)
    process = subprocess.Popen([sys.executable, script, out, str(workers)], start_new_session=True)
    deadline = time.monotonic() + 60
    while not is_time(out):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    collect(entry.shards(Source()), out, None, 1)
    assert_complete(out)
    assert hub.n_sent("finewebedu_train_000001.bin") == len(FILES["finewebedu_train_000001.bin"])


def test_a_counted_shard_that_is_gone_is_fetched_again(hub: FakeHub, out: Path) -> None:
    hub.plant("finewebedu_train_000003.bin", "wrong", times=None)
    with pytest.raises(DownloadError):
        collect(entry.shards(Source()), out, None, 1)
    (out / "finewebedu_train_000001.bin").unlink()
    (out / ".finewebedu_train_000002.bin.4711.tmp").write_bytes(b"a copy that was killed")
    hub.heal()
    collect(entry.shards(Source()), out, None, 1)
    assert_complete(out)


# A local copy.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_local_copy_is_compared_and_linked(hub: FakeHub, out: Path, copy: Path) -> None:
    manifest = collect(entry.shards(Source(copy)), out, None, 1)
    assert_complete(out)
    assert manifest.revision == hub.commits[REPO]
    assert not any(hub.n_sent(name) for name in FILES)
    name = "finewebedu_val_000000.bin"
    assert (out / name).stat().st_ino == (copy / name).stat().st_ino


def test_a_local_copy_is_copied_where_it_cannot_be_linked(
    hub: FakeHub, out: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    collect(entry.shards(Source(copy)), out, None, 1)
    assert_complete(out)
    shutil.rmtree(copy)
    assert verify(out) == []


def test_a_local_copy_that_differs_is_refused(hub: FakeHub, out: Path, copy: Path) -> None:
    path = copy / "finewebedu_train_000002.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"finewebedu_train_000002.bin has SHA-256 .* its publisher says"):
        collect(entry.shards(Source(copy)), out, None, 1)
    assert not (out / path.name).exists()
    path.write_bytes(bytes(content[:-100]))
    with pytest.raises(DataError, match="has 6,924 bytes, its publisher says 7,024"):
        entry.shards(Source(copy))
    path.unlink()
    with pytest.raises(DataError, match=r"lacks finewebedu_train_000002.bin; .*--first N"):
        entry.shards(Source(copy))
    assert len(entry.shards(Source(copy, first=1)).files) == 2


def test_without_a_hub_a_local_copy_is_taken_as_it_is(
    tmp_path: Path,
    out: Path,
    copy: Path,
    gpt2: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError):
        entry.shards(Source())
    plan = entry.shards(Source(copy))
    assert "without comparing it" in capsys.readouterr().err
    manifest = collect(plan, out, None, 1)
    assert_complete(out)
    assert manifest.revision.startswith("a local copy: 4 files, names and sizes ")


# What is asked for.


def test_wrong_options_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no --config 'fineweb_edu_10'; did you mean 'fineweb_edu_10B'\?"):
        entry.shards(Source(config="fineweb_edu_10"))
    with pytest.raises(UsageError, match="ready takes no --repo"):
        entry.shards(Source(repo="a/b"))
    with pytest.raises(UsageError, match="there is no such folder"):
        entry.shards(Source(tmp_path / "nowhere"))
    hub.put(REPO, {"README.md": b"moved", "fineweb_train_000001.bin": b"another set", "fineweb_val_000000.bin": b""})
    with pytest.raises(DataError, match=r"lacks finewebedu_train_000001.bin or finewebedu_val_000000.bin"):
        entry.shards(Source(revision="main"))


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6 - 10**4, 10**4))
    with pytest.raises(Problem, match=r"needs 0.0 MB and 0.0 MB are free"):
        collect(entry.shards(Source()), out, None, 1)
    assert not any(hub.n_sent(name) for name in FILES if name.endswith(".bin"))


def test_every_set_names_a_data_set_that_references_know() -> None:
    assert {made.dataset for made in entry.SETS.values()} == {"fineweb", "fineweb_edu"}
    assert entry.DESCRIPTION
