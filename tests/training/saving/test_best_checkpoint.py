"""checkpoints/best: the newest best model or the one before it, whole at every moment."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from regpt2.base.errors import CheckpointError, Problem
from regpt2.training import checkpoint
from regpt2.training.checkpoint import Saver, Snapshot
from regpt2.training.saving import best_checkpoint
from regpt2.training.saving.best_checkpoint import figures_of, kept_step, recover_best, verify_best, write_best


def snap(step: int, loss: float = 3.0) -> Snapshot:
    tensors = {"a": torch.full((100,), float(step))}
    return checkpoint.snapshot(step, '{"format": "x"}', tensors, None, {"step": step, "val_loss": loss})


def test_a_better_one_replaces_it_and_pruning_leaves_it(tmp_path: Path) -> None:
    for step, loss in ((2, 3.5), (5, 3.25)):
        write_best(tmp_path, snap(step, loss))
        verify_best(tmp_path / "best")
        assert figures_of(tmp_path / "best") == (step, loss)
    full = checkpoint.snapshot(9, "{}", {"a": torch.zeros(3)}, {}, {"step": 9})
    checkpoint.prune(tmp_path, keep=1, verified=checkpoint.write(tmp_path, full))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000009"]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "state.json",
    ]  # fmt: skip
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-00000009"


class Killed(BaseException):
    """As kill -9: nothing of ours runs after it."""


@pytest.mark.parametrize("call", range(20))
def test_a_kill_at_any_call_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write_best(tmp_path, snap(2))
    calls, dead = iter(range(100)), False

    def dying(real):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal dead
            if dead or next(calls) == call:
                dead = True
                raise Killed
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (best_checkpoint.shutil, "rmtree")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with contextlib.suppress(Killed):
            write_best(tmp_path, snap(5))
        whole = [folder for folder in (tmp_path / "best", tmp_path / "old-best") if folder.exists()]
        assert whole, "for a moment there was none"
        for folder in whole:
            verify_best(folder)
    recover_best(tmp_path)
    assert kept_step(tmp_path) in (2, 5)
    assert not (tmp_path / "old-best").exists()
    write_best(tmp_path, snap(6))
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert kept_step(tmp_path) == 6


def test_a_rename_that_fails_leaves_the_old_one_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a file that another program reads keeps its folder."""
    write_best(tmp_path, snap(2))
    real, saver = os.rename, Saver(tmp_path, keep=1)

    def refuse(a: Path, b: Path) -> None:
        if Path(a).name.startswith("tmp-"):
            raise PermissionError(13, "in use", str(a))
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        saver.save(lambda: snap(5), write_best)
        failure = saver.wait()
    assert isinstance(failure, Problem) and "could not be saved" in str(failure)
    assert kept_step(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    saver.save(lambda: snap(6), write_best)
    assert saver.wait() is None and kept_step(tmp_path) == 6


def test_damage_is_noticed(tmp_path: Path) -> None:
    assert kept_step(tmp_path) is None
    write_best(tmp_path, snap(2))
    folder = tmp_path / "best"
    model = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_best(folder)
    assert kept_step(tmp_path) is None
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not written to its end"):
        verify_best(folder)


def test_its_room_is_counted_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = checkpoint.room_bytes(1000)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 3 * one)
    checkpoint.require_room(tmp_path, 1000, keep=1, saves_left=1, best_bytes=1000)
    with pytest.raises(Problem, match="and 2 best ones of"):
        checkpoint.require_room(tmp_path, 1000, keep=1, saves_left=2, best_bytes=1000)
    write_best(tmp_path, snap(1))  # one of the two is there
    checkpoint.require_room(tmp_path, 1000, keep=1, saves_left=2, best_bytes=1000)
