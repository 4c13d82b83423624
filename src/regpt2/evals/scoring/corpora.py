"""Corpora. In: a file as its publisher serves it, perhaps an archive; out: bytes, strings, texts ready to be scored."""

import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

from regpt2.base.errors import DataError
from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.detokenize import penn_treebank
from regpt2.evals.scoring.texts import Text, TextScore, score_texts

_MOST_BYTES = 1 << 28  # of one file; enwik8, the largest, has 100,000,000
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


def read_member(path: Path, member: str) -> bytes:
    """The bytes of one member of a zip or tar archive, or of the file if it is none. Nothing is unpacked to disk.

    Raises:
        DataError: there is no such member, or the archive is damaged, or what it holds is too large.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if member in archive.namelist():
                    with archive.open(member) as file:
                        return _read(file, path)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as packed:
                names = ((entry, entry.name.removeprefix("./")) for entry in packed if entry.isfile())
                found = next((packed.extractfile(entry) for entry, name in names if name == member), None)
                if found is not None:
                    return _read(found, path)
        else:
            with open(path, "rb") as plain:
                return _read(plain, path)
    except _BROKEN as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}; fetch it again.") from None
    raise DataError(f"{path}: the archive has no file {member}; give another, or that file itself.")


def _read(file: IO[bytes], path: Path) -> bytes:
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path} holds more than the {_MOST_BYTES:,} bytes that are expected of such a file at most.")
    return data


def read_text(path: Path, member: str) -> str:
    """The same as text, line ends as they are.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_member(path, member).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#x} at {error.start:,}.") from None


def score_sentences(context: EvalContext, asset: Asset, member: str, *, name: str) -> Figures:
    """`perplexity` per original word of a file of sentences, and how many `tokens` and `words`; `limit` of them."""

    def read() -> list[Text]:
        text = read_text(find(asset, name, context.files), member)
        return [sentences(text, context.need_tokenizer(), context.limit)]

    (score,) = score_texts(context, name, 1, read)
    return {"perplexity": score.perplexity, "tokens": score.n_tokens, "words": score.n_units}


def score_last_bytes(context: EvalContext, asset: Asset, n_bytes: int, *, name: str) -> TextScore:
    """The score of the end of the file `name`, per byte; `limit` counts windows."""

    def read() -> list[Text]:
        data = read_member(find(asset, name, context.files), name)
        return [last_bytes(data, n_bytes, context.need_tokenizer(), context.limit * context.seq_len)]

    (score,) = score_texts(context, name, 1, read)
    return score


def sentences(text: str, tokenizer: Tokenizer, limit: int) -> Text:
    """Sentences in the style of the Penn Treebank, one a line, as one document; its units are the original words."""
    lines = text.rstrip("\n").split("\n")[: limit or None]
    document = "".join(f"{penn_treebank(line)}\n" for line in lines)
    return Text([tokenizer.encode_to_numpy(document)], n_units=sum(len(line.split()) for line in lines))


def last_bytes(data: bytes, n_bytes: int, tokenizer: Tokenizer, limit_tokens: int) -> Text:
    """The end of a file as one document, its units bytes. What is not UTF-8 (a character cut in two) is left out."""
    ids = tokenizer.encode_to_numpy(data[-n_bytes:].decode("utf-8", "ignore"))[: limit_tokens or None]
    return Text([ids], n_units=int(tokenizer.token_bytes()[ids].sum()))
