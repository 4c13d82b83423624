"""The vocabulary of a model that is trained further: what fits, and what would give an id two meanings."""

from pathlib import Path

import pytest

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import Tokenizer, load_tokenizer
from regpt2.model.files.contract import TokenizerRef
from regpt2.sampling.shared_vocabulary import shared_vocabulary

Added = tuple[str | None, ...]
BYTES = load_tokenizer("bytes")


def of_data(added: Added) -> Tokenizer:
    return AddedTokens(BYTES, added) if added else BYTES


def ref(added: Added = ()) -> TokenizerRef:
    return TokenizerRef("bytes", BYTES.fingerprint, added=added)


@pytest.mark.parametrize(
    ("before", "now", "whole", "new_ids", "textless"),
    [
        ((), (), (), (), ()),
        ((), ("a", "b"), ("a", "b"), (257, 258), ()),
        (("a",), ("a", "b"), ("a", "b"), (258,), ()),
        (("a", "b"), (), ("a", "b"), (), ()),
        ((None, None), (), (None, None), (), (257, 258)),
        ((None, None, None), ("a", "b"), ("a", "b", None), (257, 258), (257, 258, 259)),
        ((None,), ("a", "b"), ("a", "b"), (257, 258), (257,)),
        (("a",), ("a", None), ("a", None), (258,), ()),
    ],
)
def test_tokens_of_both_are_kept(before: Added, now: Added, whole: Added, new_ids: object, textless: object) -> None:
    found = shared_vocabulary(ref(before), 257 + len(before), "model", of_data(now), "data")
    assert getattr(found.tokenizer, "added", ()) == whole
    assert (found.tokenizer.vocab_size, found.tokenizer.fingerprint) == (257 + len(whole), BYTES.fingerprint)
    assert (found.new_ids, found.textless) == (new_ids, textless)


def test_an_id_has_one_text() -> None:
    with pytest.raises(ConfigError, match=r"id 258 is 'b' in model and 'c' in data"):
        shared_vocabulary(ref(("a", "b")), 259, "model", of_data(("a", "c")), "data")


@pytest.mark.parametrize(("rows", "now"), [(257, ()), (258, ("a",)), (257, ("a",))], ids=str)
def test_where_the_model_does_not_say_the_size_decides_with_a_warning(
    rows: int, now: Added, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shared_vocabulary(None, rows, "model", of_data(now), "data")
    assert "model does not say which tokenizer" in capsys.readouterr().err
    assert found.new_ids == tuple(range(rows, found.tokenizer.vocab_size))


def test_50304_rows_that_say_nothing_are_gpt2_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Gpt2(Tokenizer):
        name, vocab_size, eot, start_id, fingerprint, encoder = "gpt2", 50257, 50256, 50256, "f", "none"

        def __init__(self) -> None:
            super().__init__([b""] * 50257)

        encode_to_numpy = None  # type: ignore[assignment]

    Gpt2.__abstractmethods__ = frozenset()
    found = shared_vocabulary(None, 50304, "model", Gpt2(), "data")
    assert len(found.textless) == 47 and found.tokenizer.vocab_size == 50304 and not found.new_ids


def test_another_tokenizer_is_refused_with_the_way_out() -> None:
    other = TokenizerRef("gpt2", "f" * 64)
    with pytest.raises(ConfigError, match=r"'gpt2' .*data was made with 'bytes'.* --tokenizer gpt2`, into another"):
        shared_vocabulary(other, 50257, "model", BYTES, "data")
    with pytest.raises(ConfigError, match=r"its 300 tokens are not the 257 of the tokenizer 'bytes' that made data"):
        shared_vocabulary(None, 300, "model", BYTES, "data")
    with pytest.raises(CheckpointError, match="model has 300 tokens, its tokenizer 'bytes' has 257"):
        shared_vocabulary(ref(), 300, "model", BYTES, "data")
    objection = TokenizerRef("llama", "f", objection="It has a LLaMA tokenizer.")
    with pytest.raises(CheckpointError, match=r"It has a LLaMA tokenizer\. So no data can be prepared for it"):
        shared_vocabulary(objection, 300, "model", BYTES, "data")
