"""Checkpoints: whole or not there, every flipped bit noticed, the one before it used, nothing lost by pruning."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.base.errors import CheckpointError, Problem
from regpt2.training import checkpoint, readback
from regpt2.training.checkpoint import FILES, Saver, Snapshot
from warm_processes import Python


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


def flipped(save_file: Callable[..., None], at: float) -> Callable[..., None]:
    """A disk that keeps another bit than it was given."""

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return save


@pytest.mark.parametrize("at", [0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_what_the_disk_did_not_keep_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: float
) -> None:
    checkpoint.write(tmp_path, snap(1))
    monkeypatch.setattr(checkpoint, "save_file", flipped(checkpoint.save_file, at))
    saver = Saver(tmp_path, keep=1)
    saver.save(lambda: snap(2))
    assert "differs from what was written" in str(saver.wait())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["config.json", "state.json", "manifest.json"])
def test_a_small_file_that_the_disk_did_not_keep_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = readback.write_atomic
    monkeypatch.setattr(readback, "write_atomic", lambda path, data: write(path, data + b" " * (path.name == name)))
    saver = Saver(tmp_path, keep=1)
    saver.save(lambda: snap(1))
    assert f"{name}: read back, it differs from what was written" in str(saver.wait())
    assert list(tmp_path.iterdir()) == []


def test_every_type_of_tensor_is_read_back(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {f"{n}": torch.ones(n, 3).to(dtype) for n, dtype in enumerate((*types, torch.bool))}
    tensors["scalar"], tensors["nan"] = torch.tensor(3.0), torch.tensor([float("nan")])
    checkpoint.verify(checkpoint.write(tmp_path, checkpoint.snapshot(1, "{}", tensors, tensors, {"step": 1})))


def test_a_run_that_will_not_fit_is_refused_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 350 * 10**6))
    one = 100 * 10**6
    checkpoint.require_room(tmp_path / "c", one, keep=2, saves_left=100)  # 3 at once
    with pytest.raises(Problem, match=r"4 more .* of 100.0 MB .* need 408.2 MB and 350.0 MB are free.*--keep-check"):
        checkpoint.require_room(tmp_path / "c", one, keep=3, saves_left=100)
    checkpoint.require_room(tmp_path / "c", one, keep=3, saves_left=3)
    with pytest.raises(Problem, match="4 more"):
        checkpoint.require_room(tmp_path / "c", one, keep=0, saves_left=4)
    checkpoint.write(tmp_path / "c", snap(1))
    checkpoint.require_room(tmp_path / "c", one, keep=3, saves_left=100)  # one of the four is there
    assert not (tmp_path / "d").exists()


def test_a_disk_that_fills_up_costs_the_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        checkpoint.write(tmp_path, snap(1, n=100_000))
        monkeypatch.setattr(checkpoint, "require_free_space", lambda *_: None)  # filled by others after the look
        saver = Saver(tmp_path, keep=1)
        saver.save(lambda: snap(2, n=300_000))
        said = str(saver.wait())
        assert str(tmp_path) in said and "No space left" in said and "untouched" in said
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
        checkpoint.verify(tmp_path / "step-00000001")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SAVE_ONCE = """
import sys, torch
from pathlib import Path
from regpt2.training import checkpoint, readback
t = {"w": torch.ones(3000)}
checkpoint.write(Path(sys.argv[1]) / "run" / "checkpoints", checkpoint.snapshot(1, "{}", t, t, {"step": 1}))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here")
def test_the_order_of_system_calls_outlasts_a_loss_of_power(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,unlink,openat,mkdir"
    command = ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", SAVE_ONCE, str(tmp_path)]
    subprocess.run(command, check=True, timeout=200)
    lines = [line for line in trace.read_text().splitlines() if str(tmp_path / "run") in line]

    def of(pattern: str) -> list[int]:
        return [n for n, line in enumerate(lines) if re.search(pattern, line)]

    (moved,) = of(r'rename.*/tmp-step-[^/"]+".*/step-00000001"')
    for name in (*FILES, checkpoint.MANIFEST):
        synced = of(rf"fsync\(.*/(\.)?{re.escape(name)}[^/]*>\)")
        assert synced and synced[-1] < moved, name
    named = of(r"rename.*/tmp-step-[^/]+/[^/]+\"\)? = 0|rename.*manifest.json")
    folder = of(r"fsync\(\d+<[^>]*/tmp-step-[^/>]+>\)")
    assert max(named_at for named_at in named if named_at < moved) < folder[-1] < moved, "the folder's own entries"
    assert any(n > moved for n in of(r"fsync\(\d+<[^>]*/checkpoints>\)")), "the rename itself"
    assert of(r"fsync\(\d+<[^>]*/run>\)"), "the entry of checkpoints/ in the run"


def test_every_kind_of_damage_is_found_set_aside_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        changed = change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest if changed is None else changed))

    def swapped(folder: Path) -> None:
        (folder / "x").write_bytes((folder / "state.json").read_bytes())
        (folder / "config.json").replace(folder / "state.json")
        (folder / "x").replace(folder / "config.json")

    damages: list[Callable[[Path], object]] = [
        swapped,
        lambda f: (f / "model.safetensors").write_bytes(b""),
        lambda f: (f / "model.safetensors").write_bytes(bytes((f / "model.safetensors").stat().st_size)),
        lambda f: edited(f, lambda m: m["files"]["config.json"].update(m["files"]["state.json"])),
        lambda f: edited(f, lambda m: m.update(step=1)),
        lambda f: edited(f, lambda m: m.update(files=[])),
        lambda f: edited(f, lambda m: m.update(splits={})),
        lambda f: edited(f, lambda m: m["files"]["state.json"].update(bytes="7")),
        lambda f: edited(f, lambda m: []),
        lambda f: (f / "manifest.json").write_bytes(b"\xff{"),
    ]
    for step, damage in enumerate(damages, start=2):
        damage(checkpoint.write(tmp_path, snap(step)))
    checkpoint.write(tmp_path, snap(1))
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-00000001"
    assert len(checkpoint.bad_folders(tmp_path)) == len(damages)
    (tmp_path / "step-00000001" / "state.json").unlink()
    for _ in range(2):  # nor does the second start begin afresh in silence
        with pytest.raises(CheckpointError, match="all 11 checkpoints were damaged") as caught:
            checkpoint.newest_good(tmp_path)
        assert len(str(caught.value).splitlines()) == 2 + 11
        for step in range(1, 12):
            assert f"bad-step-{step:08d}" in str(caught.value)


KILLED = """
import sys, torch
from pathlib import Path
from regpt2.training import checkpoint, readback
for step in range(1, 10_000):
    tensors = {"w": torch.full((2_000_000,), float(step))}
    checkpoint.write(Path(sys.argv[1]), checkpoint.snapshot(step, "{}", tensors, {}, {"step": step}))
    checkpoint.prune(Path(sys.argv[1]), keep=2)
"""


def test_a_killed_save_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    """Real kill -9 at random moments, nearly all of them inside a save: there is always a whole checkpoint."""
    rng = random.Random(0)
    for _ in range(6):
        process = Python("-c", KILLED, tmp_path)
        while not list(tmp_path.glob("step-*")):  # from the first save on
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(0.3 * rng.random())
        process.kill()
        process.communicate(timeout=60)
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
