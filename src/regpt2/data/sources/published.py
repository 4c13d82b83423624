"""Data sets that are published as .parquet files on the hub: what is asked for in, the plan of their files out.

The files come from the hub, one part each, or lie in a local copy (--input), cut into smaller parts; the documents
and their order are the same. Only names and sizes are looked at here: workers fetch what they read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from regpt2.base.errors import DataError, UsageError, did_you_mean
from regpt2.data.sources import hub, records
from regpt2.data.sources.plan import InputFile, Part, Plan, Slice, Source, group, input_file, revision_of

CRAWLS = {  # the configurations of FineWeb and FineWeb-Edu, as in their cards
    "sample-10BT": "sample/10BT/*.parquet",
    "sample-100BT": "sample/100BT/*.parquet",
    "sample-350BT": "sample/350BT/*.parquet",
    "default": "data/*/*.parquet",
}
BYTES_PER_TOKEN = 4  # of English text, rather too few: a token has about 4.5


@dataclass(frozen=True)
class Publication:
    """A data set on the hub. `configs` has the pattern of each configuration's files; the first one is the default."""

    name: str
    repo: str
    revision: str
    configs: Mapping[str, str]
    n_tokens: Mapping[str, int] = field(default_factory=dict)
    val_tokens: int = 0
    val_file: str = ""
    """The file that is the validation split; --first counts the others, and it is always taken."""
    first: int | None = None
    """Files to take where --first is not given; None: all."""


@dataclass(frozen=True)
class Found:
    """The files that were asked for, in their order; `source` and `revision` are what the manifest says of them."""

    files: tuple[InputFile, ...]
    source: str
    revision: str
    n_tokens: int
    """An estimate; 0 if unknown."""


def find(publication: Publication, source: Source) -> Found:
    """The files of a configuration, by name: from the hub, or from `source.input`.

    Raises:
        UsageError: an option that this data set does not take, or an unknown configuration.
        DataError: there are no such files.
        DownloadError: the hub cannot be reached.
    """
    refuse(publication.name, repo=source.repo, split=source.split)
    config = _config(publication, source.config)
    pattern = publication.configs[config]
    if source.input is None:
        commit = hub.resolve(publication.repo, source.revision or publication.revision)
        listed = hub.list_files(publication.repo, commit, _folder(pattern))
        files = [file for file in listed if PurePosixPath(file.name).match(pattern)]
        place = f"{publication.repo} at {commit}"
    else:
        refuse(f"{publication.name} with --input", revision=source.revision)
        files, place = _local_files(source.input, pattern), f"--input {source.input}"
    if not files:
        raise DataError(f"{place} has no files {pattern}; check the folder, or the --revision.")
    held_out = [file for file in files if file.name == publication.val_file]
    if publication.val_file and not held_out:
        raise DataError(
            f"{place} lacks {publication.val_file}, the validation split; check the folder, or the --revision."
        )
    first = source.first or publication.first
    taken = [file for file in files if file not in held_out][:first] + held_out
    copy = f"a local copy: {len(taken)} files, names and sizes {revision_of(taken)}"
    return Found(
        files=tuple(taken),
        source=described(publication.repo, config, first=first),
        revision=commit if source.input is None else copy,
        n_tokens=publication.n_tokens.get(config, 0) * len(taken) // len(files) if source.input is None else 0,
    )


def plan_of(publication: Publication, source: Source) -> Plan:
    """The files as parts: a remote one whole, a local one cut where it can be."""
    found = find(publication, source)
    parts: tuple[Part, ...] = ()
    for val in (False, True):  # no part holds files of both splits
        files = [file for file in found.files if (file.name == publication.val_file) is val]
        if source.input is None:
            parts += whole_files(files, source.field)
        else:
            parts += group((sized for file in files for sized in records.slices(file, source.field)), source.field)
    n_tokens = found.n_tokens or sum(part.n_bytes for part in parts) // BYTES_PER_TOKEN
    return Plan(parts, found.source, found.revision, n_tokens=n_tokens, val_tokens=publication.val_tokens)


def whole_files(files: Iterable[InputFile], text_field: str) -> tuple[Part, ...]:
    """A part for each file; the files are not opened."""
    return tuple(Part((Slice(file),), records.text_bytes(file), text_field) for file in files)


def described(repo: str, *choices: str, first: int | None) -> str:
    """The request in words, for the manifest."""
    few = [] if first is None else [f"the first {first} files"]
    return ", ".join([repo, *filter(None, choices), *few])


def refuse(name: str, **options: object) -> None:
    """Refuse options that a data set does not take.

    Raises:
        UsageError: one is given.
    """
    for option, value in options.items():
        if value:
            raise UsageError(f"{name} takes no --{option}; leave out --{option} {value}.")


def _config(publication: Publication, config: str) -> str:
    known = list(publication.configs)
    if config and config not in known:
        raise UsageError(
            f"{publication.name}: there is no --config {config!r}{did_you_mean(config, known)} "
            f"Available: {', '.join(known)}; for another, choose hub --repo {publication.repo} --config {config}."
        )
    return config or known[0]


def _folder(pattern: str) -> str:
    """The folder that all files of a pattern lie below."""
    return pattern.split("*")[0].rpartition("/")[0]


def _local_files(top: Path, pattern: str) -> list[InputFile]:
    """The files below a copy of the whole repository, or of the folder alone; they are named as in the repository."""
    if not top.is_dir():
        raise UsageError(f"--input {top}: there is no such folder.")
    folder = _folder(pattern)
    base = top / folder if (top / folder).is_dir() else top
    inner = pattern.removeprefix(f"{folder}/")
    paths = [path for path in base.glob(inner) if not path.name.startswith(".")]
    named = sorted((str(PurePosixPath(folder, path.relative_to(base).as_posix())), path) for path in paths)
    return [input_file(path, name) for name, path in named]
