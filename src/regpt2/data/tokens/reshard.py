"""Token folders to other formats. In: a data folder, of any project; out: a new one, read back and compared."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import tyro

from regpt2.base import shelves
from regpt2.base.console import ProgressLine, say, warn
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import folder_lock, fsync_dir, require_free_space, write_atomic
from regpt2.data.characters import META_NAME
from regpt2.data.checks.counts import eot_is_last
from regpt2.data.tokenizer import OWN, OWN_FILE, Tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, TOKEN_BYTES, Manifest
from regpt2.data.tokens.other_formats import foreign_files
from regpt2.data.tokens.shards import TokenStream, open_tokens
from regpt2.data.tokens.writing import DEFAULT_SHARD_TOKENS, Piece, SplitTokens, TokenData, TokenRow

SHELF = "data.token_formats"
READ_TOKENS = 1 << 20


@dataclass(frozen=True)
class ReshardOptions:
    """Write the tokens of a data folder in another format; they are read back and compared before OUT appears."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder that prepare made, or one of llm.c, modded-nanogpt, build-nanogpt, nanoGPT, Megatron or datatrove."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write: new or empty."""
    to: str
    """The format: datatrove, llmc (also modded-nanogpt), megatron, nanogpt, native or npy (build-nanogpt)."""
    shard_tokens: int | None = None
    """Tokens per shard, by default 100,000,000, for llmc, native and npy; the others have one file for each split."""
    val_tokens: int | None = None
    """Take the first N tokens (of val, if there is one, then of train) as the validation split."""
    max_tokens: int | None = None
    """Write at most N tokens of the training split."""
    name: str | None = None
    """What the files are called by; by default what DATA says that its text is, else "tokens"."""
    tokenizer: str | None = None
    """Whose ids they are, if DATA has no manifest.json, meta.pkl or vocab.bpe: gpt2 (the default) or bytes."""


@dataclass(frozen=True)
class _OpenSource:
    """The splits of a data folder, validation first. Its text is known by `dataset`, `source` and `revision`."""

    streams: dict[str, TokenStream]
    tokenizer: Tokenizer
    source: str
    revision: str

    @property
    def is_masked(self) -> bool:
        """Whether not every token counts in the loss, or tokens were added to the vocabulary."""
        return any(stream.masks or stream.added for stream in self.streams.values())

    @property
    def dataset(self) -> str | None:
        return self.streams["train"].dataset

    def pieces(self) -> Iterator[Piece]:
        """All tokens, those of val first, with end of text before each document."""
        for stream in self.streams.values():
            n_tokens = stream.n_tokens
            if eot_is_last(stream, self.tokenizer.eot):  # the one at the very end belongs to the beginning
                yield np.array([self.tokenizer.start_id], dtype=np.uint16)
                n_tokens -= 1
            yield from _pieces(stream, n_tokens)


def reshard(options: ReshardOptions) -> None:
    """Write the tokens of `options.data` to `options.out`, which appears when it is whole and compared.

    Raises:
        UsageError: an impossible option, or `out` holds something.
        DataError: `data` cannot be read, or what was written does not read back as the same.
    """
    entry = shelves.load(SHELF, options.to)
    _check(options, entry)
    with ExitStack() as stack:
        source = _open_source(options, stack)
        _check_holds(entry, options, source)
        name = _name(options, source)
        sizes = _sizes(options, source)
        require_free_space(options.out, int(1.05 * TOKEN_BYTES * sum(sizes.values())) + (1 << 20), "these tokens")
        out = options.out.resolve()
        part = out.with_name(f".{out.name}.tmp")
        with folder_lock(part):
            try:
                for left_by_a_kill in part.iterdir():
                    if left_by_a_kill.name != ".lock":
                        left_by_a_kill.unlink()
                _write_and_compare(part, entry, options, source, name, sizes)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    (part / ".lock").unlink()
    if out.exists():
        out.rmdir()
    part.rename(out)
    fsync_dir(part.parent)
    amounts = ", ".join(f"{n_tokens:,} {split} tokens" for split, n_tokens in sizes.items())
    say(f"{options.out}: {amounts} as {options.to}; read back, they are the same.")
    if "val" not in sizes:
        say("There is no validation split; --val-tokens N takes the first N tokens for it.")


def _check(options: ReshardOptions, entry: ModuleType) -> None:
    for name in ("shard_tokens", "val_tokens", "max_tokens"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} {number} must be at least 1.")
    if options.shard_tokens is not None and not entry.SHARDED:
        raise UsageError(f"--shard-tokens: {options.to} has one file for each split; leave the option out.")
    if options.shard_tokens is not None and options.shard_tokens >= 2**31:
        raise UsageError(f"--shard-tokens {options.shard_tokens} must be below 2,147,483,648, an int32 in the header.")
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise UsageError(f"OUT = {options.out} exists and is not an empty folder; name another place.")


def _check_holds(entry: ModuleType, options: ReshardOptions, source: _OpenSource) -> None:
    """Most formats hold bare ids; ids of characters without the characters would be read as GPT-2's."""
    if source.is_masked:
        raise UsageError(
            f"{options.data} holds conversations: a mask says which of their tokens count in the loss, and reshard "
            "cannot write it. For other shards prepare the conversations again, with --shard-tokens."
        )
    if source.tokenizer.characters is not None and not getattr(entry, "HOLDS_CHARACTERS", False):
        shelf = {name: shelves.load(SHELF, name) for name in shelves.entries(SHELF)}
        able = ", ".join(name for name, format_ in shelf.items() if getattr(format_, "HOLDS_CHARACTERS", False))
        raise UsageError(
            f"--to {options.to} cannot say which characters the ids of {options.data} are; formats that can: {able}."
        )


def _open_source(options: ReshardOptions, stack: ExitStack) -> _OpenSource:
    """Open all splits; the tokenizer is the one that the manifest or `meta.pkl` names, else the user."""
    folder = options.data
    manifest = Manifest.read(folder) if (folder / MANIFEST_NAME).exists() else None
    train = stack.enter_context(open_tokens(folder, "train"))
    has_val = "val" in manifest.splits if manifest else any(file.n_tokens for file in foreign_files(folder, "val"))
    streams = {"val": stack.enter_context(open_tokens(folder, "val"))} if has_val else {}
    streams["train"] = train
    known = train.tokenizer_fingerprint is not None
    if known and options.tokenizer not in (None, train.tokenizer_name):
        place = folder if manifest else OWN_FILE if train.vocab else META_NAME
        raise UsageError(f"--tokenizer {options.tokenizer}: {place} says {train.tokenizer_name}; leave it out.")
    if manifest is None:
        warn(train.note)
        if not known:
            for stream in streams.values():
                stream.tokenizer_name = options.tokenizer or "gpt2"
    tokenizer = train.tokenizer()
    if train.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{folder}: its {train.tokenizer_name} tokenizer has fingerprint {train.tokenizer_fingerprint}, "
            f"this program's {tokenizer.fingerprint}; prepare the folder again."
        )
    if manifest:
        return _OpenSource(streams, tokenizer, manifest.source, manifest.revision)
    for stream in streams.values():
        stream.vocab_size = tokenizer.vocab_size
    files = [file.path.name for stream in streams.values() for file in stream.files]
    source = f"another project's folder of {len(files)} token files, the first {files[0]}"
    return _OpenSource(streams, tokenizer, source, train.fingerprint)


def _name(options: ReshardOptions, source: _OpenSource) -> str:
    """The beginning of the file names. Other loaders look for "train" and "val" anywhere in a name."""
    name = options.name or source.dataset or "tokens"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) or re.search("train|val", name.lower()):
        raise UsageError(
            f"the name {name!r} cannot begin the files' names; choose a --name of up to 100 letters, digits, "
            '"_", "-" and ".", without "train" or "val" in it.'
        )
    return name


def _sizes(options: ReshardOptions, source: _OpenSource) -> dict[str, int]:
    """How many tokens each split gets, in the order in which they are read."""
    total = sum(stream.n_tokens for stream in source.streams.values())
    n_val = options.val_tokens or total - source.streams["train"].n_tokens
    if n_val >= total:
        raise UsageError(f"--val-tokens {n_val:,} must leave some of the {total:,} tokens to train on.")
    n_train = min(total - n_val, options.max_tokens or total)
    return {"val": n_val, "train": n_train} if n_val else {"train": n_train}


def _write_and_compare(
    part: Path, entry: ModuleType, options: ReshardOptions, source: _OpenSource, name: str, sizes: dict[str, int]
) -> None:
    n_millions = sum(sizes.values()) / 1e6
    with ProgressLine("reshard", n_millions, "M tokens") as progress:
        row, splits = TokenRow(source.pieces()), []
        digests = {split: hashlib.sha256() for split in sizes}
        for split, n_tokens in sizes.items():
            pieces = row.take(n_tokens)
            if entry.END_OF_TEXT_LAST and source.tokenizer.eot is not None:
                pieces = end_of_text_last(pieces, source.tokenizer.eot)
            splits.append(SplitTokens(split, n_tokens, TokenRow(_hashed(pieces, digests[split], progress))))
        shard_tokens = options.shard_tokens or DEFAULT_SHARD_TOKENS
        shaping = {"shard_tokens": shard_tokens, "val_tokens": options.val_tokens, "max_tokens": options.max_tokens}
        data = TokenData(
            dataset=name,
            source=source.source,
            revision=source.revision,
            tokenizer=source.tokenizer,
            options={option: str(number) for option, number in shaping.items() if number is not None},
            shard_tokens=shard_tokens,
            splits=tuple(splits),
        )
        entry.write(part, data)
        if source.tokenizer.name == OWN and source.tokenizer.vocab is not None:
            write_atomic(part / OWN_FILE, source.tokenizer.vocab)
    with ProgressLine("compare", n_millions, "M tokens") as progress:
        for split, digest in digests.items():
            written = hashlib.sha256()
            with open_tokens(part, split) as stream:
                for _ in _hashed(_pieces(stream, stream.n_tokens), written, progress):
                    pass
            if written.digest() != digest.digest():
                raise DataError(
                    f"what was written as {options.to} does not read back as the same {split} tokens; nothing is left "
                    f"at {options.out}: check the disk, and run the command again."
                )


def end_of_text_last(pieces: Iterator[Piece], eot: int) -> Iterator[Piece]:
    """The same tokens with end of text after each document: the one at the beginning goes to the end.

    Tokens that begin within a document are left as they are: their last document has no end of text.
    """
    first = next(pieces)
    if first[0] != eot:
        yield from chain([first], pieces)
    else:
        yield from chain([first[1:]], pieces, [np.array([eot], dtype=np.uint16)])


def _pieces(stream: TokenStream, n_tokens: int) -> Iterator[Piece]:
    for start in range(0, n_tokens, READ_TOKENS):
        yield stream.read(start, min(READ_TOKENS, n_tokens - start))


def _hashed(pieces: Iterable[Piece], digest: "hashlib._Hash", progress: ProgressLine) -> Iterator[Piece]:
    """The same tokens; digest and progress are updated as they pass."""
    for piece in pieces:
        digest.update(piece.tobytes())
        yield piece
        progress.advance(len(piece) / 1e6)
