"""Ids beyond a vocabulary: an added text is one id wherever it occurs, an id without a text decodes to nothing."""

import pytest

from regpt2.base.errors import DataError
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import StreamDecoder, load_tokenizer

BYTES = load_tokenizer("bytes")


def test_added_texts_are_ids_of_their_own_and_the_longest_wins() -> None:
    tokenizer = AddedTokens(BYTES, ["<|a|>", None, "<|a|>b", "é"])
    assert tokenizer.vocab_size == 261 and tokenizer.textless == (258,)
    assert tokenizer.encode("x<|a|>by<|a|>é") == [120, 259, 121, 257, 260]
    assert tokenizer.encode("") == [] and tokenizer.encode("<|a|") == [60, 124, 97, 124]
    assert tokenizer.decode([120, 259, 258, 121, 257, 260]) == "x<|a|>by<|a|>é"
    assert (tokenizer.eot, tokenizer.name, tokenizer.fingerprint) == (256, "bytes", BYTES.fingerprint)
    assert tokenizer.token_bytes().tolist()[255:] == [1, 0, 5, 0, 6, 2]


def test_end_of_text_in_a_text_stays_text() -> None:
    tokenizer = AddedTokens(BYTES, ["[PAD]"])
    assert 256 not in tokenizer.encode("<|endoftext|>[PAD]") and tokenizer.encode("[PAD]") == [257]


def test_the_first_of_equal_texts_is_encoded_and_each_decodes() -> None:
    tokenizer = AddedTokens(BYTES, ["[PAD]", "[PAD]", ""])
    assert tokenizer.encode("[PAD]") == [257] and tokenizer.decode([258]) == "[PAD]" and tokenizer.textless == (259,)


def test_added_tokens_stream_and_rows_without_a_text_encode_as_before() -> None:
    tokenizer = AddedTokens(BYTES, [None] * 7)
    assert tokenizer.encode("a[PAD]é") == BYTES.encode("a[PAD]é")
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(token) for token in [195, 258, 169]) + decoder.end() == "é"


def test_half_a_surrogate_pair_is_no_trap() -> None:
    assert AddedTokens(BYTES, ["a\ud800"]).decode([257]) == "a\ufffd"


def test_more_ids_than_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"65,537 tokens, of them 65,280 added ones; at most 65,536 fit\."):
        AddedTokens(BYTES, [None] * 65_280)
