"""The mask in a batch: it belongs to the target, and every rank knows how many targets of the update count."""

import numpy as np
import pytest

from regpt2.data.loader import IGNORED, BatchConfig, Counted, Loader


class Masked:
    """A stream whose token at position i is i, and counts if it is a multiple of `every`; every = 1 has no mask."""

    def __init__(self, n_tokens: int, every: int) -> None:
        self.n_tokens, self.every, self.masks = n_tokens, every, () if every == 1 else ("a mask",)

    def read(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.int64)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) % self.every == 0


def loader(*streams: Masked, rank: int = 0, world_size: int = 1, micro_batch: int = 2) -> Loader:
    config = BatchConfig(batch_tokens=64, micro_batch=micro_batch, seq_len=8)
    return Loader(streams, config, seed=7, parts=[1] * len(streams), rank=rank, world_size=world_size)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_the_mask_is_that_of_the_target(every: int) -> None:
    batch = loader(Masked(1000, every)).batch(3)
    for x, y in batch.micro_batches:
        assert np.array_equal(y, np.where((x + 1) % every == 0, x + 1, IGNORED))
    counts = [int((y != IGNORED).sum()) for _, y in batch.micro_batches]
    assert batch.counted == Counted(tuple(counts), sum(counts))
    assert batch.weights == [count / sum(counts) for count in counts] and batch.teaches


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 2), (4, 1), (4, 2)])
def test_every_rank_knows_the_sum_over_all_ranks(world_size: int, micro_batch: int) -> None:
    alone = loader(Masked(1000, 3), micro_batch=micro_batch)
    ranks = [loader(Masked(1000, 3), rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    for step in (1, 2, 15, 16, 40):
        batches, whole = [one.batch(step) for one in ranks], alone.batch(step)
        assert sum((batch.weights or [] for batch in batches), []) == whole.weights  # noqa: RUF017
        assert sum(batch.digest for batch in batches) % 2**64 == whole.digest
        assert sum(whole.weights or []) == pytest.approx(1)


def test_all_tokens_of_a_data_set_without_a_mask_count() -> None:
    batch = loader(Masked(1000, 4), Masked(1000, 1), micro_batch=8).batch(1)
    ((_, targets),) = batch.micro_batches
    per_window = sorted((targets != IGNORED).sum(axis=1).tolist())
    assert per_window == [2, 2, 2, 2, 8, 8, 8, 8]
    assert loader(Masked(1000, 1)).batch(1).counted is None
    assert loader(Masked(1000, 1)).batch(1).weights is None


def test_an_update_without_a_target_that_counts_says_so() -> None:
    batch = loader(Masked(1000, 5000)).batch(9)
    assert batch.counted is not None and batch.counted.all == 0 and not batch.teaches
    assert batch.weights == [0.0] * 4
