"""Shards to batches. In: token streams and a global step; out: that step's windows for this rank, (B, T) at a time.

One global step defines everything: the windows of step s are a pure function of (seed, s, data, weights), the same for
every world size and micro-batch; ranks take slices of them. So a resume needs no loader state beyond the step.

A window is `seq_len` tokens and the one after them; the targets are the window shifted by one. The windows of an epoch
follow each other without gap or overlap, so every token is a target once per epoch, except the first token and one
tail of fewer than `seq_len` tokens at the very end of the data. Steps run through the epochs without a seam, and take
up where the step before ended, of whatever size each is. Of several data sets each has its own windows and epochs;
data/mixture.py decides which data set a window comes from. With order "documents" the windows of each epoch are cut
from its own order of the documents (data/epoch_order.py).

Where the data has a mask, targets that do not count in the loss are IGNORED. The mask is that of the target, not of the
token before it.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regpt2.base.console import count
from regpt2.base.errors import ConfigError, DataError
from regpt2.data.epoch_order import DocumentOrder, Tokens, document_starts, permute, require_documents
from regpt2.data.mixture import deal

# B = micro_batch sequences, T = seq_len tokens

_AHEAD = 3  # batches in memory besides the one in use
IGNORED = -100  # a target that does not count, as torch and our losses have it

MicroBatch = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets, each (B, T)


@dataclass(frozen=True)
class Counted:
    """How many targets of an update count in the loss, where not all do."""

    mine: tuple[int, ...]
    """Of each of this rank's micro-batches."""
    all: int
    """Of the whole update, over all ranks. Every rank reads all masks of an update, so none has to ask the others."""

    @property
    def weights(self) -> list[float]:
        """Each micro-batch's share of the update: with these the mean losses add up to the mean over all of them."""
        return [n / max(1, self.all) for n in self.mine]


@dataclass(frozen=True)
class Batch:
    """What one rank reads for one update."""

    micro_batches: list[MicroBatch]
    digest: int
    """Of these windows and their places in the update. Its sum over the ranks, modulo 2**64, is the same for any number
    of ranks and any micro-batch: two runs whose sums are equal at every step have seen the same tokens in one order."""
    counted: Counted | None = None
    """None: every target counts."""

    @property
    def weights(self) -> list[float] | None:
        """As `Counted`; None: every micro-batch weighs the same."""
        return None if self.counted is None else self.counted.weights

    @property
    def teaches(self) -> bool:
        """Whether any target of the update counts; else its loss is 0, and so is its gradient."""
        return self.counted is None or self.counted.all > 0


@dataclass(frozen=True)
class Stretch:
    size: int
    steps_before: int
    tokens_before: int


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many tokens make an update, and how they are split into forward passes."""

    batch_tokens: int = 524_288
    """Tokens per update, over all ranks and micro-steps: 2**19, GPT-3's 0.5M for this size."""
    ramp_from: int = 0
    """Tokens in the first update; updates grow to batch_tokens by this many at a time. 0 = no growth. GPT-3: 32k."""
    ramp_tokens: int = 0
    """Tokens of training over which they grow, linearly; GPT-3: 4 to 12 billion (arXiv:2005.14165, appendix B)."""
    micro_batch: int = 64
    """Sequences per forward pass, per rank: as many as fit in memory."""
    seq_len: int = 1024
    """Tokens per training sequence, at most model.block_size."""
    order: Literal["shuffled", "sequential", "documents"] = "shuffled"
    """shuffled: windows in a seeded order; sequential: as in the lecture; documents: shuffled anew in each epoch."""
    one_batch: bool = False
    """Every update uses the first windows: the sanity check that the model can learn them by heart."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_batch", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name} = {getattr(self, name)} must be at least 1.")
        if min(self.ramp_from, self.ramp_tokens) < 0 or bool(self.ramp_from) != bool(self.ramp_tokens):
            raise ConfigError(
                f"batch.ramp_from = {self.ramp_from:,} and ramp_tokens = {self.ramp_tokens:,} must both be above 0, as "
                "in 32,768 and 4,000,000,000, or both 0 (no ramp)."
            )
        if self.ramp_from:
            passes = f"micro_batch x seq_len = {self.micro_batch} x {self.seq_len}"
            _require_multiple("ramp_from", self.ramp_from, passes, self.micro_batch * self.seq_len)
            _require_multiple("batch_tokens", self.batch_tokens, "ramp_from", self.ramp_from)

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The sizes of updates, in order: the line from ramp_from to batch_tokens, in steps of ramp_from below it."""
        climbs = self.batch_tokens // self.ramp_from - 1 if self.ramp_from else 0
        stretches, steps, tokens = [], 0, 0
        for n in range(1, climbs + 1):
            size = n * self.ramp_from
            stretches.append(Stretch(size, steps, tokens))
            next_at = -(-n * self.ramp_tokens // climbs)  # the tokens at which the line reaches the next size
            made = -(-(next_at - tokens) // size)  # 0: the update before went beyond
            steps, tokens = steps + made, tokens + made * size
        return [*stretches, Stretch(self.batch_tokens, steps, tokens)]

    def tokens_until(self, step: int) -> int:
        last = self.stretches[bisect_right(self.stretches, step, key=lambda stretch: stretch.steps_before) - 1]
        return last.tokens_before + (step - last.steps_before) * last.size

    def tokens_of(self, step: int) -> int:
        """Tokens of update `step`, from 1."""
        return self.tokens_until(step) - self.tokens_until(step - 1)

    def grad_accum_steps(self, world_size: int, step: int | None = None) -> int:
        """Forward passes of update `step`, per rank; without a step, of the largest updates.

        Raises:
            ConfigError: an update is not a whole number of passes.
        """
        pass_tokens = self.micro_batch * self.seq_len * world_size
        product = f"micro_batch x seq_len x world_size = {self.micro_batch} x {self.seq_len} x {world_size}"
        _require_multiple("batch_tokens", self.batch_tokens, product, pass_tokens)
        _require_multiple("ramp_from", self.ramp_from, product, pass_tokens)
        return (self.batch_tokens if step is None else self.tokens_of(step)) // pass_tokens

    @property
    def growth(self) -> str:
        """The ramp in words, to follow "N tokens per update" in a sentence; "" without one."""
        if not self.ramp_from:
            return ""
        return f", grown from {self.ramp_from:,} over the first {count(self.ramp_tokens)} tokens"


def _require_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        nearest = max(1, round(value / unit)) * unit
        raise ConfigError(
            f"batch.{name} = {value:,} must be a multiple of {of} = {unit:,}; the nearest is {nearest:,}."
        )


class Loader:
    def __init__(
        self,
        tokens: Tokens | Sequence[Tokens],
        config: BatchConfig,
        *,
        seed: int,
        parts: Sequence[int] = (1,),
        rank: int = 0,
        world_size: int = 1,
        end_of_text: int | None = None,
        on_tokens: Callable[[int], object] | None = None,
    ) -> None:
        """`end_of_text` begins a document, for order "documents"; `on_tokens` gets the progress of finding them."""
        self.streams = tokens if isinstance(tokens, Sequence) else (tokens,)
        assert len(parts) == len(self.streams), f"{len(self.streams)} data sets with {len(parts)} weights"
        self.config, self.seed, self.parts, self.rank, self.world_size = config, seed, parts, rank, world_size
        config.grad_accum_steps(world_size)  # raises if an update is not a whole number of passes
        self.n_windows = [(stream.n_tokens - 1) // config.seq_len for stream in self.streams]
        if min(self.n_windows) < 1:
            least = min(stream.n_tokens for stream in self.streams)
            whose = "the data" if len(self.streams) == 1 else "the smallest data set of the mixture"
            raise DataError(
                f"{whose} has {least:,} tokens; one window needs seq_len + 1 = {config.seq_len + 1:,}. "
                "Prepare more text or lower batch.seq_len."
            )
        self.documents: list[DocumentOrder] = []
        """Of each data set, with order "documents"."""
        if config.order == "documents":
            self.documents = [self._in_documents(k, end_of_text, on_tokens) for k in range(len(self.streams))]

    def _in_documents(
        self, k: int, end_of_text: int | None, on_tokens: Callable[[int], object] | None
    ) -> DocumentOrder:
        files = getattr(self.streams[k], "files", None)
        whose = str(files[0].path.parent) if files else "the data"
        if end_of_text is None:
            raise DataError(
                f"batch.order = 'documents' needs an end of text between documents, and the tokenizer of {whose} has "
                "none; take --batch.order shuffled, or prepare the data with another tokenizer."
            )
        starts = document_starts(self.streams[k], end_of_text, on_tokens)
        require_documents(starts, whose)
        return DocumentOrder(self.streams[k], starts, seed=self.seed)

    def grad_accum_steps(self, step: int) -> int:
        """Micro-batches of update `step`, for each rank."""
        return self.config.grad_accum_steps(self.world_size, step)

    def windows(self, step: int) -> NDArray[np.int64]:
        """The windows of update `step` (from 1), over all ranks, in order: a row (data set, its window) for each.

        With order "documents" they are counted over all epochs: window w of epoch e is e x (windows of an epoch) + w.
        """
        T, n_tokens = self.config.seq_len, self.config.tokens_of(step)
        first = 0 if self.config.one_batch else self.config.tokens_until(step - 1) // T
        whose, windows = deal(np.arange(first, first + n_tokens // T, dtype=np.int64), self.parts)
        for k, n in enumerate(self.n_windows):
            windows[whose == k] = self._in_order(windows[whose == k], n)
        return np.stack([whose, windows], axis=1)

    def _in_order(self, places: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """The windows of a data set of `n` at these places of its epochs, one epoch after the other."""
        if self.config.order == "sequential":
            return places % n
        epochs, within = np.divmod(places, n)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            windows[mine] = permute(within[mine], n, seed=self.seed, epoch=int(epoch))
        return windows + epochs * n if self.documents else windows

    def _tokens(self, k: int, window: int) -> NDArray[np.uint16]:
        """The tokens (T + 1,) of a window of data set `k`: its inputs, and the one after them."""
        T = self.config.seq_len
        if not self.documents:
            return self.streams[k].read(window * T, T + 1)
        epoch, within = divmod(window, self.n_windows[k])
        return self.documents[k].read(epoch, within * T, T + 1)

    def batch(self, step: int) -> Batch:
        """This rank's part of update `step` (from 1).

        Micro-batch g of an update is always the g-th group of `micro_batch` windows; each rank takes as many as the
        others, side by side.
        """
        B, T, n = self.config.micro_batch, self.config.seq_len, self.grad_accum_steps(step)
        first = self.rank * n * B  # the place of this rank's first window in the update
        of_all_ranks = self.windows(step)
        mine = of_all_ranks[first : first + n * B].tolist()
        windows = np.stack([self._tokens(k, w) for k, w in mine])  # (n * B, T + 1)
        digest = sum(_window_digest(first + i, window) for i, window in enumerate(windows)) % 2**64
        groups = windows.astype(np.int64).reshape(n, B, T + 1)
        micro_batches = [(group[:, :-1], group[:, 1:]) for group in groups]
        if not self.is_masked:
            return Batch(micro_batches, digest)
        counts = np.stack([self._mask(k, w) for k, w in of_all_ranks.tolist()])  # (windows of all ranks, T)
        ours = counts[first : first + n * B].reshape(n, B, T)
        masked = [(x, np.where(mask, y, IGNORED)) for (x, y), mask in zip(micro_batches, ours, strict=True)]
        counted = Counted(tuple(ours.sum(axis=(1, 2)).tolist()), int(counts.sum()))
        return Batch(masked, digest, counted)

    @property
    def is_masked(self) -> bool:
        """Whether a data set says which of its tokens count in the loss."""
        return any(getattr(stream, "masks", ()) for stream in self.streams)

    def _mask(self, k: int, window: int) -> NDArray[np.bool_]:
        """Which targets (T,) of a window of data set `k` count; all of one without a mask."""
        T, stream = self.config.seq_len, self.streams[k]
        if not getattr(stream, "masks", ()):
            return np.ones(T, dtype=np.bool_)
        if self.documents:
            epoch, within = divmod(window, self.n_windows[k])
            return self.documents[k].read_mask(epoch, within * T + 1, T)
        masks: NDArray[np.bool_] = stream.read_mask(window * T + 1, T)  # type: ignore[attr-defined]
        return masks

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """The batches of updates `first_step` to `last_step`, read ahead by a thread while the model computes."""
        steps = iter(range(first_step, last_step + 1))
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = deque(reader.submit(self.batch, step) for step in islice(steps, _AHEAD))
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(reader.submit(self.batch, step) for step in islice(steps, 1))
                    yield batch
            finally:
                reader.shutdown(cancel_futures=True)


def _window_digest(place: int, window: NDArray[np.integer[Any]]) -> int:
    """64 bits of BLAKE2 of a window and its place in the update."""
    data = place.to_bytes(8, "little") + window.astype("<u2").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
