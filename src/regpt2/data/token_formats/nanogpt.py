"""nanoGPT: bare uint16 in `train.bin` and `val.bin`. In: tokens; out: a folder for its `data/`.

Its `meta.pkl`, which only its own character-level data sets have, is a pickle and is not written.
"""

from pathlib import Path

from regpt2.base.files import atomic_file
from regpt2.data.outgoing import TokenData

SHARDED = False
END_OF_TEXT_LAST = True


def write(folder: Path, data: TokenData) -> None:
    """Write one file for each split."""
    for split in data.splits:
        with atomic_file(folder / f"{split.name}.bin") as file:
            for piece in split.all():
                file.write(piece.astype("<u2", copy=False).tobytes())
