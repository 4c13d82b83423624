"""llm.c and modded-nanogpt: `.bin` shards with a header. In: tokens; out: a folder that both train from.

`NAME_val_000000.bin` and then `NAME_train_000001.bin`, as their own scripts number them. They are given as patterns:
`NAME_train_*.bin`. llm.c refuses a shard that is shorter than one of its batches.
"""

from pathlib import Path

from regpt2.data.tokens.shards import shard_name, write_shard
from regpt2.data.tokens.writing import TokenData

SHARDED = True
END_OF_TEXT_LAST = False


def write(folder: Path, data: TokenData) -> None:
    for split in data.splits:
        first = 1 if split.name == "train" else 0
        for index, (n_tokens, pieces) in enumerate(split.shards(data.shard_tokens), first):
            write_shard(folder / shard_name(data.dataset, split.name, index), n_tokens, pieces)
