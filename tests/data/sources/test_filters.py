"""Rules that leave documents out, and the memory of what was seen, against Python's own sets."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt2.base.errors import UsageError
from regpt2.data.sources.filters import Filters, Seen


@pytest.mark.parametrize(
    ("filters", "text", "reason"),
    [
        (Filters(), "", None),
        (Filters(min_chars=5), "four", "documents shorter than 5 characters"),
        (Filters(min_chars=4), "four", None),
        (Filters(max_chars=3), "four", "documents longer than 3 characters"),
        (Filters(min_words_with_letters=0.5), "a 1 2", "documents with letters in less than 0.5 of the words"),
        (Filters(min_words_with_letters=0.5), "é 1", None),
        (Filters(min_words_with_letters=0.5), "中文 1 ...", "documents with letters in less than 0.5 of the words"),
        (Filters(max_repeated_lines=0.3), "a\nb\n a \n\nc", None),
        (Filters(max_repeated_lines=0.3), "a\nb\na\na", "documents with more than 0.3 repeated lines"),
        (Filters(max_repeated_lines=0.0), "a\n\n\nb", None),
    ],
)
def test_a_filter_says_why(filters: Filters, text: str, reason: str | None) -> None:
    assert filters.reason(text) == reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_chars": -1}, "--min-chars -1 must not be below 0"),
        ({"min_chars": 9, "max_chars": 8}, "nothing would be left"),
        ({"min_words_with_letters": 1.5}, "--min-words-with-letters 1.5 must be a share"),
        ({"max_repeated_lines": -0.1}, "--max-repeated-lines -0.1 must be a share"),
    ],
)
def test_impossible_filters_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Filters(**values)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12))
def test_what_is_new_is_what_a_set_says(batches: list[list[int]]) -> None:
    seen, known = Seen(), set[int]()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in known)
            known.add(value)
        assert seen.first(np.array(batch, dtype=np.uint64)).tolist() == expected


def test_many_hashes_are_remembered_in_few_runs() -> None:
    rng, seen, n_new = random.Random(0), Seen(), 0
    for _ in range(300):
        n_new += int(seen.first(np.array([rng.randrange(50_000) for _ in range(500)], dtype=np.uint64)).sum())
    assert n_new == sum(map(len, seen._runs)) == len(set(np.concatenate(seen._runs).tolist()))
    assert len(seen._runs) < 17
