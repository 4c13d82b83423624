"""Finished parts in, shards of a fixed size out, in the order of the plan; a ledger remembers how far that is.

The ledger is replaced after every shard, and a part is deleted only when the ledger no longer needs it. So after a
kill at any point the same calls go on from the last shard and write the same bytes.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.base.files import write_atomic
from regpt2.data.manifest import SPLITS, TOKEN_BYTES, Shard
from regpt2.data.parts import PARTS_NAME, PartResult, Tally, part_file
from regpt2.data.shards import LEDGER_NAME, shard_name, write_shard

READ_TOKENS = 1 << 20


@dataclass
class Progress:
    """Where the packing of one split stands: the first token that is in no shard yet is `offset` in part `part`."""

    part: int = 0
    offset: int = 0
    shards: list[Shard] = field(default_factory=list)


@dataclass
class Ledger:
    """`.prepare.json`. Parts before `folded` are wholly in shards and their amounts in `tallies` and `skipped`."""

    settings: dict[str, str]
    plan: str  # fingerprint
    folded: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in SPLITS})
    skipped: dict[str, int] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=lambda: {name: Progress() for name in SPLITS})

    def write(self, folder: Path) -> None:
        """Replace the ledger in `folder`, atomically."""
        write_atomic(folder / LEDGER_NAME, json.dumps(asdict(self), ensure_ascii=False))

    @classmethod
    def read(cls, folder: Path) -> "Ledger | None":
        """The ledger in `folder`; None if no preparation was begun there.

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
            return cls(**content)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove {folder} and prepare it again.") from None


class Packer:
    """Takes parts in the order of the plan and writes a shard as soon as there are tokens for one."""

    def __init__(self, folder: Path, dataset: str, shard_tokens: int, ledger: Ledger) -> None:
        self.folder, self.dataset, self.shard_tokens, self.ledger = folder, dataset, shard_tokens, ledger
        self.parts_folder = folder / PARTS_NAME
        self._results: dict[int, PartResult] = {}  # parts from `folded` on that have been taken
        self._waiting = dict.fromkeys(SPLITS, 0)  # their tokens that are in no shard yet
        self._fold()

    def take(self, index: int) -> None:
        """Take the next part, which must be finished; parts are taken in order, from `ledger.folded` on."""
        result = PartResult.read(self.parts_folder, index)
        assert result is not None, f"part {index} is not finished"
        self._results[index] = result
        for name in SPLITS:
            self._waiting[name] += self._unpacked(name, index)
        for name in SPLITS:
            while self._waiting[name] >= self.shard_tokens:
                self._write_shard(name, self.shard_tokens)

    def finish(self) -> tuple[dict[str, Tally], dict[str, int]]:
        """Write what is left to a last, shorter shard of each split; the amounts of everything and the skips.

        Raises:
            DataError: a split has no document.
        """
        tallies = {name: Tally(**asdict(tally)) for name, tally in self.ledger.tallies.items()}
        skipped = Counter(self.ledger.skipped)
        for result in self._results.values():
            skipped.update(result.skipped)
            for name in SPLITS:
                tallies[name].add(result.splits[name])
        _require_documents(tallies, skipped)
        for name in SPLITS:
            if self._waiting[name]:
                self._write_shard(name, self._waiting[name])
        return tallies, dict(sorted(skipped.items()))

    def _unpacked(self, name: str, index: int) -> int:
        progress = self.ledger.progress[name]
        if index < progress.part:
            return 0
        return self._results[index].splits[name].tokens - (progress.offset if index == progress.part else 0)

    def _write_shard(self, name: str, n_tokens: int) -> None:
        progress = self.ledger.progress[name]
        file_name = shard_name(self.dataset, name, len(progress.shards))
        cursor = _Cursor(progress.part, progress.offset)
        shard = write_shard(self.folder / file_name, n_tokens, self._tokens(name, cursor, n_tokens))
        progress.part, progress.offset = cursor.part, cursor.offset
        progress.shards.append(shard)
        self._waiting[name] -= n_tokens
        self._fold()

    def _tokens(self, name: str, cursor: "_Cursor", count: int) -> Iterator[npt.NDArray[np.uint16]]:
        """The next `count` tokens of a split; `cursor` moves along."""
        while count:
            path = part_file(self.parts_folder, cursor.part, name)
            wanted = min(count, READ_TOKENS, self._results[cursor.part].splits[name].tokens - cursor.offset)
            if not wanted:
                cursor.part, cursor.offset = cursor.part + 1, 0
                continue
            tokens = np.fromfile(path, dtype="<u2", count=wanted, offset=TOKEN_BYTES * cursor.offset)
            if len(tokens) != wanted:
                raise DataError(f"{path} is truncated; remove {self.folder} and prepare it again.")
            yield tokens
            cursor.offset += wanted
            count -= wanted

    def _fold(self) -> None:
        """Count the parts that no shard will need again into the ledger, write it, and only then delete them."""
        ledger = self.ledger
        needed = min(progress.part for progress in ledger.progress.values())
        while ledger.folded < needed:
            result = self._results.pop(ledger.folded)
            ledger.skipped = dict(Counter(ledger.skipped) + Counter(result.skipped))
            for name in SPLITS:
                ledger.tallies[name].add(result.splits[name])
            ledger.folded += 1
        ledger.write(self.folder)
        for path in self.parts_folder.glob("[0-9]*.*"):
            index, kind = path.name.split(".")[:2]
            if int(index) < (ledger.progress[kind].part if kind in SPLITS else ledger.folded):
                path.unlink()


@dataclass
class _Cursor:
    part: int
    offset: int


def discard(folder: Path, dataset: str) -> None:
    """Remove everything that an unfinished preparation wrote, the ledger first of all."""
    (folder / LEDGER_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    for name in SPLITS:
        for path in folder.glob(f"{dataset}_{name}_*.bin"):
            path.unlink()


def _require_documents(tallies: dict[str, Tally], skipped: Counter[str]) -> None:
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(skipped.items())) or "nothing was skipped"
    if not any(tally.documents for tally in tallies.values()):
        raise DataError(f"there is no document in the input ({reasons}).")
    for name, tally in tallies.items():
        if not tally.documents:
            total = sum(each.documents for each in tallies.values())
            direction = "larger" if name == "val" else "smaller"
            raise DataError(
                f"none of the {total:,} documents fell to the {name} split; choose a {direction} --val-fraction, "
                f"or add documents ({reasons})."
            )
