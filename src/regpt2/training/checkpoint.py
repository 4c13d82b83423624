"""Checkpoints. In: a run's state at a step; out: a folder `step-00012000/` that is whole and verified, or not there.

    model.safetensors, config.json    the model in the native format: the folder can be sampled, evaluated, converted
    optimizer.safetensors             the optimizer's state, by parameter name
    adapter_model.safetensors, adapter_config.json    with LoRA: the adapters, which are merged into the model
    state.json                        step, guard, loss scale, and what defines the run (data, seed, batch)
    manifest.json                     size and SHA-256 of each file above

A folder is written under a temporary name, every file fsynced and read back, then renamed and the parent fsynced.
Nothing older is removed before that. No pickle.
"""

import errno
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
from regpt2.base.files import describe_os_error, free_bytes, fsync_dir, make_dir, require_free_space
from regpt2.model.files.load import verify_files
from regpt2.model.files.safe_json import read_json
from regpt2.model.files.tensors import read_tensors
from regpt2.training import lora
from regpt2.training.host_copy import HostCopies
from regpt2.training.readback import read_back, write_small

MODEL, CONFIG, OPTIMIZER, STATE = "model.safetensors", "config.json", "optimizer.safetensors", "state.json"
FILES = (MODEL, CONFIG, OPTIMIZER, STATE)
MANIFEST = "manifest.json"
BEST = "best"  # training/saving/best_checkpoint.py
UNFINISHED = ("tmp-step-*", f"tmp-{BEST}-*")
_MOMENT = "optimizer: "  # before a name that a weight might have too
_STEP = re.compile(r"step-(\d{8,})")
_BAD = re.compile(r"bad-step-(\d{8,})(-\d+)?")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, copied out of the running model."""

    step: int
    config_json: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    """None: a model alone, from which no run resumes."""
    state: dict[str, Any]
    others: Mapping[str, bytes]
    """Further files by name."""


def snapshot(
    step: int,
    config_json: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    copies: HostCopies | None = None,
    others: Mapping[str, bytes] | None = None,
) -> Snapshot:
    """A copy in main memory: what happens to the weights afterwards does not reach it.

    With `copies`, which a run keeps, a GPU's tensors go into buffers that the next snapshot uses again.
    """
    taken = (copies or HostCopies()).take({**model, **{_MOMENT + name: t for name, t in (optimizer or {}).items()}})
    of_model = {name: taken[name] for name in model}
    of_optimizer = None if optimizer is None else {name: taken[_MOMENT + name] for name in optimizer}
    return Snapshot(step, config_json, of_model, of_optimizer, json.loads(json.dumps(dict(state))), others or {})


def write(checkpoints: Path, snap: Snapshot) -> Path:
    """Write one checkpoint, verified against `snap`, and return its folder. One process at a time for a run.

    Raises:
        Problem: too little space is free, or the disk returns other bytes than were written.
        OSError: it filled up in the middle, or may not be written; nothing is left under the final name.
    """
    final = checkpoints / f"step-{snap.step:08d}"

    def put(part: Path) -> None:
        if final.exists():  # of a former run over the same steps, or left by hand
            set_aside(final)
        os.rename(part, final)

    write_as(checkpoints, final.name, snap, put)
    return final


def write_as(checkpoints: Path, name: str, snap: Snapshot, put: Callable[[Path], None]) -> None:
    """Write all files into a folder of a temporary name, and let `put` give it its own. Errors as of `write`."""
    remove_unfinished(checkpoints)  # first: they take room
    tensors = {MODEL: snap.model} | ({} if snap.optimizer is None else {OPTIMIZER: snap.optimizer})
    small = {
        CONFIG: snap.config_json.encode(),
        STATE: (json.dumps(snap.state, indent=1) + "\n").encode(),
        **snap.others,
    }
    n_bytes = sum(t.nbytes for held in tensors.values() for t in held.values()) + sum(map(len, small.values()))
    require_free_space(checkpoints, room_bytes(n_bytes), f"the checkpoint of step {snap.step}")
    part = checkpoints / f"tmp-{name}-{os.getpid()}"
    make_dir(checkpoints)
    part.mkdir()
    try:
        hashes = {file: _write_tensors(part / file, held) for file, held in tensors.items()}
        hashes |= {file: write_small(part / file, data) for file, data in small.items()}
        files = {file: {"bytes": (part / file).stat().st_size, "sha256": sha256} for file, sha256 in hashes.items()}
        write_small(part / MANIFEST, (json.dumps({"step": snap.step, "files": files}, indent=1) + "\n").encode())
        for file in tensors:  # the library makes its files for this user's eyes alone
            shutil.copymode(part / CONFIG, part / file)
        fsync_dir(part)
        put(part)
        fsync_dir(checkpoints)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file to the disk; its SHA-256."""
    try:
        save_file(tensors, path)
    except Exception as error:  # the library has errors of its own for a full disk
        raise Problem(f"{path} could not be written ({error}); free some space or choose another folder.") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return read_back(path, tensors)


def room_bytes(tensor_bytes: int) -> int:
    """What one checkpoint takes: its tensors, and something for the rest."""
    return int(1.01 * tensor_bytes) + (1 << 20)


def require_room(
    checkpoints: Path, tensor_bytes: int, *, keep: int, saves_left: int, best_bytes: int = 0, once_bytes: int = 0
) -> None:
    """Refuse a run whose checkpoints will not fit on the disk together. Writes nothing.

    Args:
        tensor_bytes: of one checkpoint; with AdamW 12 for each parameter.
        keep: as for `prune`. A new one is written before an old one goes, so there is one more at times.
        saves_left: how many this run will still write.
        best_bytes: of the best checkpoint, of which there are two while a new one is written; 0 = none is kept.
        once_bytes: what it will write beside them.

    Raises:
        Problem: the checkpoints still to come need more than is free.
    """
    more = min(saves_left, max(1, keep + 1 - len(folders(checkpoints)))) if keep else saves_left
    best = bool(best_bytes) * (2 - (checkpoints / BEST).is_dir())
    need_bytes = more * room_bytes(tensor_bytes) + best * room_bytes(best_bytes) + once_bytes
    unfinished_bytes = sum(path.stat().st_size for path in checkpoints.glob("tmp-*/*"))  # the first save frees it
    have_bytes = free_bytes(checkpoints) + unfinished_bytes
    if have_bytes < need_bytes:
        beside = f", and {best} best ones of {best_bytes / 1e6:,.1f} MB" if best else ""
        raise Problem(
            f"{checkpoints}: this run will hold {more} more checkpoints at once, of {tensor_bytes / 1e6:,.1f} MB each"
            f"{beside}; they need {need_bytes / 1e6:,.1f} MB and {have_bytes / 1e6:,.1f} MB are free. Keep fewer with "
            "--keep-checkpoints, put --run on another disk, or free some space."
        )


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
    found = [path for path in checkpoints.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def bad_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted(path for path in checkpoints.glob("bad-step-*") if path.is_dir() and _BAD.fullmatch(path.name))


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, also of one that was set aside."""
    match = _STEP.fullmatch(folder.name) or _BAD.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint by its name; expected step-00001000 or the like.")
    return int(match[1])


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing or differs in size or SHA-256, or the checkpoint is of another step.
    """
    try:
        verify_manifest(folder)
        verify_files(folder, files_of(folder))
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # permissions, say: no fault of the checkpoint
        raise CheckpointError(f"{folder} cannot be read: {describe_os_error(error)}") from error


def files_of(folder: Path) -> tuple[str, ...]:
    """The names of its files: the adapters' where its manifest lists them."""
    listed = read_json(folder / MANIFEST).get("files")
    return (*FILES, *(name for name in (lora.WEIGHTS, lora.CONFIG) if isinstance(listed, dict) and name in listed))


def verify_manifest(folder: Path) -> None:
    """Check that the manifest is there and is that of this checkpoint.

    Raises:
        CheckpointError: it is not.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no manifest.json: it was not written to its end.")
    manifest = read_json(folder / MANIFEST)
    if manifest.keys() != {"step", "files"}:
        raise CheckpointError(f"{folder / MANIFEST} has the keys {sorted(manifest)!s:.200}, expected files and step.")
    if manifest["step"] != step_of(folder):
        raise CheckpointError(
            f"{folder / MANIFEST} is that of step {manifest['step']!r:.40}, expected {step_of(folder)} by its folder."
        )


def newest_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies, or None if there is none. Bad ones are set aside, with a warning.

    Raises:
        CheckpointError: there are checkpoints and every one is bad, now or since an earlier start: training on would
            silently start from nothing.
    """
    for folder in reversed(folders(checkpoints)):
        if (reason := fault(folder)) is None:
            return folder
        warn(f"{reason} It is set aside as {set_aside(folder).name}; trying the one before it.")
    if bad := bad_folders(checkpoints):
        reasons = "\n".join(f"  {fault(folder) or f'{folder} is whole: rename it back to use it.'}" for folder in bad)
        raise CheckpointError(
            f"{checkpoints}: all {len(bad)} checkpoints were damaged and set aside:\n{reasons}\n"
            "Start again with another --run folder, or remove these to start this run afresh."
        )
    return None


def fault(folder: Path) -> str | None:
    """What `verify` has against a checkpoint; None if it is good."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
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
    if state.get("step") != step_of(folder):
        raise CheckpointError(
            f"{folder / STATE} is that of step {state.get('step')!r:.40}, expected {step_of(folder)} by its folder."
        )
    return Checkpoint(
        folder=folder,
        step=state["step"],
        config=read_json(folder / CONFIG),
        model=read_tensors(folder / MODEL),
        optimizer=read_tensors(folder / OPTIMIZER),
        state=state,
    )


def prune(checkpoints: Path, keep: int, verified: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (0 = keep all), and what killed saves and prunes have left behind.

    They are counted from `verified` down: the one just written; by default the newest that verifies, and without one
    nothing is removed. What lies above it is bad, or not of this run: it neither counts nor goes.
    """
    remove_unfinished(checkpoints)
    if not keep:
        return
    there = folders(checkpoints)
    verified = verified or next((folder for folder in reversed(there) if fault(folder) is None), None)
    if verified is None:
        return
    below = [folder for folder in there if step_of(folder) <= step_of(verified)]
    kept = [folder for folder in below if (folder / MANIFEST).is_file()][-keep:]
    for folder in below:
        if folder not in kept:
            _remove(folder)


def unfinished(checkpoints: Path) -> list[Path]:
    """Saves that were interrupted, or are under way."""
    return sorted(path for pattern in UNFINISHED for path in checkpoints.glob(pattern))


def remove_unfinished(checkpoints: Path) -> None:
    """What killed saves have left: nobody else saves into this folder, so nobody is at work on it."""
    for path in unfinished(checkpoints):
        shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. One that cannot be removed costs room, not the run."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed one is never taken for good
        shutil.rmtree(folder)
    except OSError as error:
        warn(f"an old checkpoint stays: {describe_os_error(error)}")


class Saver:
    """Saves in the background: the loop stops only to copy. At most one save, and one copy, is under way."""

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self.checkpoints, self.keep = checkpoints, keep
        self.copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, take: Callable[[], Snapshot], put: Callable[[Path, Snapshot], object] | None = None) -> None:
        """Wait for the save before this one, take the snapshot, which may use `copies` again, begin to write it.

        `put` writes it; by default it becomes the newest checkpoint, and the oldest goes.
        An earlier save that failed is reported; this one is attempted as usual.
        """
        if (failure := self.wait()) is not None:
            warn(f"{failure} Trying again now.")
        snap = take()
        self._thread = threading.Thread(target=self._write, args=(snap, put or self._put_newest), name="save")
        self._thread.start()

    def wait(self) -> Problem | None:
        """Wait until the save under way is on disk; returns its problem, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return None
        said = describe_os_error(error) if isinstance(error, OSError) else str(error)
        return Problem(f"a checkpoint could not be saved: {said} Those before it, if any, are untouched.")

    def close(self) -> None:
        """Wait, and warn if the last save failed: a run that ends by another error must show that one."""
        if (failure := self.wait()) is not None:
            warn(str(failure))

    def _put_newest(self, checkpoints: Path, snap: Snapshot) -> None:
        prune(checkpoints, self.keep, verified=write(checkpoints, snap))

    def _write(self, snap: Snapshot, put: Callable[[Path, Snapshot], object]) -> None:
        try:
            put(self.checkpoints, snap)
        except BaseException as error:  # handed to the loop by wait()
            self._error = error
