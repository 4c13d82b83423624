"""The record of an unfinished preparation, `.prepare.json`. In: a folder, settings, a plan; out: how far packing is.

The ledger is replaced after every shard, and a part is deleted only when the ledger no longer needs it. So after a
kill at any point the same calls resume at the last shard and write the same bytes. While it exists, training refuses
the folder.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regpt2.base.console import say
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import write_atomic
from regpt2.data.preparing.encode_part import PARTS_NAME
from regpt2.data.preparing.hold_out import Digests, HoldOut
from regpt2.data.tokenizer import OWN_FILE
from regpt2.data.tokens.manifest import IDENTITY, MANIFEST_NAME, MASK_SUFFIX, SPLITS, Manifest, Shard
from regpt2.data.tokens.shards import LEDGER_NAME
from regpt2.data.tokens.writing import Tally

ENCODER = "encoder"  # among the options in the manifest
HELD_OUT = "held_out"  # the same, where a split would have been empty


@dataclass
class Progress:
    """How far one split is packed: the first token that is in no shard yet is `offset` in part `part`."""

    part: int = 0
    offset: int = 0
    shards: list[Shard] = field(default_factory=list)


@dataclass
class Ledger:
    """Parts before `folded` are wholly in shards, and their amounts in `tallies` and `skipped`."""

    settings: dict[str, str]
    plan: str  # fingerprint
    folded: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in SPLITS})
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=lambda: {name: Progress() for name in SPLITS})
    encoders: list[str] = field(default_factory=list)
    digests: Digests = field(default_factory=Digests)
    hold_out: HoldOut = field(default_factory=HoldOut)
    """Set when a first pass has left a split empty: then all parts are encoded again by this rule."""

    def write(self, folder: Path) -> None:
        write_atomic(folder / LEDGER_NAME, json.dumps(asdict(self), ensure_ascii=False))

    @classmethod
    def read(cls, folder: Path) -> "Ledger | None":
        """The ledger in `folder`; None if no preparation was started there.

        Raises:
            DataError: it cannot be understood.
        """
        path = folder / LEDGER_NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            content["tallies"] = {name: Tally(**content["tallies"][name]) for name in SPLITS}
            content["progress"] = {name: Progress(**content["progress"][name]) for name in SPLITS}
            for progress in content["progress"].values():
                progress.shards = [Shard(**shard) for shard in progress.shards]
            content["digests"] = Digests(**content.get("digests", {}))
            content["hold_out"] = HoldOut(**content.get("hold_out", {}))
            return cls(**content)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove {folder} and prepare it again.") from None


def complete_already(folder: Path, settings: dict[str, str]) -> Manifest | None:
    """The manifest, if the folder is finished.

    Raises:
        UsageError: it was made with other settings.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.read(folder)
    existing = {name: getattr(manifest, name) for name in IDENTITY} | manifest.options
    existing.pop(ENCODER, None)  # another encoder gives the same ids
    existing.pop(HELD_OUT, None)  # decided by the input
    _require_same(folder, existing, settings)
    clear(folder)
    say(f"{folder} is complete already; nothing to do.")
    return manifest


def begin(folder: Path, settings: dict[str, str], plan: str, *, keep_parts_tmp: bool = False) -> Ledger:
    """The ledger of an earlier call with the same settings and plan, or a new one, not written yet.

    `keep_parts_tmp`: leave unfinished files of parts alone, because another machine may still be writing them.

    Raises:
        UsageError: the folder holds tokens of another origin, or a preparation with other settings.
        DataError: the input has changed since the preparation was started.
    """
    ledger = Ledger.read(folder)
    if ledger is None:
        if foreign := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".npy", ".ds")):
            raise UsageError(
                f"{folder} already holds tokens that this command did not write ({foreign[0]}); choose another --out."
            )
        ledger = Ledger(settings, plan)
    else:
        _require_same(folder, ledger.settings, settings)
        if ledger.plan != plan:
            raise changed(folder)
        if ledger.hold_out.digest:
            _remove_first_pass(folder, ledger)
    (folder / PARTS_NAME).mkdir(exist_ok=True)
    for place in [folder] if keep_parts_tmp else [folder, folder / PARTS_NAME]:
        for left_by_a_kill in place.glob(".*.tmp"):
            left_by_a_kill.unlink()
    return ledger


def begin_again(folder: Path, ledger: Ledger, hold_out: HoldOut) -> None:
    """Forget all that was encoded and packed; from now on the split of a document is decided by `hold_out`.

    A kill before the new ledger is written leaves a preparation in which some parts are missing, which is continued.
    """
    for path in sorted((folder / PARTS_NAME).glob("[0-9]*.*"), key=lambda path: path.suffix != ".json"):
        if int(path.name.split(".")[0]) >= ledger.folded:
            path.unlink()
    ledger = Ledger(ledger.settings, ledger.plan, hold_out=hold_out)
    ledger.write(folder)
    _remove_first_pass(folder, ledger)


def _remove_first_pass(folder: Path, ledger: Ledger) -> None:
    """Remove the shards that this ledger does not know, and their masks."""
    shards = [shard for progress in ledger.progress.values() for shard in progress.shards]
    known = {shard.file for shard in shards} | {shard.mask for shard in shards}
    for path in _shards(folder, ledger.settings["dataset"]):
        if path.name not in known:
            path.unlink()


def _require_same(folder: Path, existing: dict[str, str], settings: dict[str, str]) -> None:
    for name in dict.fromkeys([*settings, *existing]):
        if existing.get(name) != settings.get(name):
            is_commit = name == "revision" and re.fullmatch("[0-9a-f]{40}", existing.get(name, ""))
            resume = f"resume with --revision {existing[name]}, " if is_commit else ""
            raise UsageError(
                f"{folder} holds another preparation: its {name} is {existing.get(name)!r}, this command's is "
                f"{settings.get(name)!r}; {resume}choose another --out, or remove the folder."
            )


def changed(folder: Path) -> DataError:
    """The error for input that changed after it was planned."""
    return DataError(
        f"{folder}: the input files have changed (names, sizes or times) since this preparation was started; "
        "remove the folder and run the command again."
    )


def clear(folder: Path) -> None:
    """Remove what only an unfinished preparation needs."""
    shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    (folder / LEDGER_NAME).unlink(missing_ok=True)


def discard(folder: Path, dataset: str) -> None:
    """Remove everything that an unfinished preparation wrote, the ledger first."""
    (folder / LEDGER_NAME).unlink(missing_ok=True)
    clear(folder)
    (folder / OWN_FILE).unlink(missing_ok=True)
    for path in _shards(folder, dataset):
        path.unlink()


def _shards(folder: Path, dataset: str) -> list[Path]:
    """The shards in the folder, and their masks."""
    return [
        path
        for name in SPLITS
        for suffix in (".bin", MASK_SUFFIX)
        for path in folder.glob(f"{dataset}_{name}_*{suffix}")
    ]
