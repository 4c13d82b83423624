"""Megatron-LM, NeMo, GPT-NeoX: bare uint16 in `.bin`, sequences and documents in `.idx`. In: tokens; out: such pairs.

Each document is one sequence, with its end of text at its end, as `preprocess_data.py --append-eod` writes it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.base.files import atomic_file
from regpt2.data.tokens.manifest import TOKEN_BYTES
from regpt2.data.tokens.other_formats import MEGATRON_HEAD, MEGATRON_MAGIC, MEGATRON_UINT16
from regpt2.data.tokens.writing import TokenData, write_documents

SHARDED = False
END_OF_TEXT_LAST = True
MOST_TOKENS = 2**31 - 1  # of a sequence: its length is an int32
_AT_ONCE = 1 << 16  # documents


def write(folder: Path, data: TokenData) -> None:
    for split in data.splits:
        stem = f"{data.dataset}_{split.name}"
        ends = folder / f"{stem}.ends"
        n_documents = write_documents(folder / f"{stem}.bin", ends, split, data.tokenizer.eot)
        _write_index(folder / f"{stem}.idx", ends, n_documents)
        ends.unlink()


def _write_index(path: Path, ends: Path, n_documents: int) -> None:
    """Lengths of all sequences, then their byte offsets, then the sequence at which each document begins or ends."""
    with atomic_file(path) as file:
        file.write(MEGATRON_HEAD.pack(MEGATRON_MAGIC, 1, MEGATRON_UINT16, n_documents, n_documents + 1))
        for first, last in _spans(ends, n_documents):
            if (longest := int((last - first).max())) > MOST_TOKENS:
                raise DataError(
                    f"a document has {longest:,} tokens, more than a Megatron sequence can hold ({MOST_TOKENS:,}); "
                    "choose another format."
                )
            file.write((last - first).astype("<i4").tobytes())
        for first, _ in _spans(ends, n_documents):
            file.write((TOKEN_BYTES * first).astype("<i8").tobytes())
        for start in range(0, n_documents + 1, _AT_ONCE):
            file.write(np.arange(start, min(start + _AT_ONCE, n_documents + 1), dtype="<i8").tobytes())


def _spans(ends: Path, n_documents: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The first token of each document, and the one after its last, many documents at a time."""
    before = 0
    for start in range(0, n_documents, _AT_ONCE):
        last = np.fromfile(ends, dtype="<i8", count=min(_AT_ONCE, n_documents - start), offset=8 * start)
        yield np.concatenate([[before], last[:-1]]), last
        before = int(last[-1])
