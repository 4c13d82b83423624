"""Documents in a new order each epoch: every window beside one that is cut from documents joined by a plain loop."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Run, write_tokens
from regpt2.base.errors import DataError
from regpt2.data.epoch_order import CHUNK_TOKENS, DocumentOrder, document_starts
from regpt2.data.loader import IGNORED, BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens

EOT = 256


class Numbered:
    """A stream of documents of these lengths. Token i is i, but the first of a document is EOT; i % 3 = 1 counts."""

    masks = ("a mask",)

    def __init__(self, lengths: list[int], *, begins_inside: bool = False) -> None:
        self.tokens = np.arange(1000, 1000 + sum(lengths))
        begins = np.cumsum([0, *lengths[:-1]])
        self.tokens[begins[1:] if begins_inside else begins] = EOT
        self.n_tokens = len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and count > 0 and start + count <= self.n_tokens
        return self.tokens[start : start + count]

    def read_mask(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) % 3 == 1


def loader(stream: Numbered, *, T: int = 8, seed: int = 7, rank: int = 0, world_size: int = 1, B: int = 2) -> Loader:
    config = BatchConfig(batch_tokens=8 * T, micro_batch=B, seq_len=T, order="documents")
    return Loader(stream, config, seed=seed, rank=rank, world_size=world_size, end_of_text=EOT)


def mixed(x: int) -> int:
    """SplitMix64's finalizer."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def place_of(place: int, n: int, seed: int, epoch: int) -> int:
    """A Feistel network of six rounds, again and again until the value is one of n."""
    bits = max(1, -(-(n - 1).bit_length() // 2))
    value = place
    while True:
        left, right = value >> bits, value % 2**bits
        for turn in range(6):
            key = mixed((turn + mixed((mixed(seed) + epoch) % 2**64)) % 2**64)
            left, right = right, left ^ mixed(right ^ key) % 2**bits
        value = left << bits | right
        if value < n:
            return value


def joined(tokens: list[int], seed: int, epoch: int) -> list[int]:
    """The places of an epoch's tokens: documents split at the end of text, put in order, joined."""
    documents: list[list[int]] = []
    for place, token in enumerate(tokens):
        if token == EOT or not documents:
            documents.append([])
        documents[-1].append(place)
    n = len(documents)
    return [place for i in range(n) for place in documents[place_of(i, n, seed + 2**63, epoch)]]


@pytest.mark.seconds
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    begins_inside=st.booleans(),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_every_window_is_that_of_documents_joined_by_a_plain_loop(
    lengths: list[int], T: int, seed: int, begins_inside: bool, world_size: int
) -> None:
    assert_windows([max(lengths[0], T + 1), *lengths], T, seed, begins_inside, world_size)


@pytest.mark.parametrize(("T", "begins_inside"), [(8, False), (30, True)])
def test_windows_of_two_epochs_written_out(T: int, begins_inside: bool) -> None:
    assert_windows([5, 70, 1, 1, 33, 12, 8], T, 7, begins_inside, 2)


def assert_windows(lengths: list[int], T: int, seed: int, begins_inside: bool, world_size: int) -> None:
    stream = Numbered(lengths, begins_inside=begins_inside)
    ranks = [loader(stream, T=T, seed=seed, rank=r, world_size=world_size) for r in range(world_size)]
    n = (stream.n_tokens - 1) // T
    tokens = stream.tokens.tolist()
    orders = [joined(tokens, seed, epoch) for epoch in range(5 + 16 // n)]
    for step in range(1, 3 + 2 * n // 8):
        batches = [one.batch(step) for one in ranks]
        found = [pair for batch in batches for x, y in batch.micro_batches for pair in zip(x, y, strict=True)]
        for at, (inputs, targets) in enumerate(found):
            epoch, within = divmod((step - 1) * 8 + at, n)
            first = place_of(within, n, seed, epoch) * T
            places = orders[epoch][first : first + T + 1]
            assert inputs.tolist() == [tokens[p] for p in places[:-1]]
            assert targets.tolist() == [tokens[p] if p % 3 == 1 else IGNORED for p in places[1:]]


def places_of_epoch(one: Loader, epoch: int, n_tokens: int) -> list[int]:
    return (one.documents[0].read(epoch, 0, n_tokens) - 1000).tolist()


def test_an_epoch_has_every_target_once_but_for_the_first_token_and_the_tail() -> None:
    stream = Numbered([5, 70, 1, 1, 33, 12, 8, 90, 31, 40, 22, 14])
    one, T = loader(stream), 8
    stream.tokens = np.arange(1000, 1000 + stream.n_tokens)  # to tell them all apart; the starts are known
    stream.masks = ()
    n = (stream.n_tokens - 1) // T
    steps = [one.batch(step).micro_batches for step in range(1, 2 + 2 * n // 8)]
    targets = np.concatenate([y for batches in steps for _, y in batches])
    orders = []
    for epoch in (0, 1):
        order = places_of_epoch(one, epoch, stream.n_tokens)
        seen = Counter((targets[epoch * n : (epoch + 1) * n] - 1000).ravel().tolist())
        assert sorted(seen.elements()) == sorted(order[1 : n * T + 1])
        orders.append(order)
    assert orders[0] != orders[1]


def test_seeds_and_epochs_have_other_orders_and_both_repeat() -> None:
    stream = Numbered([11] * 40)
    orders = {
        (seed, epoch): tuple(loader(stream, seed=seed).documents[0].order(epoch))
        for seed in (1, 2)
        for epoch in (0, 1, 5)
    }
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert orders[2, 5] == tuple(loader(stream, seed=2).documents[0].order(5))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_ranks_and_micro_batches_share_the_same_windows(world_size: int, micro_batch: int) -> None:
    stream = Numbered([5, 70, 1, 1, 33, 12, 8, 90, 31])
    alone = loader(stream)
    ranks = [loader(stream, rank=r, world_size=world_size, B=micro_batch) for r in range(world_size)]
    for step in (1, 2, 4, 5, 40):
        batches, whole = [one.batch(step) for one in ranks], alone.batch(step)
        for part in (0, 1):
            rows = [
                np.concatenate([pair[part] for b in some for pair in b.micro_batches]) for some in (batches, [whole])
            ]
            assert np.array_equal(*rows)
        assert sum(batch.digest for batch in batches) % 2**64 == whole.digest


def test_starts_are_found_across_chunks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(5_000) < 0.02, EOT, rng.integers(0, 256, 5_000)).astype(np.uint16)
    ids[0], ids[999], ids[1000], ids[2048] = EOT, 7, EOT, EOT
    folder = write_tokens(tmp_path / "data", [ids[:1000], ids[1000:]], ids[:500])
    monkeypatch.setattr("regpt2.data.epoch_order.CHUNK_TOKENS", 1024)
    told: list[int] = []
    with open_tokens(folder, "train") as stream:
        starts = document_starts(stream, EOT, told.append)
        assert starts.dtype == np.int64
        assert starts.tolist() == [i for i, token in enumerate(ids.tolist()) if token == EOT]
        assert sum(told) == 5_000 and CHUNK_TOKENS > 1 << 20
        order = DocumentOrder(stream, starts, seed=3)
        expected = [ids[p] for p in joined(ids.tolist(), 3, 4)]
        for start, count in [(0, 5_000), (777, 1), (0, 1), (4_999, 1), (100, 3_000)]:
            assert order.read(4, start, count).tolist() == expected[start : start + count]


def test_each_data_set_of_a_mixture_has_its_own_documents() -> None:
    a, b = Numbered([30] * 20), Numbered([7] * 90)
    a.masks = b.masks = ()  # type: ignore[assignment]
    config = BatchConfig(batch_tokens=64, micro_batch=2, seq_len=8, order="documents")
    both = Loader([a, b], config, seed=7, parts=[1, 1], end_of_text=EOT)
    assert [len(order.starts) for order in both.documents] == [20, 90]
    for step in (1, 12, 30):
        rows = np.concatenate([x for x, _ in both.batch(step).micro_batches])
        for row, (k, window) in zip(rows, both.windows(step).tolist(), strict=True):
            epoch, within = divmod(window, both.n_windows[k])
            assert row.tolist() == both.documents[k].read(epoch, within * 8, 8).tolist()


def test_data_without_documents_is_refused_with_the_mend(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    config = BatchConfig(batch_tokens=64, micro_batch=2, seq_len=8, order="documents")
    with pytest.raises(DataError, match=r"needs an end of text between documents.*--batch\.order shuffled"):
        Loader(Numbered([50, 50]), config, seed=7)
    one = Numbered([50, 50])
    one.tokens[50] = 7
    with pytest.raises(DataError, match=r"the data is one document .* nothing to shuffle; take --batch\.order shuf"):
        loader(one)
    done = regpt2("train", tiny_recipe, "--data", tiny_data, "--run", tmp_path / "run", "--batch.order", "documents")
    assert done.returncode == 1 and "nothing to shuffle" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
