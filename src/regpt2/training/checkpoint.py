"""Checkpoints. In: a run's state at a step; out: a folder `step-00012000/` that is whole and verified, or not there.

    model.safetensors, config.json    the model in the native format: the folder can be sampled, evaluated, converted
    optimizer.safetensors             the optimizer's state, by parameter name
    state.json                        step, guard, loss scale, and what defines the run (data, seed, batch)
    manifest.json                     size and SHA-256 of each file above

A folder is written under a temporary name, every file fsynced, then renamed and the parent fsynced. No pickle.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, Problem
from regpt2.base.files import describe_os_error, fsync_dir, require_free_space, sha256_file, write_atomic
from regpt2.model.load import read_json, read_tensors, verify_files

MODEL, CONFIG, OPTIMIZER, STATE = "model.safetensors", "config.json", "optimizer.safetensors", "state.json"
FILES = (MODEL, CONFIG, OPTIMIZER, STATE)
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, copied out of the running model."""

    step: int
    config_json: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def snapshot(
    step: int,
    config_json: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Snapshot:
    """A copy in main memory: what happens to the weights afterwards does not reach it."""

    def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}

    return Snapshot(step, config_json, copy(model), copy(optimizer), json.loads(json.dumps(dict(state))))


def write(checkpoints: Path, snap: Snapshot) -> Path:
    """Write one checkpoint and return its folder.

    Raises:
        Problem: the disk has not enough room.
        OSError: it filled up in the middle, or may not be written; nothing is left under the final name.
    """
    need_bytes = sum(t.numel() * t.element_size() for t in (*snap.model.values(), *snap.optimizer.values()))
    require_free_space(checkpoints, int(1.01 * need_bytes) + (1 << 20), f"the checkpoint of step {snap.step}")
    final = checkpoints / f"step-{snap.step:08d}"
    part = checkpoints / f"tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _save_tensors(snap.model, part / MODEL)
        _save_tensors(snap.optimizer, part / OPTIMIZER)
        write_atomic(part / CONFIG, snap.config_json)
        write_atomic(part / STATE, json.dumps(snap.state, indent=1) + "\n")
        files = {name: {"bytes": (part / name).stat().st_size, "sha256": sha256_file(part / name)} for name in FILES}
        write_atomic(part / "manifest.json", json.dumps({"step": snap.step, "files": files}, indent=1) + "\n")
        if final.exists():  # of a former run over the same steps, or left by hand
            set_aside(final)
        os.rename(part, final)
        fsync_dir(checkpoints)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:  # the library has errors of its own for a full disk
        raise Problem(f"{path} could not be written ({error}); free some space or choose another folder.") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back, verified."""

    folder: Path
    step: int
    config: dict[str, Any]
    """The native config.json."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def folders(checkpoints: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if path.is_dir() and _STEP.fullmatch(path.name))


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing or differs in size or SHA-256.
    """
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder} has no manifest.json: it was not written to its end.")
    verify_files(folder, FILES)


def newest_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all. Bad ones are set aside, aloud.

    Raises:
        CheckpointError: there are checkpoints and every one is bad: going on would silently start afresh.
    """
    there = folders(checkpoints)
    for folder in reversed(there):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warn(f"{error} It is set aside as {set_aside(folder).name}; trying the one before it.")
    if there:
        raise CheckpointError(
            f"{checkpoints}: all {len(there)} checkpoints were damaged and set aside; "
            "start again with another --run folder, or --resume never after removing this one."
        )
    return None


def set_aside(folder: Path) -> Path:
    """Rename a folder to bad-..., so that it is neither used nor lost."""
    target = folder.with_name(f"bad-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"bad-{folder.name}-{number}")
    return folder.rename(target)


def read(folder: Path) -> Checkpoint:
    """A checkpoint that was verified."""
    state = read_json(folder / STATE)
    return Checkpoint(
        folder=folder,
        step=state["step"],
        config=read_json(folder / CONFIG),
        model=read_tensors(folder / MODEL),
        optimizer=read_tensors(folder / OPTIMIZER),
        state=state,
    )


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0 = keep all), and what killed saves have left behind."""
    for path in checkpoints.glob("tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in folders(checkpoints)[: -keep or None] if keep else []:
        (folder / "manifest.json").unlink(missing_ok=True)  # first, so that a half-removed one is never taken for good
        shutil.rmtree(folder, ignore_errors=True)


class Saver:
    """Saves in the background: the loop stops only to copy. At most one save, and one copy, is under way."""

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self.checkpoints, self.keep = checkpoints, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, take: Callable[[], Snapshot]) -> None:
        """Wait for the save before this one, take the snapshot, begin to write it.

        A save that failed is said and costs only itself: this one is tried all the same.
        """
        if (failure := self.wait()) is not None:
            warn(f"{failure} Trying again now.")
        snap = take()
        self._thread = threading.Thread(target=self._write, args=(snap,), name="save")
        self._thread.start()

    def wait(self) -> Problem | None:
        """Until the save under way is on disk; what it met, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return None
        said = describe_os_error(error) if isinstance(error, OSError) else str(error)
        return Problem(f"a checkpoint could not be saved: {said} Those before it, if any, are untouched.")

    def close(self) -> None:
        """Wait, and say what the last save met; a run that ends by an error ends by that one."""
        if (failure := self.wait()) is not None:
            warn(str(failure))

    def _write(self, snap: Snapshot) -> None:
        try:
            write(self.checkpoints, snap)
            prune(self.checkpoints, self.keep)
        except BaseException as error:  # handed to the loop by wait()
            self._error = error
