"""Our own: llm.c's shards with a `manifest.json`. In: tokens; out: a folder whose content can be verified."""

from pathlib import Path

from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import shard_name, write_shard
from regpt2.data.tokens.writing import SplitTokens, Tally, TokenData

SHARDED = True
END_OF_TEXT_LAST = False
HOLDS_CHARACTERS = True


def write(folder: Path, data: TokenData) -> None:
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
    tally, shards = Tally(), []
    for index, (n_tokens, pieces) in enumerate(split.shards(data.shard_tokens)):
        path = folder / shard_name(data.dataset, split.name, index)
        shards.append(write_shard(path, n_tokens, tally.counted(pieces, data.tokenizer)))
    return Split(tally.documents, tally.tokens, tally.text_bytes, tuple(shards))
