"""A data folder to look into. In: its path; out: its manifest, splits and tokenizer, opened."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.errors import DataError
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, SPLITS, Manifest
from regpt2.data.tokens.other_formats import foreign_files
from regpt2.data.tokens.shards import TokenStream, open_tokens


@dataclass(frozen=True)
class OpenFolder:
    """Closed by the stack that `open_folder` was given."""

    path: Path
    manifest: Manifest | None
    splits: dict[str, TokenStream]
    tokenizer: Tokenizer


def open_folder(path: Path, split: str | None, stack: ExitStack) -> OpenFolder:
    """Open one split of a data folder, or all that it has, until the stack ends.

    Raises:
        DataError: it is unfinished or damaged, lacks the split, or was made with another vocabulary than ours.
    """
    manifest = Manifest.read(path) if (path / MANIFEST_NAME).exists() else None
    names = [split] if split else [name for name in SPLITS if _has(path, manifest, name)] or ["train"]
    splits = {name: stack.enter_context(open_tokens(path, name)) for name in names}
    stream = splits[names[0]]
    tokenizer = stream.tokenizer()
    if stream.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{path} was prepared with a {tokenizer.name} vocabulary of fingerprint {stream.tokenizer_fingerprint}, "
            f"this one is {tokenizer.fingerprint}; prepare the data again."
        )
    return OpenFolder(path, manifest, splits, tokenizer)


def _has(path: Path, manifest: Manifest | None, split: str) -> bool:
    if manifest is not None:
        return split in manifest.splits and bool(manifest.splits[split].shards)
    return any(file.n_tokens for file in foreign_files(path, split))
