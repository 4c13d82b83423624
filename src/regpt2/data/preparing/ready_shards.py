"""Ready-made shards of GPT-2 tokens: what is published in, a data folder with its manifest out; nothing is tokenized.

A shard is fetched to its own name and compared with the publisher's SHA-256, or hard-linked from a local copy. It is
read once, header and ids checked, its documents and bytes of text counted into `.parts/NAME.json`. So a kill at any
moment costs the counting of the shards in work, and a download continues where it stopped.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from regpt2.base.console import ProgressLine, say
from regpt2.base.errors import DataError
from regpt2.base.files import CHUNK_BYTES, atomic_file, require_free_space, sha256_bytes, write_atomic
from regpt2.base.net.download import fetch
from regpt2.data.preparing.encode_part import PARTS_NAME
from regpt2.data.preparing.ledger import begin, clear, complete_already
from regpt2.data.preparing.workers import Report, Work, run_tasks
from regpt2.data.sources.plan import InputFile
from regpt2.data.tokenizer import Gpt2Tokenizer, Tokenizer, find_vocab, load_tokenizer
from regpt2.data.tokens.manifest import HEADER_BYTES, IDENTITY, Manifest, Shard, Split
from regpt2.data.tokens.other_formats import token_file


@dataclass(frozen=True)
class ReadyPlan:
    """The shards of each split, in the order of their tokens. `dataset` names the text, as references know it."""

    splits: dict[str, tuple[InputFile, ...]]
    dataset: str
    source: str
    revision: str

    @property
    def files(self) -> list[InputFile]:
        return [file for files in self.splits.values() for file in files]

    @property
    def fingerprint(self) -> str:
        """Changes with the planned content of the folder."""
        lines = [f"{self.dataset} {self.source} {self.revision}"]
        lines += [f"{split} {f.name} {f.n_bytes} {f.digest}" for split, files in self.splits.items() for f in files]
        return sha256_bytes("\n".join(lines).encode())


@dataclass(frozen=True)
class Counted:
    """A finished shard and what it holds."""

    shard: Shard
    documents: int
    text_bytes: int

    @classmethod
    def read(cls, folder: Path, file: InputFile) -> "Counted | None":
        """The count of a shard; None while it is not finished."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            content = json.loads(_count_file(folder, file).read_text(encoding="utf-8"))
            counted = cls(Shard(**content["shard"]), content["documents"], content["text_bytes"])
            if counted.shard.bytes == (folder / file.name).stat().st_size:
                return counted
        return None


def collect(plan: ReadyPlan, folder: Path, vocab: Path | None, workers: int) -> Manifest:
    """Fill `folder`, which the caller holds, or resume where an earlier call was interrupted.

    `vocab` is a `vocab.bpe`; None: find one.

    Raises:
        UsageError: the folder holds something else.
        DataError: a shard is not one of GPT-2 tokens, or a local copy differs from what was published.
        DownloadError: a shard cannot be fetched.
    """
    identity = (plan.dataset, plan.source, plan.revision, Gpt2Tokenizer.name, Gpt2Tokenizer.fingerprint)
    settings = dict(zip(IDENTITY, identity, strict=True))
    if manifest := complete_already(folder, settings):
        return manifest
    find_vocab(vocab)
    begin(folder, settings, plan.fingerprint).write(folder)
    waiting = [file for file in plan.files if Counted.read(folder, file) is None]
    n_bytes = sum(file.n_bytes for file in waiting)
    say(f"{plan.source}: {len(waiting):,} of {len(plan.files):,} shards to get, {n_bytes / 1e9:,.2f} GB.")
    require_free_space(folder, sum(_bytes_to_write(file, folder) for file in waiting), f"getting {plan.source}")
    with ProgressLine("ready", n_bytes / 1e6, "MB") as line:
        done = run_tasks(
            waiting,
            partial(_start, folder, vocab),
            max(1, min(workers, len(waiting))),
            on_progress=lambda amount: line.advance(amount / 1e6),
        )
        for _ in done:
            pass
    manifest = Manifest(
        *identity,
        vocab_size=Gpt2Tokenizer.vocab_size,
        options={},
        splits={split: _split(folder, files) for split, files in plan.splits.items()},
        skipped={},
    )
    manifest.write(folder)
    clear(folder)
    return manifest


def _start(folder: Path, vocab: Path | None) -> Work:
    """Make ready to work: what each id stands for, once per process."""
    return partial(_get, folder, load_tokenizer("gpt2", vocab))


def _get(folder: Path, tokenizer: Tokenizer, file: InputFile, report: Report) -> None:
    place = folder / file.name
    if file.path:
        counted = _count(Path(file.path), file, tokenizer)
        _link_or_copy(Path(file.path), place)
        report(file.n_bytes)
    else:
        fetch(file.url, place, n_bytes=file.n_bytes, digest=file.digest, on_bytes=report)
        counted = _count(place, file, tokenizer)
    write_atomic(_count_file(folder, file), json.dumps(asdict(counted)))


def _count(path: Path, file: InputFile, tokenizer: Tokenizer) -> Counted:
    tokens = token_file(path)
    if tokens.offset != HEADER_BYTES:
        raise DataError(f"{path} has no header of llm.c's; it cannot be used as a ready-made shard.")
    digest, position, counts = hashlib.sha256(), 0, np.zeros(2, dtype=np.int64)
    with open(path, "rb") as opened:
        digest.update(opened.read(HEADER_BYTES))
        while data := opened.read(CHUNK_BYTES):
            digest.update(data)
            ids = np.frombuffer(data, dtype="<u2")
            if ids.max() >= tokenizer.vocab_size:
                bad = int(np.argmax(ids >= tokenizer.vocab_size))
                raise DataError(
                    f"{path} holds id {ids[bad]} at token {position + bad:,}, outside the vocabulary of "
                    f"{tokenizer.vocab_size:,}: it was not made with GPT-2's tokenizer."
                )
            position += len(ids)
            counts += tokenizer.count(ids)
    if len(file.digest) == 64 and digest.hexdigest() != file.digest:
        raise DataError(
            f"{path} has SHA-256 {digest.hexdigest()}, its publisher says {file.digest}; get the file again, or leave "
            "out --input to download it."
        )
    shard = Shard(file.name, tokens.n_tokens, file.n_bytes, digest.hexdigest())
    return Counted(shard, *counts.tolist())


def _bytes_to_write(file: InputFile, folder: Path) -> int:
    if file.path:
        return 0 if os.stat(file.path).st_dev == folder.stat().st_dev else file.n_bytes
    begun = (folder / file.name, folder / f"{file.name}.part")
    return max(0, file.n_bytes - sum(path.stat().st_size for path in begun if path.exists()))


def _link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where that is not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with open(source, "rb") as original, atomic_file(target) as copy:
            shutil.copyfileobj(original, copy, CHUNK_BYTES)


def _split(folder: Path, files: tuple[InputFile, ...]) -> Split:
    counts = [counted for file in files if (counted := Counted.read(folder, file)) is not None]
    assert len(counts) == len(files), "every shard has been counted"
    return Split(
        documents=sum(counted.documents for counted in counts),
        tokens=sum(counted.shard.tokens for counted in counts),
        text_bytes=sum(counted.text_bytes for counted in counts),
        shards=tuple(counted.shard for counted in counts),
    )


def _count_file(folder: Path, file: InputFile) -> Path:
    return folder / PARTS_NAME / f"{file.name}.json"
