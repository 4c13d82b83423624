"""The loader: one order for any world size and micro-batch, every token once per epoch, a step is all it needs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt2.base.errors import ConfigError, DataError
from regpt2.data.epoch_order import permute
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens


class Counting:
    """A stream whose token at position i is i: shows where a window was taken."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.n_tokens
        return np.arange(start, start + count, dtype=np.int64)


def loader(n_tokens: int = 1000, *, rank: int = 0, world_size: int = 1, seed: int = 7, **batch: object) -> Loader:
    config = BatchConfig(**{"batch_tokens": 64, "micro_batch": 2, "seq_len": 8, **batch})
    return Loader(Counting(n_tokens), config, seed=seed, rank=rank, world_size=world_size)


def update(loaders: list[Loader], step: int) -> np.ndarray:
    """The windows of a step in the order of the micro-batches: rank after rank."""
    return np.concatenate([x for one in loaders for x, _ in one.batch(step).micro_batches])


def digest(loaders: list[Loader], step: int) -> int:
    return sum(one.batch(step).digest for one in loaders) % 2**64


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_a_step_has_the_same_windows_for_any_world_size_and_micro_batch(
    order: str, world_size: int, micro_batch: int
) -> None:
    alone = [loader(order=order)]
    many = [loader(rank=r, world_size=world_size, micro_batch=micro_batch, order=order) for r in range(world_size)]
    for step in (1, 2, 15, 16, 17, 40):
        assert np.array_equal(update(alone, step), update(many, step))
        assert digest(alone, step) == digest(many, step)


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    shard_lengths=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    seq_len=st.integers(1, 7),
    world_size=st.integers(1, 8),
    per_rank=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    order=st.sampled_from(["shuffled", "sequential"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_token_stream_is_the_same_for_1_to_8_ranks(
    shard_lengths: list[int], seq_len: int, world_size: int, per_rank: int, micro_batch: int, order: str, seed: int
) -> None:
    """Over shard boundaries and epochs, against the definition written out: window w is tokens [w T, w T + T]."""
    n_tokens = max(sum(shard_lengths), seq_len + 1)
    shards = np.split(np.random.default_rng(seed).integers(0, 257, n_tokens), np.cumsum(shard_lengths)[:-1])
    stream = np.concatenate(shards)
    windows_per_step = world_size * per_rank * micro_batch
    config = BatchConfig(batch_tokens=windows_per_step * seq_len, micro_batch=micro_batch, seq_len=seq_len, order=order)
    tokens = Shards([shard for shard in shards if len(shard)])
    ranks = [Loader(tokens, config, seed=seed, rank=r, world_size=world_size) for r in range(world_size)]
    n_windows = (n_tokens - 1) // seq_len
    for step in range(1, 3 + 2 * n_windows // windows_per_step):
        places = np.arange((step - 1) * windows_per_step, step * windows_per_step)
        chosen = [
            int(permute(np.array([p % n_windows]), n_windows, seed=seed, epoch=int(p // n_windows))[0])
            if order == "shuffled"
            else p % n_windows
            for p in places
        ]
        assert np.array_equal(update(ranks, step), [stream[w * seq_len : w * seq_len + seq_len] for w in chosen])


class Shards:
    """A stream over several arrays, read across their seams."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards, self.n_tokens = shards, sum(map(len, shards))

    def read(self, start: int, count: int) -> np.ndarray:
        found = [shard[max(0, start - at) : max(0, start + count - at)] for at, shard in self.places()]
        return np.concatenate(found).astype(np.uint16)

    def places(self) -> list[tuple[int, np.ndarray]]:
        return list(zip(np.cumsum([0, *map(len, self.shards)])[:-1].tolist(), self.shards, strict=True))


def test_the_digest_tells_tokens_and_places() -> None:
    """A changed token, two windows exchanged, another step: each is another digest; the split over ranks is not."""
    one = loader(order="sequential")
    read = one.streams[0].read
    before = one.batch(1).digest
    assert before == one.batch(1).digest
    assert before != one.batch(2).digest
    one.streams[0].read = lambda start, count: read(start, count) + (start == 8)  # type: ignore[method-assign]
    assert one.batch(1).digest != before
    one.streams[0].read = lambda start, count: read({0: 8, 8: 0}.get(start, start), count)  # type: ignore[method-assign]
    assert one.batch(1).digest != before


@pytest.mark.seconds
@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(10, 700),
    seq_len=st.integers(1, 9),
    windows_per_step=st.sampled_from([1, 2, 3, 4, 8]),
    order=st.sampled_from(["shuffled", "sequential"]),
    seed=st.integers(0, 2**63),
)
def test_every_token_is_a_target_once_per_epoch_but_the_first_and_the_stated_tail(
    n_tokens: int, seq_len: int, windows_per_step: int, order: str, seed: int
) -> None:
    one = loader(
        n_tokens, seed=seed, order=order, seq_len=seq_len, micro_batch=1, batch_tokens=seq_len * windows_per_step
    )
    n_windows = (n_tokens - 1) // seq_len
    epochs = 3
    steps = -(-epochs * n_windows // windows_per_step)
    targets = np.concatenate([y for step in range(1, steps + 1) for _, y in one.batch(step).micro_batches])
    for epoch in range(epochs):
        seen = np.sort(targets[epoch * n_windows : (epoch + 1) * n_windows].ravel())
        assert np.array_equal(seen, np.arange(1, n_windows * seq_len + 1))
    assert n_tokens - 1 - n_windows * seq_len < seq_len  # the tail


def test_targets_are_the_inputs_moved_by_one() -> None:
    for x, y in loader().batch(3).micro_batches:
        assert np.array_equal(y, x + 1)
        assert x.shape == (2, 8)


def test_epochs_differ_and_seeds_differ_and_both_repeat() -> None:
    one, n = loader(), 124
    first, second = np.concatenate([one.windows(step)[:, 1] for step in range(1, 32)])[: 2 * n].reshape(2, n)
    assert sorted(first) == sorted(second) == list(range(n))
    assert not np.array_equal(first, second)
    assert not np.array_equal(one.windows(1), loader(seed=8).windows(1))
    assert np.array_equal(one.windows(5), loader().windows(5))


def test_the_order_is_what_it_always_was() -> None:
    """Golden values: a run of today must be resumable by any later version."""
    assert permute(np.arange(10), 10, seed=1337, epoch=0).tolist() == GOLDEN_10
    assert permute(np.arange(3), 1_000_003, seed=1337, epoch=2).tolist() == GOLDEN_BIG


GOLDEN_10 = [5, 6, 9, 4, 0, 3, 7, 8, 1, 2]
GOLDEN_BIG = [49663, 467481, 318920]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=seed, epoch=epoch)), np.arange(n))


def test_permute_mixes() -> None:
    """Neighbors end far apart: the mean distance of a random permutation is n / 3."""
    n = 10_000
    values = permute(np.arange(n), n, seed=3, epoch=0)
    assert abs(np.abs(np.diff(values)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.03


def test_one_batch_is_the_first_again_and_again() -> None:
    one = loader(one_batch=True)
    assert np.array_equal(one.windows(9), loader().windows(1))


def test_sequential_order_is_the_lectures() -> None:
    x = np.concatenate([x for x, _ in loader(order="sequential").batch(2).micro_batches])
    assert np.array_equal(x.ravel(), np.arange(64, 128))
    seam = loader(order="sequential").windows(16)[:, 1]
    assert seam.tolist() == [120, 121, 122, 123, 0, 1, 2, 3], "after the last window comes the first"


def test_windows_cross_the_seams_of_shards(tiny_data: Path) -> None:
    with open_tokens(tiny_data, "train") as tokens:
        whole = tokens.read(0, tokens.n_tokens)
        one = Loader(tokens, BatchConfig(batch_tokens=640, micro_batch=20, seq_len=32, order="sequential"), seed=0)
        read = np.concatenate([x.ravel() for step in range(1, 32) for x, _ in one.batch(step).micro_batches])
    assert np.array_equal(read, whole[: len(read)])


def test_reading_ahead_gives_the_same_batches_and_ends_its_thread() -> None:
    import threading

    one = loader()
    ahead = list(one.batches(3, 9))
    for step, batch in enumerate(ahead, start=3):
        assert all(
            np.array_equal(a, b)
            for got, want in zip(batch.micro_batches, one.batch(step).micro_batches, strict=True)
            for a, b in zip(got, want, strict=True)
        )
    unfinished = one.batches(1, 1000)
    next(unfinished)
    unfinished.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_an_error_of_the_reading_thread_reaches_the_loop() -> None:
    one = loader()

    def broken(start: int, count: int) -> np.ndarray:
        raise DataError("shard 7 is damaged")

    one.streams[0].read = broken  # type: ignore[method-assign]
    with pytest.raises(DataError, match="shard 7"):
        next(one.batches(1, 5))


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"500,000 must be a multiple of .* = 64 x 1024 x 8 = 524,288; the nearest is 524,288"
    ):
        BatchConfig(batch_tokens=500_000).grad_accum_steps(8)
    assert BatchConfig().grad_accum_steps(8) == 1
    assert BatchConfig().grad_accum_steps(1) == 8


def test_too_little_data_is_refused() -> None:
    with pytest.raises(DataError, match="8 tokens; one window needs seq_len"):
        loader(8)
