"""Ready-made shards of GPT-2 tokens, as llm.c and modded-nanogpt use them: a set's name in, its shards out.

No text and no tokenizing, so instead of `plan` and `documents` there is `shards`;
data/preparing/ready_shards.py does the work.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from regpt2.base.console import warn
from regpt2.base.errors import DataError, DownloadError, UsageError, did_you_mean
from regpt2.data.preparing.ready_shards import ReadyPlan
from regpt2.data.sources import hub
from regpt2.data.sources.plan import InputFile, Source, input_file, revision_of
from regpt2.data.sources.published import refuse

DESCRIPTION = (
    "ready-made GPT-2 tokens, nothing to tokenize; --config fineweb_edu_10B (default, 20 GB to download), fineweb_10B, "
    "fineweb_edu_100B or fineweb_100B; --first N takes N train shards"
)


class ReadyMade(NamedTuple):
    """Where shards are published, what their names begin with, and what text they hold."""

    repo: str
    revision: str
    prefix: str
    dataset: str


SETS = {
    "fineweb_edu_10B": ReadyMade("kjj0/finewebedu10B-gpt2", "main", "finewebedu", "fineweb_edu"),
    "fineweb_10B": ReadyMade("kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c", "fineweb", "fineweb"),
    "fineweb_edu_100B": ReadyMade(
        "karpathy/fineweb-edu-100B-gpt2-token-shards",
        "a33f75d78c7f74236fb03754ec1eb3cc77507d64",
        "edu_fineweb",
        "fineweb_edu",
    ),
    "fineweb_100B": ReadyMade("kjj0/fineweb100B-gpt2", "main", "fineweb", "fineweb"),
}


def shards(source: Source) -> ReadyPlan:
    """The shards of a set: the validation shard, and all train shards or the first few.

    Raises:
        UsageError: an option that this data set does not take, or an unknown set.
        DataError: there are no shards, or the local copy lacks one.
        DownloadError: the hub cannot be reached, and there is no local copy.
    """
    refuse("ready", repo=source.repo, split=source.split)
    config = source.config or next(iter(SETS))
    if config not in SETS:
        known = ", ".join(SETS)
        raise UsageError(f"ready: there is no --config {config!r}{did_you_mean(config, SETS)} Available: {known}.")
    if source.input is not None and not source.input.is_dir():
        raise UsageError(f"--input {source.input}: there is no such folder.")
    made = SETS[config]
    files, revision = _published(made, source)
    train, val = _of_split(files, made, "train")[: source.first], _of_split(files, made, "val")
    if not train or not val:
        place = source.input or f"{made.repo} at {revision}"
        raise DataError(f"{place} lacks {made.prefix}_train_000001.bin or {made.prefix}_val_000000.bin.")
    if source.input is not None:
        train, val = ([_local(source.input, file) for file in split] for split in (train, val))
    few = "" if source.first is None else f", the first {source.first} train shards"
    return ReadyPlan({"train": tuple(train), "val": tuple(val)}, made.dataset, f"{made.repo}{few}", revision)


def _published(made: ReadyMade, source: Source) -> tuple[list[InputFile], str]:
    """All files and their commit; those of the local copy if the hub cannot be reached."""
    try:
        commit = hub.resolve(made.repo, source.revision or made.revision)
        return hub.list_files(made.repo, commit), commit
    except DownloadError as error:
        if source.input is None:
            raise
        warn(f"{error} The copy in {source.input} is used without comparing it with what is published.")
    files = [input_file(path, path.name) for path in sorted(source.input.glob(f"{made.prefix}_*.bin"))]
    return files, f"a local copy: {len(files)} files, names and sizes {revision_of(files)}"


def _of_split(files: Iterable[InputFile], made: ReadyMade, split: str) -> list[InputFile]:
    found = [file for file in files if re.fullmatch(rf"{made.prefix}_{split}_\d{{6}}\.bin", file.name)]
    return sorted(found, key=lambda file: file.name)


def _local(folder: Path, file: InputFile) -> InputFile:
    path = folder / file.name
    if not path.is_file():
        raise DataError(
            f"--input {folder} lacks {file.name}; put it there, or take fewer train shards with --first N, or leave "
            "out --input to download them."
        )
    copy = input_file(path, file.name)
    if copy.n_bytes != file.n_bytes:
        raise DataError(f"{path} has {copy.n_bytes:,} bytes, its publisher says {file.n_bytes:,}; get the file again.")
    return replace(copy, digest=file.digest)
