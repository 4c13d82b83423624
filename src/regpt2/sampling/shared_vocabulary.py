"""Data for a model that has a tokenizer. In: the model's and the data's; out: the one that both have, or a refusal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.contract import GPT2_ROWS, TokenizerRef


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokenizer of a model trained on, and what its rows were before."""

    tokenizer: Tokenizer
    new_ids: tuple[int, ...]
    """Ids that have a text in the data, and in the model no row or one without text."""
    textless: tuple[int, ...]
    """Ids of the model's rows that had no text."""


def shared_vocabulary(
    ref: TokenizerRef | None, rows: int, source: str, of_data: Tokenizer, data: str
) -> SharedVocabulary:
    """The vocabulary of a model that is trained further on data.

    The tokenizer has to be the same. Tokens that were added to it may differ as far as no id has two texts: the data
    may lack those of the model (one chat model trained on plain text, or 50,304 rows of which 47 have no text) and may
    have more of them.

    Args:
        ref: the model's tokenizer; None if its files do not say, and then the number of rows decides, with a warning.
        rows: the model's `vocab_size`.
        source, data: their names, for messages.

    Raises:
        ConfigError: they have different tokenizers.
        CheckpointError: the model's is not supported, or does not have the model's number of tokens.
    """
    base, added = (of_data.base, of_data.added) if isinstance(of_data, AddedTokens) else (of_data, ())
    before = _added_before(ref, rows, source, base, added, data)
    for at, (old, new) in enumerate(zip_longest(before, added)):
        if old and new and old != new:
            raise ConfigError(
                f"id {base.vocab_size + at:,} is {old!r:.80} in {source} and {new!r:.80} in {data}. Prepare the data "
                "with the tokens of the model, or begin from a model without added tokens."
            )
    whole = tuple(old or new for old, new in zip_longest(before, added))
    in_model = (*before, *(None,) * (len(whole) - len(before)))
    new_ids = [
        base.vocab_size + at for at, (old, now) in enumerate(zip(in_model, whole, strict=True)) if now and not old
    ]
    new_ids += [base.vocab_size + at for at in range(len(before), len(whole)) if not whole[at]]
    return SharedVocabulary(
        of_data if whole == added else AddedTokens(base, whole),
        tuple(sorted(new_ids)),
        tuple(base.vocab_size + at for at, text in enumerate(before) if not text),
    )


def _added_before(
    ref: TokenizerRef | None, rows: int, source: str, base: Tokenizer, added: Sequence[str | None], data: str
) -> Sequence[str | None]:
    """The texts of the model's rows beyond the data's vocabulary, which has to be the model's too."""
    if ref is None:
        n_tokens = base.vocab_size + len(added)
        of_gpt2 = base.name == "gpt2" and rows == GPT2_ROWS
        if rows not in (base.vocab_size, n_tokens) and not of_gpt2:
            raise ConfigError(
                f"{source} does not say which tokenizer it was trained with, and its {rows:,} tokens are not the "
                f"{n_tokens:,} of the tokenizer {base.name!r} that made {data}. Prepare the data with the model's own "
                "tokenizer, or begin from another model."
            )
        warn(
            f"{source} does not say which tokenizer it was trained with; it is taken to be {base.name!r}, which made "
            f"{data}, because it has as many tokens."
        )
        return added if rows == n_tokens else (None,) * (rows - base.vocab_size)
    if ref.objection is not None:
        raise CheckpointError(
            f"{source}: {ref.objection} So no data can be prepared for it. If the weights were trained with GPT-2's "
            "tokenizer anyway, remove that file."
        )
    if ref.fingerprint != base.fingerprint:
        again = f"`regpt2 prepare ... --tokenizer {ref.name}`" if ref.characters is None else "the model's characters"
        raise ConfigError(
            f"{source} was trained with the tokenizer {ref.name!r:.80} (fingerprint {ref.fingerprint[:16]!r}), and "
            f"{data} was made with {base.name!r} (fingerprint {base.fingerprint[:16]!r}), so its ids mean other text "
            f"to the model. Prepare the data again with {again}, into another folder."
        )
    if base.vocab_size + len(ref.added) != rows:
        raise CheckpointError(
            f"{source} has {rows:,} tokens, its tokenizer {base.name!r} has {base.vocab_size + len(ref.added):,}; "
            "copy it again."
        )
    return ref.added
