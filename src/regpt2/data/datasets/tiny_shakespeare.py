"""The lecture's first data set: 1,115,394 bytes of Shakespeare's plays, downloaded once, cut into pieces of 32 KiB."""

from collections.abc import Iterator

from regpt2.base.errors import DataError
from regpt2.base.files import cache_dir, sha256_file
from regpt2.base.net.download import download
from regpt2.data.sources.plan import Document, Part, Plan, Skipped, Slice, Source, group, input_file
from regpt2.data.sources.text_stream import open_input, text_documents

DESCRIPTION = "the lecture's first data set, 1.1 MB; downloaded once, or a local copy by --input"

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def plan(source: Source) -> Plan:
    """One part: the whole text, from --input or the cache or the network."""
    path = source.input or cache_dir() / "tiny_shakespeare" / "input.txt"
    if source.input is None:
        download(URL, path, SHA256)
    elif not path.is_file() or (got := sha256_file(path)) != SHA256:
        fault = f"its SHA-256 is {got}, expected {SHA256}" if path.is_file() else "there is no such file"
        raise DataError(
            f"--input {path} is not tiny_shakespeare: {fault}; leave --input out to download it from {URL}."
        )
    file = input_file(path, "input.txt")
    return Plan(parts=group([(Slice(file), file.n_bytes)]), source=URL, revision=SHA256)


def documents(part: Part, skipped: Skipped) -> Iterator[Document]:
    skipped.file = part.slices[0].file.name
    with open_input(part.slices[0].file) as file:
        yield from text_documents(file, skipped)
