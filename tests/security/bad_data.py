"""Folders of tokens that lie about themselves: shards, `.npy` files, manifests, vocabularies."""

import json
import struct
from pathlib import Path
from typing import Any

from bad_tensors import texts
from cases import ODD_THINGS, Case, Content, pipe, sparse

from regpt2.base.errors import DataError
from regpt2.base.files import sha256_bytes
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest, Shard, Split
from regpt2.data.tokens.shards import open_tokens, verify

SHARD, NPY, RAW, VOCAB = "fineweb_train_000000.bin", "edufineweb_train_000000.npy", "train.bin", "vocab.bpe"


def read_tokens(folder: Path) -> None:
    """Open the train split, look at its beginning and its end, and check its content."""
    with open_tokens(folder, "train") as tokens:
        tokens.read(0, min(1000, tokens.n_tokens))
        tokens.read(max(0, tokens.n_tokens - 1000), min(1000, tokens.n_tokens))
    for message in verify(folder):
        raise DataError(message)


def shard(n_stated: int, n_there: int, magic: int = 20240520, version: int = 1, order: str = "<") -> bytes:
    """A shard whose header need not be true."""
    return struct.pack(f"{order}3i", magic, version, n_stated).ljust(1024, b"\0") + bytes(2 * n_there)


def npy(
    shape: str = "(4,)", kind: str = "'<u2'", fortran: str = "False", version: bytes = b"\x01\x00", n: int = 8
) -> bytes:
    """A `.npy` file of this header."""
    header = f"{{'descr': {kind}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + bytes(n)


def saved_object() -> bytes:
    """An array of objects: the tokens are a pickle."""
    return npy(kind="'|O'") + b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR."


def shards() -> dict[str, Content]:
    """In place of a shard with a header."""
    return {
        "a negative count": shard(-1, 0),
        "the least count": shard(-(2**31), 4),
        "a huge count": shard(2**31 - 1, 4),
        "one more than there are": shard(5, 4),
        "one fewer than there are": shard(3, 4),
        "half a token": shard(4, 4) + b"\0",
        "another magic": shard(4, 4, magic=20240801),
        "another version": shard(4, 4, version=2),
        "the other byte order": shard(4, 4, order=">"),
        "a header alone": shard(4, 0),
        "half a header": shard(4, 4)[:512],
        "the magic alone": shard(4, 4)[:4],
        "3 bytes": b"\xd8\xd4\x34",
        "no tokens": shard(0, 0),
        "tokens beyond the vocabulary": shard(4, 0) + b"\xff\xff" * 4,
    }


def arrays() -> dict[str, Content]:
    """In place of a `.npy` file."""
    return {
        "objects": saved_object(),
        "objects in a structure": npy(kind="[('a', '|O')]"),
        "20 billion tokens": npy("(20000000000,)"),
        "2**70 tokens": npy(f"({2**70},)"),
        "minus one token": npy("(-1,)"),
        "two dimensions": npy("(2, 2)", n=8),
        "no dimension": npy("()", n=2),
        "a million dimensions": npy("(" + "1," * 30_000 + ")"),
        "columns first": npy("(2, 2)", fortran="True"),
        "big-endian": npy(kind="'>u2'"),
        "floats": npy(kind="'<f8'", n=32),
        "version 9": npy(version=b"\x09\x00"),
        "version 3": npy(version=b"\x03\x00"),
        "a header of 65,535": npy()[:8] + b"\xff\xff" + npy()[10:],
        "a header of code": npy("__import__('os').system('id')"),
        "a header of deep tuples": npy("(" * 20_000 + ")" * 20_000)[:60_000],
        "a header that is no dict": npy()[:10] + b"[1, 2]".ljust(117) + b"\n" + bytes(8),
        "the magic alone": b"\x93NUMPY",
        "one token fewer": npy(n=6),
        "one token more": npy(n=10),
        "a size of text": npy("('4',)"),
        "a size of true": npy("(True,)", n=8),
        "a type that is code": npy(kind="'os.system'"),
        "a pickle": b"\x80\x04cos\nsystem\n",
    }


def known(shard: Shard) -> dict[str, Any]:
    """A shard as the manifest has it: without what it has not."""
    return {name: value for name, value in vars(shard).items() if value is not None}


def manifest(**changed: Any) -> dict[str, Content]:
    """A true folder of one shard of bytes, its manifest changed."""
    data = shard(4, 4)
    record = Shard("tiny_train_000000.bin", 4, len(data), sha256_bytes(data))
    true = Manifest("tiny", "a test", "1", "bytes", "f" * 64, 257, {}, {"train": Split(1, 4, 4, (record,))}, {})
    document = {
        "version": 1,
        "dataset": "tiny",
        "source": "a test",
        "revision": "1",
        "tokenizer": "bytes",
        "tokenizer_fingerprint": "f" * 64,
        "vocab_size": 257,
        "options": {},
        "splits": {"train": {"documents": 1, "tokens": 4, "text_bytes": 4, "shards": [known(record)]}},
        "skipped": {},
        "fingerprint": true.fingerprint,
    }
    return {"tiny_train_000000.bin": data, "manifest.json": json.dumps(document | changed)}


def with_shard(**changed: Any) -> dict[str, Content]:
    """The same, with the manifest's record of the shard changed."""
    record: dict[str, Any] = {"file": "tiny_train_000000.bin", "tokens": 4, "bytes": 1032}
    record |= {"sha256": sha256_bytes(shard(4, 4))} | changed
    split = {"documents": 1, "tokens": record["tokens"], "text_bytes": 4, "shards": [record]}
    fingerprint = sha256_bytes("\n".join([str(record["sha256"]), "f" * 64]).encode())
    return manifest(splits={"train": split}, fingerprint=fingerprint)


def manifests() -> dict[str, dict[str, Content]]:
    """Folders by what their manifest says."""
    names = {
        "climbs": "../in/tiny_train_000000.bin",
        "is absolute": "/etc/passwd",
        "is of Windows": "..\\tiny.bin",
        "has a NUL": "tiny\0.bin",
        "has 300 characters": "a" * 300,
        "is empty": "",
        "is the folder": ".",
        "is the parent": "..",
        "is a folder within": "a/b",
        "is a number": 7,
        "is null": None,
        "has escapes": "\x1b]0;x\x07.bin",
        "is itself": "manifest.json",
        "has half a surrogate": "\udc80.bin",
    }
    folders = {f"a file name that {what}": with_shard(file=file) for what, file in names.items()}
    folders |= {
        "negative tokens": with_shard(tokens=-4),
        "tokens of text": with_shard(tokens="4"),
        "tokens of 10**30": with_shard(tokens=10**30, bytes=1024 + 2 * 10**30),
        "tokens of 4.0": with_shard(tokens=4.0),
        "tokens of true": with_shard(tokens=True),
        "a hash of another": with_shard(sha256="0" * 64),
        "a hash of numbers": with_shard(sha256=0),
        "a vocabulary of NaN": manifest(vocab_size=float("nan")),
        "a vocabulary of 10**400": manifest(vocab_size=float("inf")),
        "splits in a list": manifest(splits=[]),
        "a split of code": manifest(splits={"__class__": {}}),
        "options of numbers": manifest(options={"a": 1}),
        "no dataset": manifest(dataset=None),
        "another version": manifest(version=2),
        "a version in a list": manifest(version=[1]),
        "another fingerprint": manifest(fingerprint="0" * 64),
        "an unknown key": manifest(extra=1),
        "shards in an object": manifest(splits={"train": {"documents": 1, "tokens": 4, "text_bytes": 4, "shards": {}}}),
    }
    return folders


def data_cases(canary: Path) -> list[Case]:
    """All of them."""
    cases = [Case(f"shard: {what}", read_tokens, {SHARD: content}) for what, content in (shards() | ODD_THINGS).items()]
    cases += [Case(f"npy: {what}", read_tokens, {NPY: content}) for what, content in (arrays() | ODD_THINGS).items()]
    harmless = ("8 GB of zeros",)  # a raw file of nanoGPT is any even number of bytes
    for what, content in (ODD_THINGS | {"an odd number of bytes": b"abc"}).items():
        cases.append(Case(f"raw: {what}", read_tokens, {RAW: content}, fine=what in harmless))
    cases += [Case(f"manifest: {what}", read_tokens, files) for what, files in manifests().items()]
    for what, content in (texts() | ODD_THINGS).items():
        missing = what in ("a link to nothing", "a link to itself")  # then it is taken for a folder of llm.c, aloud
        cases.append(Case(f"manifest: {what}", read_tokens, manifest() | {"manifest.json": content}, fine=missing))
        vocab = Case(f"vocabulary: {what}", lambda folder: load_tokenizer("gpt2", folder / VOCAB), {VOCAB: content})
        cases.append(vocab)
    for what, content in {"a pipe": pipe, "longer than stated": sparse(1 << 30, shard(4, 4))}.items():
        cases.append(
            Case(f"manifest: its shard is {what}", read_tokens, manifest() | {"tiny_train_000000.bin": content})
        )
    cases.append(Case("manifest: true", read_tokens, manifest(), fine=True))
    cases.append(Case("npy: true", read_tokens, {NPY: npy()}, fine=True))
    return cases
