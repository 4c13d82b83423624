"""How much disk a preparation takes. In: its plan; out: bytes, and which parts may be begun within a limit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from regpt2.data.documents import Part, Plan
from regpt2.data.manifest import TOKEN_BYTES

TOKENS_PER_BYTE = {"gpt2": 0.5, "bytes": 1.0}  # where the plan says nothing: English has 0.22, Python code 0.45
MARGIN = 1.05  # on the publisher's own count of tokens


@dataclass(frozen=True)
class Space:
    """Bytes on the disk of a preparation, estimated from the plan."""

    plan: Plan
    tokenizer: str
    shard_tokens: int
    workers: int

    @cached_property
    def download_bytes(self) -> int:
        """Of files that are elsewhere."""
        return sum(_remote_bytes(part) for part in self.plan.parts)

    @cached_property
    def tokens(self) -> int:
        """About as many, rather too many than too few."""
        if self.tokenizer == "gpt2" and self.plan.n_tokens:
            return int(self.plan.n_tokens * MARGIN)
        return int(self.plan.n_bytes * TOKENS_PER_BYTE[self.tokenizer])

    @property
    def shards_bytes(self) -> int:
        """Of the shards, in the end."""
        return self.tokens * TOKEN_BYTES

    def part_bytes(self, part: Part) -> int:
        """Of a part from its beginning until it is in shards: the file as it comes, and its tokens."""
        return _remote_bytes(part) + int(self.shards_bytes * part.n_bytes / max(1, self.plan.n_bytes))

    @cached_property
    def least_bytes(self) -> int:
        """With one part at a time, and what waits for a whole shard."""
        waiting = min(self.shards_bytes, 2 * self.shard_tokens * TOKEN_BYTES)
        return self.shards_bytes + waiting + max(map(self.part_bytes, self.plan.parts), default=0)

    @cached_property
    def usual_bytes(self) -> int:
        """With all workers busy with the largest parts."""
        largest = sorted(map(self.part_bytes, self.plan.parts), reverse=True)[: self.workers]
        return self.least_bytes + sum(largest[1:])


def within(space: Space, limit_bytes: int, folded: Callable[[], int]) -> Callable[[tuple[int, Part]], bool]:
    """Whether a part may be begun: are those from `folded()` on, which are in no shard yet, within the limit with it?

    Parts are asked for in their order, and the first that is in no shard may always be begun.
    """
    allowance = limit_bytes - space.least_bytes + max(map(space.part_bytes, space.plan.parts), default=0)
    ends = [0]
    for part in space.plan.parts:
        ends.append(ends[-1] + space.part_bytes(part))

    def may_begin(task: tuple[int, Part]) -> bool:
        index = task[0]
        return index <= folded() or ends[index + 1] - ends[folded()] <= allowance

    return may_begin


def _remote_bytes(part: Part) -> int:
    return sum(piece.file.n_bytes for piece in part.slices if not piece.file.path)
