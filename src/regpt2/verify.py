"""Check by hand. In: runs, checkpoints, data folders; out: a line for each thing looked at, 1 if any is bad.

regpt2 verify runs/gpt2_124m data/fineweb_edu

Everything is read to its end and compared with its hashes, its shape and its neighbors. Nothing on the disk is changed.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import ProgressLine, say
from regpt2.base.errors import CheckpointError, DataError, Problem, UsageError
from regpt2.base.files import describe_os_error, write_atomic
from regpt2.base.metrics import read_events
from regpt2.config import read_toml
from regpt2.data.foreign import foreign_files
from regpt2.data.manifest import MANIFEST_NAME, SPLITS, Manifest
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.shards import LEDGER_NAME, Shard, open_tokens, verify_shard
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.load import read_json, verify_files
from regpt2.training import checkpoint

_IDS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Options:
    """Check runs, checkpoints and data folders: hashes, shapes, finite values, the record. Changes nothing."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT|DATA")]
    """What to check; several may be given."""
    json: Path | None = None
    """Also write the findings to this JSON file."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    status: str
    """ok, BAD, or note: nothing wrong, but worth knowing."""
    text: str


@dataclass
class Findings:
    """Says each finding at once, and keeps it."""

    all: list[Finding] = field(default_factory=list)

    def add(self, what: object, status: str, text: str = "") -> None:
        """One more."""
        self.all.append(Finding(str(what), status, text))
        say(f"{status:<4} {what}" + (f": {text}" if text else ""))

    def check(self, what: object, look: Callable[[], str | None]) -> bool:
        """Is it good? `look` raises what is bad about it, or returns what there is to say of it."""
        try:
            self.add(what, "ok", look() or "")
        except (Problem, OSError) as error:
            self.add(what, "BAD", describe_os_error(error) if isinstance(error, OSError) else str(error))
            return False
        return True

    @property
    def n_bad(self) -> int:
        """How many are bad."""
        return sum(finding.status == "BAD" for finding in self.all)


def main(arguments: list[str]) -> int:
    """The verb `regpt2 verify`."""
    options = tyro.cli(Options, prog="regpt2 verify", args=arguments)
    if not options.folders:
        raise UsageError("nothing to check: regpt2 verify RUN|CHECKPOINT|DATA ...")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")
    looks = [(folder, _kind(folder)) for folder in options.folders]  # usage first, before any work
    findings = Findings()
    for folder, look in looks:
        look(folder, findings)
    if options.json is not None:
        write_atomic(options.json, json.dumps([asdict(finding) for finding in findings.all], indent=1) + "\n")
    say(f"{len(findings.all)} things checked, {findings.n_bad or 'none'} bad.")
    return 1 if findings.n_bad else 0


def _kind(folder: Path) -> Callable[[Path, Findings], None]:
    """How to look at a folder, by what lies in it."""
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
    """The recipe, the record, every checkpoint, and whether the data is the one that it was trained on."""
    findings.check(run / "config.toml", lambda: _recipe(run / "config.toml"))
    checkpoints = run / "checkpoints"
    there = checkpoint.folders(checkpoints)
    findings.check(run / "metrics.jsonl", lambda: _record(run / "metrics.jsonl", there))
    for folder in checkpoint.bad_folders(checkpoints):
        findings.add(folder, "note", "set aside as damaged, never used")
    for folder in sorted(checkpoints.glob("tmp-step-*")):
        findings.add(folder, "note", "left by a save that was killed, or under way; the next save removes it")
    if not there:
        findings.add(checkpoints, "BAD" if checkpoint.bad_folders(checkpoints) else "note", "no checkpoint here")
    good = [folder for folder in there if _check_checkpoint(folder, findings)]
    if good:
        _check_data_of_run(run, good[-1], findings)


def _recipe(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError("missing: the run cannot go on without it.")
    config = read_toml(path)
    return f"a recipe of {config.max_steps:,} steps"


def _record(path: Path, checkpoints: list[Path]) -> str:
    """Does the record have one line for each update, in order, at least up to the newest checkpoint?"""
    if not path.is_file():
        raise DataError("missing: what the run did is not recorded.")
    expected = 1
    for event in read_events(path):
        if event["event"] != "train":
            continue
        if event["step"] != expected:
            fault = "comes again" if event["step"] in range(1, expected) else f"follows step {expected - 1}"
            raise DataError(f"step {event['step']!r:.40} {fault}, expected step {expected}.")
        expected += 1
    if checkpoints and expected <= (newest := checkpoint.step_of(checkpoints[-1])):
        raise DataError(f"it ends at step {expected - 1}, before the newest checkpoint, of step {newest}.")
    cut = "" if path.read_bytes()[-1:] in (b"\n", b"") else "; the last line is cut short, the next start drops it"
    return f"steps 1 to {expected - 1}, none missing, none twice{cut}"


def check_checkpoint(folder: Path, findings: Findings) -> None:
    """A checkpoint by itself."""
    _check_checkpoint(folder, findings)


def _check_checkpoint(folder: Path, findings: Findings) -> bool:
    whole = findings.check(folder / checkpoint.MANIFEST, lambda: checkpoint.verify_manifest(folder))
    megabytes = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir() if path.is_file()}
    with ProgressLine(f"checking {folder.name}", sum(megabytes.values()), "MB") as progress:
        for name in checkpoint.FILES:
            whole &= findings.check(folder / name, partial(verify_files, folder, (name,)))
            progress.advance(megabytes.get(name, 0.0))
    return whole and findings.check(folder, lambda: checkpoint.check_content(folder))


def _check_data_of_run(run: Path, newest: Path, findings: Findings) -> None:
    try:
        config = read_toml(run / "config.toml")
        shares = read_shares(config.data, config.mix)
    except Problem:  # it was said above
        return
    folders = " ".join(str(share.folder) for share in shares)
    if not all(share.folder.is_dir() for share in shares):
        findings.add(folders, "note", "not here: not compared with what the run was trained on")
        return
    expected = str(read_json(newest / checkpoint.STATE).get("data_fingerprint"))

    def compare() -> str:
        with open_mixture(shares) as data:
            if data.fingerprint != expected:
                raise DataError(f"it has fingerprint {data.fingerprint[:16]}, the run was trained on {expected[:16]}.")
        return f"the data that the run was trained on; regpt2 verify {folders} checks its content"

    findings.check(folders, compare)


def check_data(data: Path, findings: Findings) -> None:
    """Every shard against the manifest, where there is one, and every id against the vocabulary."""
    if not (data / MANIFEST_NAME).exists():
        _check_foreign_data(data, findings)
        return
    if not findings.check(data / MANIFEST_NAME, lambda: f"fingerprint {Manifest.read(data).fingerprint[:16]}"):
        return
    manifest = Manifest.read(data)
    whole = dict.fromkeys(manifest.splits, True)
    with ProgressLine("checking shards", sum(shard.bytes for shard in manifest.shards) / 1e6, "MB") as progress:
        for name, split in manifest.splits.items():
            for shard in split.shards:
                whole[name] &= findings.check(data / shard.file, partial(_shard, data, shard, progress))
    for name in manifest.splits:
        if whole[name]:
            _check_ids(data, name, manifest, findings)


def _shard(data: Path, shard: Shard, progress: ProgressLine) -> None:
    verify_shard(data, shard, lambda n_bytes: progress.advance(n_bytes / 1e6))


def _sizes(data: Path, split: str) -> str:
    return f"{len(foreign_files(data, split))} of the right size"


def _check_foreign_data(data: Path, findings: Findings) -> None:
    if (data / LEDGER_NAME).exists():
        findings.add(data, "BAD", "its preparation is not finished; run the same `regpt2 prepare` command again.")
        return
    findings.add(data, "note", "no manifest.json: made by another project; only sizes and ids can be checked")
    for split in SPLITS:
        whole = findings.check(f"{data}, {split} files", partial(_sizes, data, split))
        if whole and foreign_files(data, split):
            _check_ids(data, split, None, findings)


def _check_ids(data: Path, split: str, manifest: Manifest | None, findings: Findings) -> None:
    """Read all ids of a split; with a manifest, count its documents too: each begins with an end of text."""
    eot = _end_of_text(manifest, findings)

    def look() -> str:
        documents = 0
        with (
            open_tokens(data, split) as tokens,
            ProgressLine(f"reading {split}", tokens.n_tokens, "tokens") as progress,
        ):
            for start in range(0, tokens.n_tokens, _IDS_AT_ONCE):
                ids = tokens.read(start, min(_IDS_AT_ONCE, tokens.n_tokens - start))  # refuses ids that no token has
                documents += int((ids == eot).sum())
                progress.advance(len(ids))
            n_tokens = tokens.n_tokens
        if manifest is None or eot is None:
            return f"{n_tokens:,} tokens, all in the vocabulary"
        if documents != (expected := manifest.splits[split].documents):
            raise DataError(f"{documents:,} documents, expected {expected:,} by the manifest.")
        return f"{n_tokens:,} tokens in {documents:,} documents, all in the vocabulary"

    findings.check(f"{data}, {split} split", look)


def _end_of_text(manifest: Manifest | None, findings: Findings) -> int | None:
    if manifest is None:
        return None
    try:
        return load_tokenizer(manifest.tokenizer).eot
    except Problem as error:
        findings.add(manifest.tokenizer, "note", f"the documents are not counted: {error}")
        return None
