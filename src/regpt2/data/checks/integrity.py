"""Check a data folder. In: the folder; out: a finding for each file and split, printed at once and kept.

Every shard is compared with the manifest, where there is one, and every id with the vocabulary. Nothing is changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from regpt2.base.console import ProgressLine, say
from regpt2.base.errors import DataError, Problem
from regpt2.base.files import describe_os_error
from regpt2.data.checks.counts import ends_of_text
from regpt2.data.tokenizer import OWN, OWN_FILE
from regpt2.data.tokens.manifest import MANIFEST_NAME, SPLITS, Manifest
from regpt2.data.tokens.other_formats import foreign_files
from regpt2.data.tokens.shards import LEDGER_NAME, check_vocabulary, open_tokens, verify_shard

_IDS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Finding:
    what: str
    status: str
    """ok, BAD, or note: nothing wrong, but worth knowing."""
    text: str


@dataclass
class Findings:
    """Prints each finding at once, and keeps it."""

    all: list[Finding] = field(default_factory=list)

    def add(self, what: object, status: str, text: str = "") -> None:
        """Print and keep a finding."""
        self.all.append(Finding(str(what), status, text))
        say(f"{status:<4} {what}" + (f": {text}" if text else ""))

    def check(self, what: object, look: Callable[[], str | None]) -> bool:
        """Whether it is good: `look` raises what is bad about it, or returns a remark."""
        try:
            self.add(what, "ok", look() or "")
        except (Problem, OSError) as error:
            self.add(what, "BAD", describe_os_error(error) if isinstance(error, OSError) else str(error))
            return False
        return True

    @property
    def n_bad(self) -> int:
        return sum(finding.status == "BAD" for finding in self.all)


def check_data(data: Path, findings: Findings) -> None:
    if not (data / MANIFEST_NAME).exists():
        _check_foreign_data(data, findings)
        return
    if not findings.check(data / MANIFEST_NAME, lambda: f"fingerprint {Manifest.read(data).fingerprint[:16]}"):
        return
    manifest = Manifest.read(data)
    if manifest.tokenizer == OWN:
        findings.check(data / OWN_FILE, lambda: f"SHA-256 {check_vocabulary(data, manifest)[:16]}")
    whole = dict.fromkeys(manifest.splits, True)
    with ProgressLine("checking shards", sum(shard.bytes for shard in manifest.shards) / 1e6, "MB") as progress:

        def on_bytes(n_bytes: int) -> None:
            progress.advance(n_bytes / 1e6)

        for name, split in manifest.splits.items():
            for shard in split.shards:
                whole[name] &= findings.check(data / shard.file, partial(verify_shard, data, shard, on_bytes))
    for name in manifest.splits:
        if whole[name]:
            _check_ids(data, name, manifest, findings)


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
    eot = _end_of_text(data, split, manifest, findings)

    def look() -> str:
        documents = 0
        with (
            open_tokens(data, split) as tokens,
            ProgressLine(f"reading {split}", tokens.n_tokens, "tokens") as progress,
        ):
            for start in range(0, tokens.n_tokens, _IDS_AT_ONCE):
                ids = tokens.read(start, min(_IDS_AT_ONCE, tokens.n_tokens - start))  # refuses ids that no token has
                documents += len(ends_of_text(ids, eot))
                progress.advance(len(ids))
            n_tokens = tokens.n_tokens
        if manifest is None or eot is None:
            return f"{n_tokens:,} tokens, all in the vocabulary"
        if documents != (expected := manifest.splits[split].documents):
            raise DataError(f"{documents:,} documents, expected {expected:,} by the manifest.")
        return f"{n_tokens:,} tokens in {documents:,} documents, all in the vocabulary"

    findings.check(f"{data}, {split} split", look)


def _end_of_text(data: Path, split: str, manifest: Manifest | None, findings: Findings) -> int | None:
    if manifest is None:
        return None
    try:
        with open_tokens(data, split) as tokens:
            return tokens.tokenizer().eot
    except Problem as error:
        findings.add(manifest.tokenizer, "note", f"the documents are not counted: {error}")
        return None
