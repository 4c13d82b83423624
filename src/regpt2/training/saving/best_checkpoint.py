"""The best checkpoint. In: a model and its validation loss; out: `checkpoints/best`, the model files of the lowest one.

It is a MODEL for every command, and no run resumes from it: there is no optimizer.safetensors. A new one is written
beside the old one, which is renamed to old-best, takes its name, and only then the old one is removed. A kill between
the two renames leaves old-best alone: the next start gives it its name back.
"""

import os
import shutil
from pathlib import Path

from regpt2.base.errors import CheckpointError
from regpt2.base.files import fsync_dir
from regpt2.model.files.load import verify_files
from regpt2.model.files.safe_json import read_json
from regpt2.training.checkpoint import BEST, CONFIG, MANIFEST, MODEL, STATE, Snapshot, write_as

FILES = (MODEL, CONFIG, STATE)
OLD = f"old-{BEST}"


def write_best(checkpoints: Path, snap: Snapshot) -> None:
    """Write the best checkpoint anew, verified against `snap`. The one before it stays until this one is whole.

    Raises:
        Problem, OSError: as `checkpoint.write`; the one before it is then still there.
    """
    final, old = checkpoints / BEST, checkpoints / OLD

    def put(part: Path) -> None:
        if final.exists():
            os.rename(final, old)  # no system exchanges folders everywhere
        os.rename(part, final)

    recover_best(checkpoints)
    try:
        write_as(checkpoints, BEST, snap, put)
    finally:
        recover_best(checkpoints)


def recover_best(checkpoints: Path) -> None:
    """End what a kill or an error has interrupted: the best checkpoint has its name, and there is no other."""
    final, old = checkpoints / BEST, checkpoints / OLD
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, final)
        fsync_dir(checkpoints)


def figures_of(folder: Path) -> tuple[int, float]:
    """Step and validation loss of a best checkpoint.

    Raises:
        CheckpointError: its state.json is missing, or has none.
    """
    state = read_json(folder / STATE)
    step, loss = state.get("step"), state.get("val_loss")
    if not (isinstance(step, int) and isinstance(loss, float)):
        raise CheckpointError(f"{folder / STATE} has no step and val_loss: it is not that of a best checkpoint.")
    return step, loss


def best_step_of(folder: Path) -> int | None:
    """The step of a best checkpoint; None if there is none."""
    try:
        return figures_of(folder)[0]
    except (CheckpointError, OSError):
        return None


def kept_step(checkpoints: Path) -> int | None:
    """The step of the best checkpoint on the disk; None if there is none, or it is not whole."""
    try:
        verify_best(checkpoints / BEST)
    except (CheckpointError, OSError):
        return None
    return best_step_of(checkpoints / BEST)


def verify_best(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: a file is missing or differs in size or SHA-256, or the parts are of different steps.
    """
    verify_best_manifest(folder)
    verify_files(folder, FILES)


def verify_best_manifest(folder: Path) -> None:
    """Check that the manifest is there, and of the step in state.json.

    Raises:
        CheckpointError: it is not.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no manifest.json: it was not written to its end.")
    manifest, (step, _) = read_json(folder / MANIFEST), figures_of(folder)
    if manifest.get("step") != step:
        raise CheckpointError(f"{folder / MANIFEST} is that of step {manifest.get('step')!r:.40}, expected {step}.")
