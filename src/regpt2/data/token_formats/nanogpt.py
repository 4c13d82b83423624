"""nanoGPT: bare uint16 in `train.bin` and `val.bin`. In: tokens; out: a folder for its `data/`.

Its `meta.pkl`, which only its character-level data sets have, comes with them.
"""

from pathlib import Path

from regpt2.base.files import atomic_file, write_atomic
from regpt2.data.characters import META_NAME, meta_bytes
from regpt2.data.tokens.writing import TokenData

SHARDED = False
END_OF_TEXT_LAST = True
HOLDS_CHARACTERS = True


def write(folder: Path, data: TokenData) -> None:
    """Write one file for each split, and what its ids are, if they are characters."""
    if data.tokenizer.characters is not None:
        write_atomic(folder / META_NAME, meta_bytes(data.tokenizer.characters))
    for split in data.splits:
        with atomic_file(folder / f"{split.name}.bin") as file:
            for piece in split.all():
                file.write(piece.astype("<u2", copy=False).tobytes())
