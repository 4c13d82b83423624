"""Are a run's files whole? In: runs, checkpoints, data folders; out: a finding for each thing that was checked.

Each file is read to its end and compared with its hash, its shape and its neighbors. Nothing on the disk is changed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from regpt2.base.console import ProgressLine
from regpt2.base.errors import CheckpointError, DataError, Problem, UsageError
from regpt2.base.record.metrics import read_events
from regpt2.config.toml_file import read_toml
from regpt2.data.checks.integrity import Findings, check_data
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.tokens.manifest import MANIFEST_NAME
from regpt2.model.files.contract import WEIGHTS
from regpt2.model.files.load import verify_files
from regpt2.model.files.safe_json import read_json
from regpt2.run.saving import BASE, read_base
from regpt2.training import checkpoint
from regpt2.training.saving import best_checkpoint
from regpt2.training.saving.content import check_best, check_content


def check_of(folder: Path) -> Callable[[Path, Findings], object]:
    """The check for what a folder holds.

    Raises:
        UsageError: it holds no run, checkpoint or data.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; give a run, a checkpoint or a data folder.")
    if any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        return check_run
    if any((folder / name).exists() for name in checkpoint.FILES):
        return check_checkpoint
    if (folder / MANIFEST_NAME).exists() or any(path.suffix in (".bin", ".npy", ".ds") for path in folder.iterdir()):
        return check_data
    raise UsageError(f"{folder} holds no run, no checkpoint and no token files; give one that does.")


def check_run(run: Path, findings: Findings) -> None:
    """Check the recipe, the record, every checkpoint, and that the data is what the run was trained on."""
    findings.check(run / "config.toml", lambda: _recipe(run / "config.toml"))
    checkpoints = run / "checkpoints"
    there = checkpoint.folders(checkpoints)
    findings.check(run / "metrics.jsonl", lambda: _record(run / "metrics.jsonl", there))
    for folder in checkpoint.bad_folders(checkpoints):
        findings.add(folder, "note", "set aside as damaged; never used")
    for folder in checkpoint.unfinished(checkpoints):
        findings.add(folder, "note", "an unfinished save, interrupted or still running; the next save removes it")
    if (checkpoints / best_checkpoint.OLD).exists():
        findings.add(
            checkpoints / best_checkpoint.OLD, "note", "left by an interrupted save; the next start of the run mends it"
        )
    if (checkpoints / checkpoint.BEST).exists():
        check_checkpoint(checkpoints / checkpoint.BEST, findings)
    if not there:
        findings.add(checkpoints, "BAD" if checkpoint.bad_folders(checkpoints) else "note", "no checkpoint here")
    good = [folder for folder in there if check_checkpoint(folder, findings)]
    if good:
        if sha256 := read_json(good[-1] / checkpoint.STATE).get("base_sha256"):
            findings.check(run / BASE / WEIGHTS, lambda: f"{len(read_base(run, sha256))} frozen weights of LoRA")
        _check_data_of_run(run, good[-1], findings)


def _recipe(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError("missing: the run cannot resume without it.")
    config = read_toml(path)
    return f"a recipe of {config.max_steps:,} steps"


def _record(path: Path, checkpoints: list[Path]) -> str:
    """Check that each update has one line, in order, at least up to the newest checkpoint."""
    if not path.is_file():
        raise DataError("missing: the run has no record.")
    expected = 1
    for event in read_events(path):
        if event["event"] != "train":
            continue
        if event["step"] != expected:
            fault = "is repeated" if event["step"] in range(1, expected) else f"follows step {expected - 1}"
            raise DataError(f"step {event['step']!r:.40} {fault}, expected step {expected}.")
        expected += 1
    if checkpoints and expected <= (newest := checkpoint.step_of(checkpoints[-1])):
        raise DataError(f"it ends at step {expected - 1}, before the newest checkpoint (step {newest}).")
    cut = "" if path.read_bytes()[-1:] in (b"\n", b"") else "; the last line is cut short, a resume drops it"
    return f"steps 1 to {expected - 1}, none missing, none repeated{cut}"


def check_checkpoint(folder: Path, findings: Findings) -> bool:
    """Check a checkpoint by itself; True if it is whole."""
    is_best = folder.name == checkpoint.BEST  # without an optimizer
    verify_manifest, names, content = (
        (best_checkpoint.verify_best_manifest, best_checkpoint.FILES, check_best)
        if is_best
        else (checkpoint.verify_manifest, checkpoint.FILES, check_content)
    )
    whole = findings.check(folder / checkpoint.MANIFEST, lambda: verify_manifest(folder))
    megabytes = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir() if path.is_file()}
    with ProgressLine(f"checking {folder.name}", sum(megabytes.values()), "MB") as progress:
        for name in names if is_best or not whole else checkpoint.files_of(folder):
            whole &= findings.check(folder / name, partial(verify_files, folder, (name,)))
            progress.advance(megabytes.get(name, 0.0))
    return whole and findings.check(folder, lambda: content(folder))


def _check_data_of_run(run: Path, newest: Path, findings: Findings) -> None:
    try:
        config = read_toml(run / "config.toml")
        shares = read_shares(config.data, config.mix)
    except Problem:  # already a finding of the recipe
        return
    folders = " ".join(str(share.folder) for share in shares)
    if not all(share.folder.is_dir() for share in shares):
        findings.add(folders, "note", "not found here, so not compared with what the run was trained on")
        return
    expected = str(read_json(newest / checkpoint.STATE).get("data_fingerprint"))

    def compare() -> str:
        with open_mixture(shares) as data:
            if data.fingerprint != expected:
                raise DataError(f"it has fingerprint {data.fingerprint[:16]}, the run was trained on {expected[:16]}.")
        return f"the data that the run was trained on; regpt2 verify {folders} checks its content"

    findings.check(folders, compare)
