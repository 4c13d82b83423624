"""build-nanogpt, the lecture's own: `.npy` shards. In: tokens; out: a folder that its loader lists and numpy loads."""

from pathlib import Path

import numpy as np

from regpt2.base.files import atomic_file
from regpt2.data.tokens.shards import shard_name
from regpt2.data.tokens.writing import TokenData

SHARDED = True
END_OF_TEXT_LAST = False


def write(folder: Path, data: TokenData) -> None:
    """Write the shards of all splits: val from 0, train from 1, as the lecture's script numbers them."""
    for split in data.splits:
        first = 1 if split.name == "train" else 0
        for index, (n_tokens, pieces) in enumerate(split.shards(data.shard_tokens), first):
            path = (folder / shard_name(data.dataset, split.name, index)).with_suffix(".npy")
            with atomic_file(path) as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (n_tokens,)}
                np.lib.format.write_array_header_1_0(file, header)
                for piece in pieces:
                    file.write(piece.astype("<u2", copy=False).tobytes())
