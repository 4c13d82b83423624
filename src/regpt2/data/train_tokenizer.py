"""A tokenizer of one's own, trained. In: files of text and a number of tokens; out: a `tokenizer.json`, and figures.

It is a byte-level byte-pair encoding with GPT-2's splitting and layout of ids, found by the package `tokenizers`. The
documents that `prepare` would hold out are held out here too: the compression is measured on text that it never saw.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt2.base import shelves
from regpt2.base.byte_level.merges import MOST_TOKENS, N_BYTES, kept, vocab_bytes
from regpt2.base.console import ProgressLine, count, say, warn
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import write_atomic
from regpt2.data.own_vocabulary import tokenizer_json
from regpt2.data.preparing.options import DEFAULT_VAL_FRACTION, SHELF
from regpt2.data.sources.plan import Plan, Skipped, Source
from regpt2.data.tokenizer import BytePairTokenizer, Gpt2Tokenizer, Tokenizer, local_vocab, valid_text
from regpt2.data.tokens.manifest import described

LEAST_TOKENS = N_BYTES + 1
LEAST_COUNT = 2  # a pair that occurs once would be learned by heart
LONGEST_TOKEN = 128  # characters, as GPT-2's longest
HELD_OUT_BYTES = 10_000_000  # at most, to measure the compression on
_ENTRY = "text_files"


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """Make a byte-level BPE of your own from text, with GPT-2's splitting: a tokenizer.json for prepare --tokenizer."""

    input: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="PATH")]
    """A file or folder of text, of the kinds that `prepare text_files` reads; may be given several times."""
    vocab_size: Annotated[int, tyro.conf.arg(metavar="N")]
    """Number of tokens: 256 bytes, merges and <|endoftext|>; from 257 to 65,535."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The tokenizer.json to write; it must not exist."""
    field: str = "text"
    """The field or column with the text in .jsonl, .json and .parquet."""

    def check(self) -> None:
        """Check everything that needs no text.

        Raises:
            UsageError: an option is impossible.
        """
        if not self.input:
            raise UsageError("--input PATH is missing: a file or folder of text to learn from.")
        if not LEAST_TOKENS <= self.vocab_size <= MOST_TOKENS:
            raise UsageError(
                f"--vocab-size {self.vocab_size:,} must be from {LEAST_TOKENS} (bytes and end of text) to "
                f"{MOST_TOKENS:,}: ids are kept in 16 bits."
            )
        if self.out.exists():
            raise UsageError(f"--out {self.out} exists; name another file, or remove it.")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What came out. Compression is in bytes of held-out text per token."""

    tokenizer: BytePairTokenizer
    text_bytes: int
    """Of the text that it was made from."""
    measured_bytes: int
    """Of the text that the compression was measured on."""
    is_held_out: bool
    """False: no document was held out, so that it was measured on the beginning of the text that it was made from."""
    bytes_per_token: float
    gpt2_bytes_per_token: float | None
    """None: GPT-2's vocabulary is not on this machine."""


def train_tokenizer(options: TrainTokenizerOptions) -> TrainedTokenizer:
    """Make the tokenizer and write its file. The same text in the same order gives the same bytes.

    Raises:
        UsageError: an impossible option, or the package `tokenizers` is missing.
        DataError: the input cannot be read, or has no text.
    """
    options.check()
    package = _package()
    texts = _Texts(options)
    n_merges = options.vocab_size - LEAST_TOKENS
    merges = _learn(package, texts, n_merges)
    if not texts.learned_bytes:
        raise DataError(f"there is no document in the input{_reasons(texts.skipped)}.")
    tokenizer = BytePairTokenizer(vocab_bytes(merges))
    gpt2 = local_vocab()
    made = TrainedTokenizer(
        tokenizer,
        texts.learned_bytes,
        sum(map(len, texts.measured)),
        bool(texts.held_out),
        _bytes_per_token(tokenizer, texts.measured),
        None if gpt2 is None else _bytes_per_token(Gpt2Tokenizer(gpt2.read_bytes()), texts.measured),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, tokenizer_json(tokenizer.vocab))
    _show(made, options, texts.skipped)
    return made


def _package() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise UsageError(
            "regpt2 tokenizer train needs the package tokenizers; install it with: pip install 'regpt2[tokenizer]'"
        ) from None


@dataclass
class _Texts:
    """The documents of all inputs; iterating gives those to learn from, once, and notes the others."""

    options: TrainTokenizerOptions
    skipped: Skipped = field(default_factory=Skipped)
    learned_bytes: int = 0
    held_out: list[bytes] = field(default_factory=list)
    first: list[bytes] = field(default_factory=list)
    """The beginning of the text to learn from, where nothing is held out."""

    def __post_init__(self) -> None:
        self.entry = shelves.load(SHELF, _ENTRY)
        self.own = self.entry.Options() if hasattr(self.entry, "Options") else None
        sources = [Source(path, self.options.field, options=self.own) for path in self.options.input]
        self.plans: list[Plan] = [self.entry.plan(source) for source in sources]

    @property
    def measured(self) -> list[bytes]:
        return self.held_out or self.first

    def __iter__(self) -> Iterator[str]:
        n_bytes = sum(plan.n_bytes for plan in self.plans)
        room, first_room = HELD_OUT_BYTES, HELD_OUT_BYTES
        with ProgressLine("reading", n_bytes / 1e6, "MB") as line:
            for text in self._documents():
                data = text.text.encode()
                line.advance(len(data) / 1e6)
                if text.split_for(DEFAULT_VAL_FRACTION, hashlib.sha256(data).digest()) == "val":
                    self.held_out += [data] if room > 0 else []
                    room -= len(data)
                    continue
                self.first += [data] if first_room > 0 and not self.held_out else []
                first_room -= len(data)
                self.learned_bytes += len(data)
                yield text.text

    def _documents(self) -> Iterator[Any]:
        for plan in self.plans:
            self.skipped.include(plan.skipped, plan.skipped.first)
            for part in plan.parts:
                for document in self.entry.documents(replace(part, options=self.own), self.skipped):
                    if document.text.strip():
                        yield replace(document, text=valid_text(document.text))


def _learn(package: Any, texts: _Texts, n_merges: int) -> list[str]:
    """The first `n_merges` merges of the text, without those that other programs would use differently."""
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = package.trainers.BpeTrainer(
        vocab_size=N_BYTES + n_merges + n_merges // 50 + 16,  # a few more, for those that are left out
        min_frequency=LEAST_COUNT,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    documents = iter(texts)
    first = next(documents, None)
    if first is not None and n_merges:
        model.train_from_iterator(_announced(first, documents, n_merges), trainer)
    else:
        for _ in documents:
            pass
    pairs = _merges_of(model) if n_merges else []
    return kept(pairs)[:n_merges]


def _announced(first: str, others: Iterator[str], n_merges: int) -> Iterator[str]:
    yield first
    yield from others
    say(f"finding {n_merges:,} merges ...")


def _merges_of(model: Any) -> list[str]:
    """The merges of a tokenizer of the package, "a b" each, in order."""
    return [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]


def _bytes_per_token(tokenizer: Tokenizer, texts: list[bytes]) -> float:
    return sum(map(len, texts)) / max(1, sum(len(tokenizer.encode_utf8(text)) for text in texts))


def _reasons(skipped: Skipped) -> str:
    return "".join(f"; {line}" for line in described(skipped, skipped.first))


def _show(made: TrainedTokenizer, options: TrainTokenizerOptions, skipped: Skipped) -> None:
    n_tokens = made.tokenizer.vocab_size
    if n_tokens < options.vocab_size:
        warn(
            f"the text has only {n_tokens - LEAST_TOKENS:,} merges of pairs that occur at least {LEAST_COUNT} times: "
            f"{n_tokens:,} tokens instead of {options.vocab_size:,}; for more, add text."
        )
    say(
        f"{options.out}: {n_tokens:,} tokens (256 bytes, {n_tokens - LEAST_TOKENS:,} merges, end of text) from "
        f"{count(made.text_bytes)} bytes of text, fingerprint {made.tokenizer.fingerprint[:16]}."
    )
    on = "held-out text" if made.is_held_out else "the text that it was made from (no document was held out)"
    beside = "" if made.gpt2_bytes_per_token is None else f"; GPT-2's tokenizer: {made.gpt2_bytes_per_token:.3f}"
    say(f"On {count(made.measured_bytes)} bytes of {on}: {made.bytes_per_token:.3f} bytes per token{beside}.")
    for line in described(skipped, skipped.first):
        say(f"  {line}")
    say(f"Next: regpt2 prepare text_files --input PATH --tokenizer {options.out} --out DIR")
    say(f"      regpt2 train RECIPE --data DIR --model.vocab-size {n_tokens}")
