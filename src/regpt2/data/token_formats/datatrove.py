"""datatrove and nanotron: bare uint16 in `.ds`, document ends in `.ds.index`. In: tokens; out: a folder of them."""

from pathlib import Path

from regpt2.base.files import write_atomic
from regpt2.data.tokens.other_formats import INDEX_SUFFIX
from regpt2.data.tokens.writing import TokenData, write_documents

SHARDED = False
END_OF_TEXT_LAST = True


def write(folder: Path, data: TokenData) -> None:
    """Write for each split one file, its index, and datatrove's metadata."""
    for split in data.splits:
        name = f"00000_{data.dataset}_{split.name}.ds"
        write_documents(folder / name, folder / (name + INDEX_SUFFIX), split, data.tokenizer.eot)
        rounded = f"{split.n_tokens / 1e9:.3g} GT"
        write_atomic(folder / f"{name}.metadata", f"{data.tokenizer.name}|2\n{split.n_tokens}\n{rounded}")
