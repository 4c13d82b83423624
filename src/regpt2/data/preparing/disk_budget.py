"""How much disk a preparation takes. In: its plan; out: bytes, a forecast for the user, which parts may start."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from regpt2.base.console import count, say
from regpt2.base.errors import UsageError
from regpt2.base.files import free_bytes, require_free_space
from regpt2.data.sources.plan import Part, Plan
from regpt2.data.tokens.manifest import TOKEN_BYTES

TOKENS_PER_BYTE = {
    "gpt2": 0.5,
    "bytes": 1.0,
    "bpe": 1.0,
}  # where the plan says nothing: English has 0.22, Python code 0.45
MARGIN = 1.05  # on the publisher's own count of tokens


@dataclass(frozen=True)
class Space:
    """Bytes on the disk of a preparation, estimated from the plan."""

    plan: Plan
    tokenizer: str
    shard_tokens: int
    workers: int
    limit_bytes: int | None
    """The most bytes at any time; None: no limit."""
    token_bytes: int = TOKEN_BYTES
    """Of a token in a shard, with its mask."""

    @cached_property
    def download_bytes(self) -> int:
        """Of the files to download."""
        return sum(_remote_bytes(part) for part in self.plan.parts)

    @cached_property
    def tokens(self) -> int:
        """An estimate, rather too high than too low."""
        if self.tokenizer == "gpt2" and self.plan.n_tokens:
            return int(self.plan.n_tokens * MARGIN)
        return int(self.plan.n_bytes * TOKENS_PER_BYTE[self.tokenizer])

    @property
    def shards_bytes(self) -> int:
        return self.tokens * self.token_bytes

    def part_bytes(self, part: Part) -> int:
        """Of a part from its beginning until it is in shards: the file as it comes, and its tokens."""
        return _remote_bytes(part) + int(self.shards_bytes * part.n_bytes / max(1, self.plan.n_bytes))

    @cached_property
    def least_bytes(self) -> int:
        """With one part at a time, and the tokens that wait for a full shard."""
        waiting = min(self.shards_bytes, 2 * self.shard_tokens * self.token_bytes)
        return self.shards_bytes + waiting + max(map(self.part_bytes, self.plan.parts), default=0)

    @cached_property
    def most_bytes(self) -> int:
        """With all workers busy with the largest parts, or the limit."""
        largest = sorted(map(self.part_bytes, self.plan.parts), reverse=True)[1 : self.workers]
        unlimited_bytes = self.least_bytes + sum(largest)
        return unlimited_bytes if self.limit_bytes is None else min(unlimited_bytes, self.limit_bytes)

    def require(self, folder: Path) -> None:
        """Say what the preparation needs, and refuse to begin what cannot be finished.

        Raises:
            UsageError: the limit is too low for one part at a time.
            Problem: the disk has less room than that.
        """
        if self.limit_bytes is not None and self.limit_bytes < self.least_bytes:
            raise UsageError(
                f"--disk-limit {self.limit_bytes / 1e9:g} is too little: {self.shards_bytes / 1e9:.3g} GB of shards "
                f"and one file at a time need {self.least_bytes / 1e9:.3g} GB."
            )
        if self.download_bytes:
            n_files = sum(len(part.slices) for part in self.plan.parts)
            say(
                f"{self.plan.source}: {n_files:,} files, {self.download_bytes / 1e9:.3g} GB to download; about "
                f"{count(self.tokens)} tokens, {self.shards_bytes / 1e9:.3g} GB of shards; at most "
                f"{self.most_bytes / 1e9:.3g} GB of disk while it works ({free_bytes(folder) / 1e9:.3g} GB free)."
            )
        there_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        what = f"preparing {self.plan.n_bytes / 1e6:,.1f} MB of text"
        require_free_space(folder, max(0, self.most_bytes - there_bytes), what)

    def admission(
        self, upcoming: Callable[[], int], waiting_bytes: Callable[[], int]
    ) -> Callable[[tuple[int, Part]], bool]:
        """Whether a part may start, so that everything that is not in shards yet stays within bounds.

        Parts are asked for in their order. `upcoming()` is the first that is not packed and may always start;
        `waiting_bytes()` of tokens wait for a whole shard.
        """
        allowance = self.most_bytes - self.shards_bytes
        ends = [0, *accumulate(map(self.part_bytes, self.plan.parts))]

        def may_begin(task: tuple[int, Part]) -> bool:
            index, first = task[0], upcoming()
            return index <= first or waiting_bytes() + ends[index + 1] - ends[first] <= allowance

        return may_begin


def _remote_bytes(part: Part) -> int:
    return sum(piece.file.n_bytes for piece in part.slices if not piece.file.path)
