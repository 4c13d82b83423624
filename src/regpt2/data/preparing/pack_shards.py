"""Finished parts in, shards of a fixed size out, in the order of the plan; the ledger remembers how far that is.

Each split has parts and shards of its own; or, with `val_tokens`, all documents are one stream, whose first
`val_tokens` are the validation split, as in the lecture. Copies of an earlier document can be left out on the way.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.data.preparing.encode_part import DOCUMENT_TABLE, PARTS_NAME, PartResult, part_file, table_file
from regpt2.data.preparing.hold_out import HoldOut
from regpt2.data.preparing.ledger import Ledger, Progress
from regpt2.data.sources.filters import Seen
from regpt2.data.sources.plan import Skipped
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import SPLITS, TOKEN_BYTES, described
from regpt2.data.tokens.shards import shard_name, write_shard
from regpt2.data.tokens.writing import Piece, Tally

READ_TOKENS = 1 << 20
COPIES = "documents left out as copies of earlier ones"


class Packer:
    """Takes parts in the order of the plan and writes a shard as soon as there are tokens for one."""

    def __init__(
        self, folder: Path, ledger: Ledger, tokenizer: Tokenizer, *, shard_tokens: int, val_tokens: int, dedup: bool
    ) -> None:
        """`val_tokens`: the first tokens of one stream; 0: the parts have a validation split of their own."""
        self.folder, self.ledger, self.tokenizer = folder, ledger, tokenizer
        self.shard_tokens, self.val_tokens, self.dedup = shard_tokens, val_tokens, dedup
        self.parts_folder = folder / PARTS_NAME
        self._results: dict[int, PartResult] = {}  # parts from `folded` on that have been taken
        self._kept: dict[tuple[int, str], Stretches] = {}
        self._waiting = dict.fromkeys(SPLITS, 0)  # their tokens that are in no shard yet
        self.upcoming = ledger.folded
        """The first part that has not been taken."""
        self._finished: set[int] = set()
        self._seen = Seen()
        if dedup:
            for index in range(ledger.folded):
                self._seen.first(self._table(index)["hash"])
        self._fold()

    def add(self, index: int) -> None:
        """A part is finished; it is taken as soon as all parts before it have been."""
        self._finished.add(index)
        while self.upcoming in self._finished:
            self._take(self.upcoming)
            self.upcoming += 1

    def finish(self, left_out: Skipped) -> tuple[dict[str, Tally], Skipped]:
        """Write what is left to a last, shorter shard of each split; the amounts of everything and the skips.

        `left_out` is what the plan did not take.

        Raises:
            DataError: a split has no document.
        """
        tallies = self._amounts()
        skipped = Skipped()
        skipped.include(left_out, left_out.first)
        skipped.include(self.ledger.skipped, self.ledger.first_skipped)
        for result in self._results.values():
            skipped.include(result.skipped, result.first_skipped)
        reasons = "; ".join(described(skipped, skipped.first)) or "nothing was skipped"
        if self.val_tokens:
            if (n_tokens := tallies["train"].tokens) <= self.val_tokens:
                raise DataError(
                    f"there are {n_tokens:,} tokens, no more than the {self.val_tokens:,} for validation ({reasons}); "
                    "choose a smaller --val-tokens, or add documents."
                )
            val = tallies["val"]
            tallies["train"].add(Tally(-val.documents, -val.tokens, -val.text_bytes))
        else:
            _require_documents(tallies, reasons)
        for name in SPLITS:
            if self._waiting[name]:
                self._write_shard(name, self._waiting[name])
        return tallies, skipped

    def hold_out(self) -> HoldOut | None:
        """What to hold out because a split has no document, once all parts have been added; None if both have."""
        tallies, digests = self._amounts(), replace(self.ledger.digests)
        for result in self._results.values():
            digests.include(result.digests)
        is_decided = self.val_tokens or self.ledger.hold_out.digest or not digests.lowest
        return None if is_decided or all(tally.documents for tally in tallies.values()) else HoldOut.of(digests)

    @property
    def waiting_bytes(self) -> int:
        """Of tokens that were taken and are in no shard yet."""
        return TOKEN_BYTES * sum(self._waiting.values())

    @property
    def encoders(self) -> str:
        return ", ".join(sorted({*self.ledger.encoders, *(result.encoder for result in self._results.values())}))

    def _amounts(self) -> dict[str, Tally]:
        """Of all parts that have been taken."""
        tallies = {name: replace(tally) for name, tally in self.ledger.tallies.items()}
        for result in self._results.values():
            for name in SPLITS:
                tallies[name].add(result.splits[name])
        return tallies

    def _take(self, index: int) -> None:
        result = PartResult.read(self.parts_folder, index)
        assert result is not None, f"part {index} is not finished"
        self._results[index] = self._without_copies(index, result) if self.dedup else result
        for name in SPLITS:
            progress = self.ledger.progress[name]
            begun = progress.offset if index == progress.part else 0
            self._waiting[name] += self._results[index].splits[name].tokens - begun if index >= progress.part else 0
        for name in SPLITS:
            self._write_full_shards(name)

    def _table(self, index: int) -> npt.NDArray[np.void]:
        return np.fromfile(table_file(self.parts_folder, index), dtype=DOCUMENT_TABLE)

    def _without_copies(self, index: int, result: PartResult) -> PartResult:
        """The result without documents that came before; what is left of each token file is noted."""
        table = self._table(index)
        is_new = self._seen.first(table["hash"])
        tallies = {}
        for name in SPLITS:
            of_split = table["is_val"] == (name == "val")
            rows, kept = table[of_split], is_new[of_split]
            self._kept[index, name] = Stretches.of(rows["tokens"], kept)
            amounts = (rows[column][kept].sum(dtype=np.int64) for column in ("tokens", "text_bytes"))
            tallies[name] = Tally(int(kept.sum()), *map(int, amounts))
        n_copies = int(
            np.count_nonzero(~is_new & ~(table["is_val"] & self.ledger.hold_out.cut))
        )  # a cut one has two rows
        copies = {COPIES: n_copies} if n_copies else {}
        return replace(result, splits=tallies, skipped=result.skipped | copies)

    def _write_full_shards(self, name: str) -> None:
        size = self.shard_tokens
        if self.val_tokens and name == "train":  # the one stream: its head is for validation
            while head := min(self._missing_val_tokens(), size):
                if self._waiting[name] < head:
                    return
                self._write_shard("val", head)
        while self._waiting[name] >= size:
            self._write_shard(name, size)

    def _missing_val_tokens(self) -> int:
        return self.val_tokens - sum(shard.tokens for shard in self.ledger.progress["val"].shards)

    def _write_shard(self, name: str, n_tokens: int) -> None:
        stream = "train" if self.val_tokens else name
        place, shards = self.ledger.progress[stream], self.ledger.progress[name].shards
        path = self.folder / shard_name(self.ledger.settings["dataset"], name, len(shards))
        cursor, tally = Progress(place.part, place.offset), Tally()
        pieces = self._tokens(stream, cursor, n_tokens)
        if name != stream:  # the parts do not say how much of them is for validation
            pieces = tally.counted(pieces, self.tokenizer)
        shards.append(write_shard(path, n_tokens, pieces))
        self.ledger.tallies[name].add(tally)
        place.part, place.offset = cursor.part, cursor.offset
        self._waiting[stream] -= n_tokens
        self._fold()

    def _tokens(self, stream: str, cursor: Progress, count: int) -> Iterator[Piece]:
        """The next `count` tokens of a stream; `cursor` moves along."""
        while count:
            n_tokens = self._results[cursor.part].splits[stream].tokens
            if cursor.offset == n_tokens:
                cursor.part, cursor.offset = cursor.part + 1, 0
                continue
            kept = self._kept.get((cursor.part, stream)) or Stretches.whole(n_tokens)
            start, length = kept.at(cursor.offset)
            wanted = min(count, READ_TOKENS, length)
            path = part_file(self.parts_folder, cursor.part, stream)
            tokens = np.fromfile(path, dtype="<u2", count=wanted, offset=TOKEN_BYTES * start)
            if len(tokens) != wanted:
                raise DataError(f"{path} is truncated; remove {self.folder} and prepare it again.")
            yield tokens
            cursor.offset += wanted
            count -= wanted

    def _fold(self) -> None:
        """Count the parts that no shard will need again into the ledger, write it, and only then delete them."""
        ledger = self.ledger
        if self.val_tokens:
            ledger.progress["val"].part = ledger.progress["train"].part
        needed = min(progress.part for progress in ledger.progress.values())
        while ledger.folded < needed:
            result = self._results.pop(ledger.folded)
            ledger.skipped = dict(Counter(ledger.skipped) + Counter(result.skipped))
            ledger.first_skipped = result.first_skipped | ledger.first_skipped
            ledger.encoders = sorted({*ledger.encoders, result.encoder})
            ledger.digests.include(result.digests)
            for name in SPLITS:
                ledger.tallies[name].add(result.splits[name])
                self._kept.pop((ledger.folded, name), None)
            ledger.folded += 1
        ledger.write(self.folder)
        for path in self.parts_folder.glob("[0-9]*.*"):
            index, kind = path.name.split(".")[:2]
            if kind != "documents" and int(index) < (ledger.progress[kind].part if kind in SPLITS else ledger.folded):
                path.unlink()


@dataclass(frozen=True)
class Stretches:
    """What is kept of a token file: [starts[i], ...) of lengths that add up to ends[i]."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def whole(cls, n_tokens: int) -> "Stretches":
        return cls(np.zeros(1, np.int64), np.array([n_tokens]))

    @classmethod
    def of(cls, tokens: npt.NDArray[np.uint32], kept: npt.NDArray[np.bool_]) -> "Stretches":
        """Of documents of these lengths, those that are kept; neighbors make one stretch."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(np.int8), [0]])))
        bounds = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])[edges].reshape(-1, 2)
        return cls(bounds[:, 0], np.cumsum(bounds[:, 1] - bounds[:, 0]))

    def at(self, offset: int) -> tuple[int, int]:
        """Where the kept token number `offset` lies in the file, and how many follow without a gap."""
        n = int(np.searchsorted(self.ends, offset, side="right"))
        before = int(self.ends[n - 1]) if n else 0
        return int(self.starts[n]) + offset - before, int(self.ends[n]) - offset


def _require_documents(tallies: dict[str, Tally], reasons: str) -> None:
    total = sum(tally.documents for tally in tallies.values())
    if not total:
        raise DataError(f"there is no document in the input ({reasons}).")
    for name, tally in tallies.items():
        if not tally.documents:
            direction = "larger" if name == "val" else "smaller"
            raise DataError(
                f"none of the {total:,} documents fell to the {name} split; choose a {direction} --val-fraction, "
                f"or add documents ({reasons})."
            )
