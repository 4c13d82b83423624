"""The batch ramp: the line of GPT-3's appendix B, the same windows in the same order, for any ranks, from any step."""

import time
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import Counting, digest, update

from regpt2.base.errors import ConfigError
from regpt2.data.loader import BatchConfig, Loader

T = 8
RAMP: dict[str, Any] = {"batch_tokens": 16 * T, "ramp_from": 4 * T, "ramp_tokens": 100 * T, "seq_len": T}


def ramped(n_tokens: int = 3000, *, rank: int = 0, world_size: int = 1, micro_batch: int = 1, **batch: Any) -> Loader:
    config = BatchConfig(**{**RAMP, "micro_batch": micro_batch, **batch})
    return Loader(Counting(n_tokens), config, seed=7, rank=rank, world_size=world_size)


def on_the_line(first: int, full: int, ramp_tokens: int, n_steps: int) -> list[int]:
    """Update by update: how high the line from `first` to `full` is by now, rounded down to a multiple of `first`."""
    sizes: list[int] = []
    for _ in range(n_steps):
        height = first + (full - first) * Fraction(sum(sizes), ramp_tokens)
        sizes.append(min(full, int(height) // first * first))
    return sizes


@settings(max_examples=200, deadline=None)
@given(first=st.integers(1, 50), times=st.integers(1, 20), ramp_tokens=st.integers(1, 20_000))
def test_updates_grow_along_the_line(first: int, times: int, ramp_tokens: int) -> None:
    sizes = {"batch_tokens": first * times, "ramp_from": first, "micro_batch": 1, "seq_len": 1}
    config = BatchConfig(**sizes, ramp_tokens=ramp_tokens)
    expected = on_the_line(first, first * times, ramp_tokens, 150)
    assert [config.tokens_of(step) for step in range(1, 151)] == expected
    assert [config.tokens_until(step) for step in range(151)] == [sum(expected[:n]) for n in range(151)]
    assert all(a <= b for a, b in pairwise(expected))


def test_gpt_3s_ramp_is_cheap_for_any_number_of_steps() -> None:
    """32k to 0.5M over 4 billion tokens: 16 sizes, and full after them."""
    config = BatchConfig(ramp_from=32_768, ramp_tokens=4_000_000_000, micro_batch=32)
    started_at = time.process_time()
    sizes = [config.tokens_of(step) for step in range(1, 100_001)]
    assert time.process_time() - started_at < 5
    assert sorted(set(sizes)) == [32_768 * n for n in range(1, 17)]
    full = sizes.index(524_288)
    assert 4e9 <= sum(sizes[:full]) < 4e9 + 524_288
    assert config.tokens_until(100_000) == sum(sizes)
    # Of the harmonic series: each size has a 15th of the tokens.
    assert full == pytest.approx(4e9 / 15 / 32_768 * sum(1 / n for n in range(1, 16)), rel=0.001)


def test_without_a_ramp_all_updates_are_equal() -> None:
    config = BatchConfig()
    assert [config.tokens_until(step) for step in (0, 1, 2, 19_073)] == [n * 524_288 for n in (0, 1, 2, 19_073)]
    assert {config.tokens_of(step) for step in (1, 2, 19_073)} == {524_288}
    assert config.growth == ""


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("parts", [(1,), (7, 3)])
def test_the_windows_are_those_of_a_run_without_a_ramp_in_the_same_order(order: str, parts: tuple[int, ...]) -> None:
    """Through several epochs, of one data set and of two."""
    streams = [Counting(900), Counting(300)][: len(parts)]
    grown = Loader(streams, BatchConfig(**RAMP, micro_batch=1, order=order), seed=7, parts=parts)
    equal = Loader(streams, BatchConfig(batch_tokens=T, micro_batch=1, seq_len=T, order=order), seed=7, parts=parts)
    found = [grown.windows(step) for step in range(1, 41)]
    assert sorted({len(windows) for windows in found}) == [4, 8, 12, 16]
    seen = np.concatenate(found)
    assert np.array_equal(seen, np.concatenate([equal.windows(step) for step in range(1, len(seen) + 1)]))
    assert len(seen) > 3 * grown.n_windows[0]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_an_update_is_the_same_for_any_world_size_and_micro_batch(
    order: str, world_size: int, micro_batch: int
) -> None:
    alone = [ramped(order=order)]
    many = [ramped(rank=r, world_size=world_size, micro_batch=micro_batch, order=order) for r in range(world_size)]
    for step in range(1, 20):
        assert np.array_equal(update(alone, step), update(many, step))
        assert digest(alone, step) == digest(many, step)
        pass_windows = world_size * micro_batch
        assert many[0].grad_accum_steps(step) == len(many[0].batch(step).micro_batches)
        assert many[0].grad_accum_steps(step) * pass_windows == len(alone[0].windows(step))


def test_reading_ahead_from_the_middle_of_the_ramp_gives_the_same_batches() -> None:
    one = ramped(micro_batch=2)
    for step, batch in enumerate(one.batches(7, 20), start=7):
        assert batch.digest == one.batch(step).digest
        assert len(batch.micro_batches) == one.grad_accum_steps(step)


def test_one_batch_begins_with_the_same_windows_at_every_size() -> None:
    one = ramped(one_batch=True)
    assert np.array_equal(one.windows(30)[:4], one.windows(1))
    assert np.array_equal(one.windows(30), one.windows(31))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ramp_from": 32_768}, "batch.ramp_from = 32,768 and ramp_tokens = 0 must both be above 0"),
        ({"ramp_tokens": 10**9}, "batch.ramp_from = 0 and ramp_tokens = 1,000,000,000 must both be above 0"),
        ({"ramp_from": -1, "ramp_tokens": -1}, "batch.ramp_from = -1 and ramp_tokens = -1 must both be above 0"),
        (
            {"ramp_from": 196_608, "ramp_tokens": 10**9},
            "batch.batch_tokens = 524,288 must be a multiple of ramp_from = 196,608; the nearest is 589,824.",
        ),
        (
            {"ramp_from": 2**20, "ramp_tokens": 10**9},
            "batch.batch_tokens = 524,288 must be a multiple of ramp_from = 1,048,576; the nearest is 1,048,576.",
        ),
        (
            {"ramp_from": 32_768, "ramp_tokens": 10**9},
            "batch.ramp_from = 32,768 must be a multiple of micro_batch x seq_len = 64 x 1024 = 65,536; "
            "the nearest is 65,536.",
        ),
    ],
)
def test_a_ramp_that_cannot_be_is_refused_with_the_nearest(values: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        BatchConfig(**values).grad_accum_steps(1)
    assert said in str(refused.value)
