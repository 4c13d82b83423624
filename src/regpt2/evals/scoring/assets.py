"""The data of an evaluation. In: its description and optionally a local path; out: a file, checked by SHA-256."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt2.base import shelves
from regpt2.base.errors import DataError, DownloadError, Problem, UsageError, did_you_mean
from regpt2.base.files import cache_dir
from regpt2.base.net.download import download
from regpt2.base.net.http_client import Unreachable


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
    git_sha1: str = ""
    """Git's name for the content (its blob): instead of `sha256` where only this is known, or of an equal copy."""
    part: str = ""
    """The part of the evaluation that needs it; empty = all of it."""
    of: str = ""
    """Another evaluation that has the same file: its place in the cache, and its local file, serve here too."""

    @property
    def digest(self) -> str:
        """What the content is pinned by; empty if by nothing."""
        return self.sha256 or self.git_sha1

    def is_pinned(self, content: bytes) -> bool:
        """Is this the pinned content, by either hash?"""
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return self.sha256 == hashlib.sha256(content).hexdigest() or self.git_sha1 == git_sha1.hexdigest()


def files_by_name(items: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """`("hellaswag=a.jsonl", ...)` by name of the evaluation, or part of one; each must be among `names`.

    Raises:
        UsageError: not of that form, no such evaluation, or nothing there.
    """
    files: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--files {item!r}: expected NAME=PATH, as in hellaswag=data/hellaswag_val.jsonl.")
        if name.partition(".")[0] not in names:
            raise UsageError(f"--files {item!r}: there is no evaluation {name!r}{did_you_mean(name, names)}")
        if "." in name:
            shelves.with_part("evals", name)
        if not Path(path).exists():
            raise UsageError(f"--files {item!r}: {path} does not exist.")
        files[name] = Path(path)
    return files


def find(asset: Asset, name: str, files: Mapping[str, Path], *, ask: bool = True) -> Path:
    """The file: the local one if given, else from the cache, downloaded if needed.

    Args:
        name: the evaluation; `files` may have a path for it or its part, of the file or of a folder that holds it.
        ask: download what is not in the cache.

    Raises:
        DataError: the given path does not have it.
        DownloadError: it is not in the cache and cannot be fetched.
    """
    keys = (f"{name}.{asset.part}", name, asset.of)
    if given := [files[key] for key in keys if key in files]:
        return _given(asset, name, given)
    cached = cache_dir() / "evals" / (asset.of or name) / asset.name
    if not asset.url and not cached.exists():
        raise DownloadError(f"{name}: {asset.name} is not served as one file; give a local copy: --files {name}=PATH.")
    try:
        if asset.url and (ask or not cached.exists()):
            if not ask:
                raise DownloadError(f"{cached} is not there.")
            download(asset.url, cached, asset.digest)
    except DownloadError as error:
        raise type(error)(f"{error} Or give a local copy: --files {name}=PATH.") from None
    return cached


def find_parts(
    assets: Sequence[Asset], name: str, files: Mapping[str, Path], *, ask: bool = True
) -> tuple[dict[str, Path], dict[str, Problem]]:
    """By part the files of an evaluation that has parts, and why others are missing.

    Once the network does not answer, the rest is only looked for on this machine.
    """
    paths: dict[str, Path] = {}
    missing: dict[str, Problem] = {}
    for asset in assets:
        try:
            paths[asset.part] = find(asset, name, files, ask=ask)
        except (DataError, DownloadError) as problem:
            missing[asset.part] = problem
            ask = ask and not isinstance(problem, Unreachable)
    return paths, missing


def _given(asset: Asset, name: str, given: Sequence[Path]) -> Path:
    """The file at the first of these paths that has it."""
    for path in given:
        names = () if path.is_file() else (asset.name, *asset.other_names)
        for candidate in (path, *(path / one for one in names)):
            if candidate.is_file():
                return candidate
    expected = " or ".join((asset.name, *asset.other_names))
    raise DataError(f"{name}: there is no file {given[0]}, nor {expected} in it; give the file: --files {name}=PATH.")
