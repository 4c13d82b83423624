"""Mixtures: the shares hold at every window, each data set keeps its own order and epochs, bad mixes are refused."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_data
from regpt2.base.errors import ConfigError, DataError
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.mixture import deal, open_mixture, read_shares
from regpt2.data.tokens.manifest import Manifest

PARTS = st.lists(st.integers(1, 1_000_000), min_size=1, max_size=6).map(lambda parts: sorted(parts, reverse=True))


class Counting:
    """A stream whose tokens tell the data set and the position."""

    def __init__(self, k: int, n_tokens: int) -> None:
        self.first, self.n_tokens = 1000 * k, n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.n_tokens <= 1000
        return np.arange(self.first + start, self.first + start + count, dtype=np.int64)


def dealt_by_hand(n: int, parts: list[int]) -> list[tuple[int, int]]:
    """The same deal one place after the other: offered to each in turn, who takes it if a whole window is due."""
    shares = [Fraction(part, sum(parts[k:])) for k, part in enumerate(parts)]
    offered, had, turns = [0] * len(parts), [0] * len(parts), []
    for _ in range(n):
        for k, share in enumerate(shares):
            offered[k] += 1
            if offered[k] * share >= had[k] + 1:
                turns.append((k, had[k]))
                had[k] += 1
                break
    return turns


@settings(max_examples=80, deadline=None)
@given(parts=PARTS, n=st.integers(1, 300))
def test_the_deal_is_the_one_that_is_made_by_hand(parts: list[int], n: int) -> None:
    whose, before = deal(np.arange(n), parts)
    assert list(zip(whose.tolist(), before.tolist(), strict=True)) == dealt_by_hand(n, parts)


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, n=st.integers(1, 5000))
def test_every_share_is_right_at_every_window(parts: list[int], n: int) -> None:
    whose, _ = deal(np.arange(n), parts)
    bound = max(1.0, sum(1 / k for k in range(1, len(parts))))
    for k, part in enumerate(parts):
        off = np.cumsum(whose == k) - np.arange(1, n + 1) * part / sum(parts)
        assert off.min() > -1 - 1e-9 and off.max() < bound + 1e-9


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, first=st.integers(0, 2**42), n=st.integers(1, 50))
def test_any_place_is_dealt_without_those_before_it(parts: list[int], first: int, n: int) -> None:
    """Far out, too, against whole numbers of any size."""
    whose, before = deal(np.arange(first, first + n), parts)
    for place, k, had in zip(range(first, first + n), whose.tolist(), before.tolist(), strict=True):
        for j in range(k):
            place -= place * parts[j] // sum(parts[j:])
        assert had == place * parts[k] // sum(parts[k:])
        assert (place + 1) * parts[k] // sum(parts[k:]) == had + 1


def mixed(sizes: list[int], parts: list[int], *, rank: int = 0, world_size: int = 1, **batch: object) -> Loader:
    config = BatchConfig(**{"batch_tokens": 64, "micro_batch": 2, "seq_len": 8, **batch})
    streams = [Counting(k, n) for k, n in enumerate(sizes)]
    return Loader(streams, config, seed=7, parts=parts, rank=rank, world_size=world_size)


def inputs(loaders: list[Loader], step: int) -> np.ndarray:
    return np.concatenate([x for one in loaders for x, _ in one.batch(step).micro_batches])


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_a_step_has_the_same_windows_for_any_world_size(order: str, world_size: int, micro_batch: int) -> None:
    sizes, parts = [400, 90, 50], [5, 3, 2]
    alone = [mixed(sizes, parts, order=order)]
    many = [
        mixed(sizes, parts, rank=rank, world_size=world_size, micro_batch=micro_batch, order=order)
        for rank in range(world_size)
    ]
    for step in (1, 2, 7, 30):
        assert np.array_equal(inputs(alone, step), inputs(many, step))
        assert alone[0].batch(step).digest == sum(one.batch(step).digest for one in many) % 2**64


@pytest.mark.seconds
@settings(max_examples=20, deadline=None)
@given(
    sets=st.lists(st.tuples(st.integers(9, 200), st.integers(1, 1000)), min_size=1, max_size=4),
    order=st.sampled_from(["shuffled", "sequential"]),
)
def test_each_data_set_keeps_its_own_order_and_its_epochs(sets: list[tuple[int, int]], order: str) -> None:
    """As a run on it alone sees it; so every window of it comes once per epoch of it."""
    sizes, parts = [size for size, _ in sets], sorted((part for _, part in sets), reverse=True)
    mixture = mixed(sizes, parts, order=order)
    windows = np.concatenate([mixture.windows(step) for step in range(1, 30)])
    tokens = np.concatenate([inputs([mixture], step) for step in range(1, 30)])
    for k, size in enumerate(sizes):
        mine = windows[windows[:, 0] == k, 1]
        alone = mixed([size], [1], order=order)
        expected = np.concatenate([alone.windows(step)[:, 1] for step in range(1, 30)])[: len(mine)]
        assert np.array_equal(mine, expected)
        n = (size - 1) // 8
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert np.array_equal(tokens[windows[:, 0] == k, 0], 1000 * k + 8 * mine)


def test_an_update_is_the_mixture_in_small() -> None:
    mixture = mixed([900, 900, 900], [700_000, 200_000, 100_000], batch_tokens=640, micro_batch=8)
    for step in range(1, 200):
        counts = np.bincount(mixture.windows(step)[:, 0], minlength=3)
        assert np.abs(counts - [56, 16, 8]).max() <= 2


def test_a_mixture_goes_on_as_it_always_did() -> None:
    """Golden values: a run of today must be resumable by any later version."""
    whose, before = deal(np.arange(12), [500_000, 300_000, 200_000])
    assert "".join("abc"[k] for k in whose) == "cabacababaca"
    assert before.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 2, 5]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_data(tmp_path / "a", n_train=3000), write_data(tmp_path / "b", n_train=1000, seed=1)


def test_the_weights_are_shares_whatever_their_sum_and_order(two: tuple[Path, Path]) -> None:
    a, b = two
    shares = read_shares("", [f"{a}=7", f"{b}=3"])
    assert [(share.folder, share.name, share.parts) for share in shares] == [(a, "a", 700_000), (b, "b", 300_000)]
    assert read_shares("", [f"{b}=0.3", f"{a}=0.7"]) == shares
    thirds = read_shares("", [f"{folder}=1" for folder in "xyz"])
    assert [share.parts for share in thirds] == [333_333] * 3


def test_folders_of_one_name_are_told_apart_by_their_paths() -> None:
    assert [share.name for share in read_shares("", ["web/gpt2=1", "code/gpt2=1"])] == ["web/gpt2", "code/gpt2"]
    assert read_shares("", ["a=b/c=1"])[0].folder == Path("a=b/c")


def test_the_fingerprint_is_of_data_and_weights(two: tuple[Path, Path]) -> None:
    a, b = two

    def fingerprint(*mix: str) -> str:
        with open_mixture(read_shares("", mix)) as mixture:
            return mixture.fingerprint

    whole = fingerprint(f"{a}=0.7", f"{b}=0.3")
    assert fingerprint(f"{b}=3", f"{a}=7") == whole
    assert fingerprint(f"{a}=0.6", f"{b}=0.4") != whole
    assert fingerprint(f"{a}=0.3", f"{b}=0.7") != whole
    assert fingerprint(f"{a}=0.7") == Manifest.read(a).fingerprint
    write_data(b, n_train=1000, seed=2)
    assert fingerprint(f"{a}=0.7", f"{b}=0.3") != whole


def test_what_a_run_will_see_of_each_is_said(two: tuple[Path, Path]) -> None:
    a, b = two
    with open_mixture(read_shares("", [f"{a}=3", f"{b}=1"])) as mixture:
        assert [(one["name"], one["weight"], one["epochs"]) for one in mixture.described(20_000)] == [
            ("a", 0.75, 5.0),
            ("b", 0.25, 5.0),
        ]
        assert mixture.plan(2000) == "0.50 epochs of a (75 %, 3k tokens), 0.50 epochs of b (25 %, 1k tokens)"
    with open_mixture(read_shares(str(a), ())) as alone:
        assert alone.plan(1500) == "0.50 epochs of 3k tokens"


@pytest.mark.parametrize(
    ("data", "mix", "message"),
    [
        ("", [], "no data folder: --data DIR"),
        ("a", ["b=1"], r"data = 'a' and mix = \['b=1'\] are both given, expected one"),
        ("", ["a"], "mix 'a': expected FOLDER=WEIGHT"),
        ("", ["=1"], "mix '=1': expected FOLDER=WEIGHT"),
        ("", ["a=much"], "mix 'a=much': expected FOLDER=WEIGHT with a weight above 0"),
        ("", ["a=1", "b=0"], "mix 'b=0': .* a weight above 0"),
        ("", ["a=-1"], "a weight above 0"),
        ("", ["a=nan"], "a weight above 0"),
        ("", ["a=inf"], "a weight above 0"),
        ("", ["a=1", "b=1", "./c/../a=1"], "mix './c/../a=1': this folder is given twice"),
        ("", ["a=1e308", "b=1e308"], "less than a millionth"),
        ("", ["a=1", "b=1e-9"], "mix: b has less than a millionth of the weight"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(data: str, mix: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_shares(data, mix)


def test_a_data_set_that_is_missing_or_in_other_tokens_is_named(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    with pytest.raises(DataError, match="nothing: there is no such data folder"):
        open_mixture(read_shares("", [f"{a}=1", f"{tmp_path / 'nothing'}=1"]))
    dataclasses.replace(Manifest.read(b), tokenizer="gpt2", vocab_size=50257).write(b)
    with pytest.raises(DataError, match=r"/b was made with the tokenizer 'gpt2' of 50257 tokens, .*/a with 'bytes'"):
        open_mixture(read_shares("", [f"{a}=1", f"{b}=1"]))


def test_too_little_of_one_is_refused() -> None:
    with pytest.raises(DataError, match="the smallest data set of the mixture has 8 tokens; one window needs"):
        mixed([100, 8], [1, 1])
