"""The merges of a byte-pair encoding: what is one, what is not, and what can be kept of others."""

import pytest

from regpt2.base.byte_level.merges import (
    END_OF_TEXT,
    MOST_TOKENS,
    fault_in,
    fault_of,
    kept,
    layout_fault,
    merges_in,
    tokens_of,
    vocab_bytes,
)

GOOD = ["a b", "ab c", "Ġ ab"]


def test_good_merges_have_no_fault_and_come_back_from_their_file() -> None:
    assert fault_of(GOOD) is None and fault_in(vocab_bytes(GOOD)) is None and kept(GOOD) == GOOD
    assert merges_in(vocab_bytes(GOOD)) == GOOD and merges_in(vocab_bytes([])) == []
    assert tokens_of(GOOD)[-4:] == ["ab", "abc", "Ġab", END_OF_TEXT]


@pytest.mark.parametrize(
    ("merges", "why", "left"),
    [
        (["a bc", "b c"], "merge 1, 'a bc', is not two tokens", ["b c"]),
        (["b c", "a b", "a bc", "ab c"], "merge 4, 'ab c', gives a token that an earlier one gave", None),
        (["a b", "b c", "a bc"], "its token 'abc' is never formed", ["a b", "b c"]),
        (["a b", "b c", "a bc", "abc d"], "its token 'abc' is never formed", ["a b", "b c"]),
        (["a a", *(f"{'a' * 2**n} {'a' * 2**n}" for n in range(1, 8))], "of 256 bytes, at most 255", None),
    ],
    ids=["unknown part", "same token twice", "other merges first", "and what builds on it", "too long"],
)
def test_merges_that_programs_use_differently_are_named_and_left_out(
    merges: list[str], why: str, left: list[str] | None
) -> None:
    assert why in (fault_of(merges) or "")
    assert kept(merges) == (merges[:-1] if left is None else left)
    assert fault_of(kept(merges)) is None


@pytest.mark.parametrize("line", ["a", "a b c", "a  b", "", "é é b", "a 日"])
def test_lines_that_are_no_merges_are_named(line: str) -> None:
    assert "is not two tokens that come before it" in (fault_of([line]) or "")


def test_a_file_of_another_kind_is_no_vocabulary() -> None:
    assert fault_in(b"\xff\xfe") == "it is not UTF-8"
    assert "its first line is not '#version: 0.2'" in (fault_in(b"a b\n") or "")
    assert fault_in(vocab_bytes(GOOD)[:-1]) is not None
    assert "at most 65,278 have ids" in (fault_of(["a b"] * (MOST_TOKENS - 256)) or "")


def test_ids_in_another_layout_are_named_with_the_layout() -> None:
    ids = {token: n for n, token in enumerate(tokens_of(GOOD))}
    assert layout_fault(ids, GOOD) is None
    assert layout_fault({token: n for token, n in ids.items() if token != END_OF_TEXT}, GOOD) is None
    assert layout_fault(ids | {"<|user|>": len(ids)}, GOOD) is None
    first = {END_OF_TEXT: 0} | {token: n + 1 for n, token in enumerate(tokens_of(GOOD)[:-1])}
    assert (layout_fault(first, GOOD) or "").startswith("gives '!' the id 1, expected 0 (the layout of ids is")
    assert "gives 'abc' no id, expected 257" in (layout_fault({k: n for k, n in ids.items() if k != "abc"}, GOOD) or "")
    assert "the id True" in (layout_fault(ids | {"abc": True}, GOOD) or "")
    assert f"expected it for '{END_OF_TEXT}'" in (
        layout_fault({k: n for k, n in ids.items() if k != END_OF_TEXT} | {"</s>": 259}, GOOD) or ""
    )
