"""Retention under every order of saves, kills, damage and restarts: what has to be there is there, and verifies."""

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from regpt2.base.errors import CheckpointError
from regpt2.training import checkpoint

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")  # all that change a folder, by way of os

MEMORY = Path("/dev/shm")  # a disk would be most of the time


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Lets `left` more calls through; then the process is dead, and its cleaning up does nothing either."""

    def __init__(self, left: int = 1_000_000) -> None:
        self.left = left

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return real(*arguments, **options)

        return call

    def save_file(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        real_save_file(tensors, path)
        if self.left == 0:
            path.write_bytes(path.read_bytes()[:50])  # killed in the middle of it
            raise Killed
        self.left -= 1


def rmtree(folder: Path, ignore_errors: bool = False) -> None:
    """The worst order for a kill in the middle: the manifest, which says that all is whole, last."""
    for path in sorted(folder.glob("*"), key=lambda path: path.name == checkpoint.MANIFEST):
        os.unlink(path)
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        assert ignore_errors


real_save_file = checkpoint.save_file


@contextmanager
def on_disk(disk: Disk) -> Iterator[None]:
    with ExitStack() as stack:
        for name in CALLS:
            real = (lambda _: None) if name == "fsync" else getattr(os, name)  # a kill loses nothing of the page cache
            stack.enter_context(patch.object(os, name, disk.counted(real)))
        stack.enter_context(patch.object(checkpoint, "save_file", disk.save_file))
        stack.enter_context(patch.object(shutil, "rmtree", rmtree))
        stack.enter_context(patch.object(checkpoint, "warn", lambda _: None))
        yield


def snap(step: int) -> checkpoint.Snapshot:
    tensors = {"w": torch.full((3,), float(step))}
    return checkpoint.snapshot(step, "{}", tensors, tensors, {"step": step})


class Retention(RuleBasedStateMachine):
    """The model: which steps have a manifest, and which of them nobody has damaged."""

    counts: ClassVar[Counter[str]] = Counter()

    @initialize(keep=st.integers(1, 3), first=st.sampled_from([0, 90, 99_999_990]))
    def begin(self, keep: int, first: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="retention-", dir=MEMORY if MEMORY.is_dir() else None))
        self.checkpoints = self.folder / "checkpoints"
        self.keep, self.first, self.step = keep, first, first
        self.there: set[int] = set()
        self.good: set[int] = set()
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _save(self, gap: int, in_write: int | None = None, in_prune: int | None = None) -> None:
        """What the background thread does, killed at a call of the one or the other."""
        self.step += gap
        disk = Disk() if in_write is None else Disk(in_write)
        real_write, real_prune = checkpoint.write, checkpoint.prune
        self.good.discard(self.step)  # one of this number is replaced, if it comes to that

        def write(checkpoints: Path, of: checkpoint.Snapshot) -> Path:
            folder = real_write(checkpoints, of)
            self.there.add(of.step)
            self.good.add(of.step)
            self.damaged.discard(of.step)
            return folder

        def prune(*arguments: Any, **options: Any) -> None:
            below = sorted(step for step in self.there if step <= self.step)
            gone = set(below[: -self.keep])
            self.good -= gone
            disk.left = disk.left if in_prune is None else in_prune
            real_prune(*arguments, **options)
            self.there -= gone

        saver = checkpoint.Saver(self.checkpoints, self.keep)
        with on_disk(disk), patch.object(checkpoint, "write", write), patch.object(checkpoint, "prune", prune):
            saver._write(snap(self.step), saver._put_newest)
        died = isinstance(saver._error, Killed)
        assert died or saver._error is None, saver._error
        if died:
            self.counts["kills in a save" if in_prune is None else "kills in a prune"] += 1
            self._look()  # the process is gone; what it was about to remove may be there or not
        else:
            self.counts["saves"] += 1
            names = {path.name for path in self.checkpoints.iterdir() if not path.name.startswith("bad-")}
            above = {f.name for f in checkpoint.folders(self.checkpoints) if checkpoint.step_of(f) > self.step}
            assert names == {f"step-{step:08d}" for step in self.there} | above, "something is left over, or missing"

    def _look(self) -> None:
        """After a kill: which have a manifest."""
        folders = checkpoint.folders(self.checkpoints)
        self.there = {checkpoint.step_of(f) for f in folders if (f / checkpoint.MANIFEST).is_file()}
        for folder in folders:
            step = checkpoint.step_of(folder)
            if step in self.there - self.damaged:
                checkpoint.verify(folder)  # what has a manifest is whole
            assert step != self.step or step in self.there | self.damaged, "half a save under its final name"
        self.restart()

    @rule(gap=st.integers(1, 5))
    def save(self, gap: int) -> None:
        self._save(gap)

    @rule(gap=st.integers(1, 5), at=st.integers(0, 30))
    def killed_in_a_save(self, gap: int, at: int) -> None:
        self._save(gap, in_write=at)

    @rule(gap=st.integers(1, 5), at=st.integers(0, 8))
    def killed_in_a_prune(self, gap: int, at: int) -> None:
        self._save(gap, in_prune=at)

    @rule(seed=st.integers(0, 1000))
    def damage(self, seed: int) -> None:
        rng = random.Random(seed)
        if folders := checkpoint.folders(self.checkpoints):
            folder = rng.choice(folders)
            path = folder / rng.choice([*checkpoint.FILES, checkpoint.MANIFEST])
            step = checkpoint.step_of(folder)
            self.counts["damage"] += 1
            self.good.discard(step)
            self.damaged.add(step)
            if path.exists() and rng.random() < 0.5:
                path.write_bytes(path.read_bytes()[:-1] + b"\0")
            else:
                path.unlink(missing_ok=True)
            if not (folder / checkpoint.MANIFEST).exists():
                self.there.discard(step)

    @rule(above=st.integers(1, 12))
    def another_run_leaves_a_higher_step(self, above: int) -> None:
        step = self.step + above
        if not (self.checkpoints / f"step-{step:08d}").exists():
            with on_disk(Disk()):
                folder = checkpoint.write(self.folder / "another", snap(step))
            self.checkpoints.mkdir(exist_ok=True)
            folder.rename(self.checkpoints / folder.name)
            self.there.add(step)
            self.good.add(step)
            self.damaged.discard(step)
            self.counts["higher steps"] += 1

    @rule()
    def restart(self) -> None:
        with on_disk(Disk()):
            try:
                found = checkpoint.newest_good(self.checkpoints)
            except CheckpointError:
                assert not self.good
                for folder in checkpoint.bad_folders(self.checkpoints):
                    shutil.rmtree(folder)  # as the message says
                found = None
        if self.good:
            assert found is not None and checkpoint.step_of(found) >= max(self.good)
        self.step = self.first if found is None else checkpoint.step_of(found)
        self.there = {step for step in self.there if step <= self.step} if found else set()
        self.good |= {self.step} if found else set()  # a kill after the rename: the save is there all the same

    @invariant()
    def what_has_to_be_there_verifies(self) -> None:
        for step in self.good:
            checkpoint.verify(self.checkpoints / f"step-{step:08d}")


def machine(sequences: int, *, derandomize: bool = True) -> Counter[str]:
    """Run so many sequences of up to 25 events, the same every time; returns how many of each kind there were."""
    Retention.counts = Counter()
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Retention,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=health,
        ),
    )
    return Retention.counts


@pytest.mark.seconds
def test_a_good_checkpoint_outlasts_every_order_of_events() -> None:
    counts = machine(200)
    for kind in ("saves", "kills in a save", "kills in a prune", "damage", "higher steps"):
        assert counts[kind] >= 100, counts


def test_a_higher_step_of_another_run_does_not_drive_out_the_one_just_written(tmp_path: Path) -> None:
    for step in (50, 51, 52):
        checkpoint.write(tmp_path, snap(step))
    checkpoint.prune(tmp_path, keep=1, verified=checkpoint.write(tmp_path, snap(12)))
    checkpoint.prune(tmp_path, keep=1, verified=checkpoint.write(tmp_path, snap(14)))
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [14, 50, 51, 52]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_removes_nothing_that_is_needed_when_the_newest_are_bad(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 4, 5):
        checkpoint.write(tmp_path, snap(step))
    for step in (4, 5):
        (tmp_path / f"step-{step:08d}" / checkpoint.MODEL).write_bytes(b"")
    checkpoint.prune(tmp_path, keep)
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [*[1, 2, 3][-keep:], 4, 5]
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / f"step-{step:08d}", ignore_errors=True)
    checkpoint.prune(tmp_path, keep)
    assert len(checkpoint.folders(tmp_path)) == 2, "with no good one left, what there is stays for a person to look at"


def test_a_half_removed_one_counts_for_nothing_and_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.write(tmp_path, snap(step))
    (tmp_path / "step-00000003" / checkpoint.MANIFEST).unlink()
    checkpoint.prune(tmp_path, keep=2)
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [2, 4]


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 9):
        checkpoint.write(tmp_path, snap(step))
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [9, 99_999_999, 100_000_000]
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-100000000"
    checkpoint.prune(tmp_path, keep=1)
    assert [checkpoint.step_of(f) for f in checkpoint.folders(tmp_path)] == [100_000_000]
