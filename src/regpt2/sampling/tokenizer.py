"""The tokenizer of a model. In: a loaded model; out: the tokenizer that it was trained with."""

from dataclasses import replace
from pathlib import Path

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, Problem
from regpt2.base.files import sha256_bytes
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.characters import META_NAME, CharacterTokenizer, read_meta
from regpt2.data.chat_template import TEMPLATE, special_ids
from regpt2.data.own_vocabulary import NAME as TOKENIZER_JSON
from regpt2.data.own_vocabulary import read_own
from regpt2.data.tokenizer import (
    OWN,
    OWN_FILE,
    TOKENIZERS,
    VOCAB_SHA256,
    BytePairTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    load_tokenizer,
)
from regpt2.model.files.contract import GPT2_ROWS, GPT2_TOKENS, TokenizerRef, Vocabulary
from regpt2.model.files.load import LoadedModel
from regpt2.model.kernels.activation import split_activation

_WAYS_OUT = (
    "So it can neither generate nor score text. `regpt2 convert` converts the weights, without the vocabulary, and "
    "`regpt2 evaluate MODEL --evals val_loss --data DIR` measures the model on ids of its own tokenizer."
)
_META_MEND = (
    f"For nanoGPT's character-level data give the {META_NAME} of its folder, as in --tokenizer "
    f"nanoGPT/data/shakespeare_char/{META_NAME}, or copy that file beside the model."
)


def tokenizer_of(loaded: LoadedModel, meta: Path | None = None) -> Tokenizer:
    """The tokenizer that the model was trained with, and the texts of rows that were added to it.

    `meta` is nanoGPT's `meta.pkl` with the characters of the ids, or its folder; the default is one beside the model.
    For a byte-pair encoding of one's own it is its `tokenizer.json`.

    Raises:
        CheckpointError: it is unknown, not supported, or has another vocabulary than ours of the same name.
        DataError: `meta.pkl` is missing, or is not as nanoGPT writes it.
    """
    ref = _given(loaded, meta) or _characters(loaded, meta) or loaded.tokenizer or _by_size(loaded)
    rows = loaded.model.config.vocab_size
    if ref.objection is not None:
        insist = "If the weights were trained with GPT-2's tokenizer anyway, remove that file."
        raise CheckpointError(f"{loaded.source}: {ref.objection} {_WAYS_OUT} {insist}")
    if ref.name not in TOKENIZERS and ref.characters is None and not _is_own(ref):
        known = " and ".join(TOKENIZERS)
        raise CheckpointError(
            f"{loaded.source} was trained with the tokenizer {ref.name!r:.80}; regpt2 supports only {known}. "
            f"{_WAYS_OUT}"
        )
    tokenizer = _with_vocabulary(ref)
    if ref.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{loaded.source} was trained with a {ref.name!r} vocabulary of fingerprint {ref.fingerprint}, expected "
            f"{tokenizer.fingerprint}; its ids mean other text here. {_WAYS_OUT}"
        )
    if tokenizer.vocab_size + len(ref.added) != rows:
        raise CheckpointError(
            f"{loaded.source} has {rows:,} tokens, its tokenizer {tokenizer.name!r} has {tokenizer.vocab_size:,}. "
            f"{_WAYS_OUT}"
        )
    if not ref.added:
        return tokenizer
    tokenizer = AddedTokens(tokenizer, ref.added)
    if n := len(tokenizer.textless):
        whose = "GPT-2's" if ref.name == "gpt2" else "the vocabulary's"
        warn(
            f"{loaded.source}: {n:,} rows beyond {whose} {loaded.n_text_tokens:,} tokens have no text; "
            "they are never sampled."
        )
    return tokenizer


def named_tokenizer(loaded: LoadedModel) -> TokenizerRef | None:
    """The tokenizer that the model's files name, or nanoGPT's `meta.pkl` beside them; None if there is neither.

    Raises:
        DataError: `meta.pkl` is not as nanoGPT writes it.
    """
    return loaded.tokenizer or _characters(loaded, None)


def vocabulary_of(loaded: LoadedModel, meta: Path | None = None) -> Vocabulary | None:
    """What a converted file can hold of the model's tokenizer; of one that is not available only its name.

    Raises:
        Problem: `meta` was given and does not fit, as in `tokenizer_of`.
    """
    ref = loaded.tokenizer
    try:
        tokenizer = tokenizer_of(loaded, meta)
    except Problem as problem:
        if meta is not None:
            raise
        why = str(problem) if ref is None or ref.objection is None else f"{loaded.source}: {ref.objection}"
        warn(f"{why} The weights are converted. The tokenizer's own files are left out.")
        return None if ref is None else Vocabulary(ref.name, ref.fingerprint, added=ref.added)
    base, added = (tokenizer.base, tokenizer.added) if isinstance(tokenizer, AddedTokens) else (tokenizer, ())
    merges = base.vocab if isinstance(base, BytePairTokenizer) else None
    name, fingerprint, characters = tokenizer.name, tokenizer.fingerprint, tokenizer.characters
    vocabulary = Vocabulary(name, fingerprint, tokenizer.eot, merges, added=added, characters=characters)
    special = special_ids(tokenizer)
    return vocabulary if special is None else replace(vocabulary, chat_template=TEMPLATE, end_of_turn=special[1])


def _by_size(loaded: LoadedModel) -> TokenizerRef:
    """GPT-2's, for a model of its size that does not name a tokenizer."""
    rows = loaded.model.config.vocab_size
    if rows not in (GPT2_TOKENS, GPT2_ROWS):
        raise CheckpointError(
            f"{loaded.source} does not say which tokenizer it was trained with, and its {rows:,} tokens are "
            f"not GPT-2's {GPT2_TOKENS:,}. {_META_MEND} For a byte-pair encoding of your own give its "
            f"{TOKENIZER_JSON} in the same way. {_WAYS_OUT}"
        )
    warn(f"{loaded.source} does not say which tokenizer it was trained with; using GPT-2's, which has the same size.")
    return TokenizerRef("gpt2", VOCAB_SHA256, added=(None,) * (rows - GPT2_TOKENS))


def _given(loaded: LoadedModel, file: Path | None) -> TokenizerRef | None:
    """A byte-pair encoding of one's own from a file that the user names, for a model that does not include it."""
    names = (TOKENIZER_JSON, OWN_FILE)
    if file is None or not (file.suffix in (".json", ".bpe") or any((file / name).is_file() for name in names)):
        return None
    tokenizer, ref = BytePairTokenizer(read_own(file)), loaded.tokenizer
    if ref is not None and ref.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{loaded.source} was trained with a {ref.name!r} vocabulary of fingerprint {ref.fingerprint}, {file} has "
            f"one of fingerprint {tokenizer.fingerprint}; give the file that its data was prepared with."
        )
    added = ref.added if ref else (None,) * (loaded.model.config.vocab_size - tokenizer.vocab_size)
    return Vocabulary(tokenizer.name, tokenizer.fingerprint, tokenizer.eot, tokenizer.vocab, added=added)


def _characters(loaded: LoadedModel, meta: Path | None) -> TokenizerRef | None:
    """The characters of a model that does not include them, from nanoGPT's `meta.pkl`."""
    ref, rows = loaded.tokenizer, loaded.model.config.vocab_size
    place = Path(split_activation(loaded.source)[0])
    if meta is None:
        unknown = rows not in (GPT2_TOKENS, GPT2_ROWS) if ref is None else ref.name == CharacterTokenizer.name
        meta = (place if place.is_dir() else place.parent) / META_NAME
        if not unknown or (ref is not None and ref.characters is not None):
            return None
        if not (place.exists() and meta.is_file()):
            if ref is None:
                return None
            raise CheckpointError(f"{loaded.source} does not include the characters of its ids. {_META_MEND}")
    tokenizer = read_meta(meta / META_NAME if meta.is_dir() else meta)
    if ref is not None and ref.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{loaded.source} was trained with a {ref.name!r} vocabulary of fingerprint {ref.fingerprint}, {meta} has "
            f"characters of fingerprint {tokenizer.fingerprint}; give the {META_NAME} of its own data."
        )
    return TokenizerRef(tokenizer.name, tokenizer.fingerprint, characters=tokenizer.characters)


def _is_own(ref: TokenizerRef) -> bool:
    """Is it a byte-pair encoding of one's own, whose merges are known?"""
    return ref.name == OWN and isinstance(ref, Vocabulary) and ref.merges is not None


def _with_vocabulary(ref: TokenizerRef) -> Tokenizer:
    """Made from characters or GPT-2's merges beside the weights if possible: that needs no network."""
    if ref.characters is not None:
        return CharacterTokenizer(ref.characters)
    merges = ref.merges if isinstance(ref, Vocabulary) else None
    if ref.name == "gpt2" and merges is not None and sha256_bytes(merges) == VOCAB_SHA256:
        return Gpt2Tokenizer(merges)
    if ref.name == OWN and merges is not None:
        return BytePairTokenizer(merges)
    return load_tokenizer(ref.name)
