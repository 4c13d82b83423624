"""Our own: llm.c's shards with a `manifest.json`. In: tokens; out: a folder whose content can be verified."""

from collections.abc import Iterator
from pathlib import Path

from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import shard_name, write_shard
from regpt2.data.tokens.writing import Piece, SplitTokens, TokenData

SHARDED = True
END_OF_TEXT_LAST = False
HOLDS_CHARACTERS = True


def write(folder: Path, data: TokenData) -> None:
    """Write the shards of all splits, and then the manifest."""
    Manifest(
        dataset=data.dataset,
        source=data.source,
        revision=data.revision,
        tokenizer=data.tokenizer.name,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        vocab_size=data.tokenizer.vocab_size,
        options=data.options,
        splits={split.name: _write_split(folder, data, split) for split in data.splits},
        skipped={},
        characters=data.tokenizer.characters,
    ).write(folder)


def _write_split(folder: Path, data: TokenData, split: SplitTokens) -> Split:
    counts, shards = _Counts(data.tokenizer), []
    for index, (n_tokens, pieces) in enumerate(split.shards(data.shard_tokens)):
        path = folder / shard_name(data.dataset, split.name, index)
        shards.append(write_shard(path, n_tokens, counts.counted(pieces)))
    return Split(counts.documents, split.n_tokens, counts.text_bytes, tuple(shards))


class _Counts:
    """Documents, by their end of text, and bytes of text in the tokens that pass."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.documents = self.text_bytes = 0
        self._tokenizer = tokenizer

    def counted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            documents, text_bytes = self._tokenizer.count(piece)
            self.documents += documents
            self.text_bytes += text_bytes
            yield piece
