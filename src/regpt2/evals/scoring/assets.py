"""The data of an evaluation. In: its description and optionally a local path; out: a file, checked by SHA-256."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.errors import DataError, DownloadError, UsageError, did_you_mean
from regpt2.base.files import cache_dir
from regpt2.base.net.download import download


@dataclass(frozen=True)
class Asset:
    """A file that an evaluation needs, as its publisher serves it."""

    name: str
    """Its file name, in the cache and in a local folder."""
    url: str
    """Where it is served; empty if it is not served as one file, so that a local file must be given."""
    sha256: str
    """Of the downloaded file; a local file is used unchecked."""
    licence: str = ""
    other_names: tuple[str, ...] = ()
    """Other names that it may have in a local folder."""


def files_by_name(items: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """`("hellaswag=a.jsonl", ...)` by name of the evaluation, each of which must be among `names`.

    Raises:
        UsageError: not of that form, no such evaluation, or nothing there.
    """
    files: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--files {item!r}: expected NAME=PATH, as in hellaswag=data/hellaswag_val.jsonl.")
        if name not in names:
            raise UsageError(f"--files {item!r}: there is no evaluation {name!r}{did_you_mean(name, names)}")
        if not Path(path).exists():
            raise UsageError(f"--files {item!r}: {path} does not exist.")
        files[name] = Path(path)
    return files


def find(asset: Asset, name: str, files: Mapping[str, Path]) -> Path:
    """The file: the local one if given, else from the cache, downloaded if needed.

    Args:
        name: the evaluation; `files` may have a path for it, of the file itself or of a folder that holds it.

    Raises:
        DataError: the given path does not have it.
        DownloadError: it is not in the cache and cannot be fetched.
    """
    if (given := files.get(name)) is not None:
        return _given(asset, name, given)
    cached = cache_dir() / "evals" / name / asset.name
    if not asset.url and not cached.exists():
        raise DownloadError(f"{name}: {asset.name} is not served as one file; give a local copy: --files {name}=PATH.")
    try:
        if asset.url:
            download(asset.url, cached, asset.sha256)
    except DownloadError as error:
        raise DownloadError(f"{error} Or give a local copy: --files {name}=PATH.") from None
    return cached


def _given(asset: Asset, name: str, given: Path) -> Path:
    if given.is_file():
        return given
    for candidate in (asset.name, *asset.other_names):
        if (given / candidate).is_file():
            return given / candidate
    expected = " or ".join((asset.name, *asset.other_names))
    raise DataError(f"{name}: there is no file {given}, nor {expected} in it; give the file: --files {name}=PATH.")
