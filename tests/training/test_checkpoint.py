"""Checkpoints: whole or not there, every flipped bit noticed, the one before it used, nothing lost by pruning."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from regpt2.base.errors import CheckpointError, Problem
from regpt2.training import checkpoint
from regpt2.training.checkpoint import FILES, Saver, Snapshot


def snap(step: int, *, n: int = 100) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {"a": torch.randn(n, generator=generator), "b": torch.randn(3, 4, generator=generator)}
    return checkpoint.snapshot(step, '{"format": "x"}', tensors, {"a/exp_avg": tensors["a"] * 2}, {"step": step})


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, snap(7))
    assert folder.name == "step-00000007"
    checkpoint.verify(folder)
    found = checkpoint.read(folder)
    assert found.step == 7
    for name, tensor in snap(7).model.items():
        assert torch.equal(found.model[name], tensor)
    assert torch.equal(found.optimizer["a/exp_avg"], snap(7).optimizer["a/exp_avg"])


def test_a_snapshot_does_not_follow_the_weights(tmp_path: Path) -> None:
    """The loop goes on while the file is written: the file must hold what was there at the call."""
    weights = {"w": torch.zeros(1_000_000)}
    saver = Saver(tmp_path, keep=0)
    for step in range(1, 6):
        weights["w"].fill_(step)
        saver.save(lambda step=step: checkpoint.snapshot(step, "{}", weights, {}, {"step": step}))
        weights["w"].fill_(-1.0)
    assert saver.wait() is None
    for step in range(1, 6):
        found = checkpoint.read(tmp_path / f"step-{step:08d}")
        assert bool((found.model["w"] == step).all())


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    folder = checkpoint.write(tmp_path, snap(1))
    whole = (folder / name).read_bytes()
    for _ in range(50):
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="SHA-256"):
            checkpoint.verify(folder)
    for _ in range(10):
        (folder / name).write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(CheckpointError, match="bytes, expected"):
            checkpoint.verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.verify(folder)


def test_a_bad_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8, 12):
        checkpoint.write(tmp_path, snap(step))
    (tmp_path / "step-00000012" / "optimizer.safetensors").write_bytes(b"")
    (tmp_path / "step-00000008" / "manifest.json").unlink()
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-00000004"
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000004", "bad-step-00000008", "bad-step-00000012"}
    assert "set aside as bad-step-00000012" in capsys.readouterr().err


def test_when_all_are_bad_the_run_does_not_silently_start_afresh(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snap(4))
    (tmp_path / "step-00000004" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints were damaged"):
        checkpoint.newest_good(tmp_path)
    assert checkpoint.newest_good(tmp_path / "none") is None


def test_pruning_keeps_the_newest_and_sorts_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100, 1000):
        checkpoint.write(tmp_path, snap(step))
    (tmp_path / "tmp-step-00000007-1").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000100", "step-00001000"]
    checkpoint.prune(tmp_path, keep=0)
    assert len(checkpoint.folders(tmp_path)) == 2


def test_a_failed_save_leaves_nothing_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, snap(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver = Saver(tmp_path, keep=1)
    saver.save(lambda: snap(2))
    failure = saver.wait()
    assert "No space left" in str(failure)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failed_save_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: 1 / 0)
    saver = Saver(tmp_path, keep=0)
    saver.save(lambda: snap(1))
    saver._thread.join()
    monkeypatch.setattr(checkpoint, "save_file", whole)
    saver.save(lambda: snap(2))
    assert saver.wait() is None
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-00000002"]


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(Problem, match=r"checkpoint of step 3 needs .* MB and 0.0 MB are free"):
        checkpoint.write(tmp_path, snap(3))
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, torch
from pathlib import Path
from regpt2.training import checkpoint
print("ready", flush=True)
for step in range(1, 10_000):
    tensors = {"w": torch.full((2_000_000,), float(step))}
    checkpoint.write(Path(sys.argv[1]), checkpoint.snapshot(step, "{}", tensors, {}, {"step": step}))
    checkpoint.prune(Path(sys.argv[1]), keep=2)
"""


def test_a_killed_save_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    """Real kill -9 at random moments, nearly all of them inside a save: there is always a whole checkpoint."""
    rng = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3 + rng.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = checkpoint.newest_good(tmp_path)
        assert newest is not None
        found = checkpoint.read(newest)
        assert bool((found.model["w"] == found.step).all())
        assert not list(tmp_path.glob("bad-*"))
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, snap(1))
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) | {"manifest.json"} == {p.name for p in folder.iterdir()}
