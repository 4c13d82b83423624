"""A data set on the Hugging Face hub. In: its id and a revision, configuration and split; out: the files to fetch.

What the hub says is not trusted: names, sizes and digests are checked. The listing of a commit never changes, so it is
kept in the cache: a preparation that is resumed does not ask for it again.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from regpt2.base.console import safe_text
from regpt2.base.errors import DownloadError, UsageError
from regpt2.base.files import cache_dir, read_small, write_atomic
from regpt2.base.net.http_client import NotThere, get_json
from regpt2.base.net.hub_settings import hub_endpoint
from regpt2.data.sources.plan import InputFile

MOST_FILES, MOST_LIST_BYTES = 1_000_000, 256 << 20
MOST_CHARACTERS = 1000  # of a path
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="?next"?')


def resolve(repo: str, revision: str) -> str:
    """The commit that a branch, a tag or a commit is.

    Raises:
        UsageError: no such form of an id or a revision.
        DownloadError: the hub cannot be reached, or does not have it.
    """
    _check_names(repo, revision)
    if _COMMIT.fullmatch(revision):
        return revision
    answer = _ask(f"{_api(repo)}/revision/{quote(revision, safe='')}")[0]
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise DownloadError(f"{hub_endpoint()} does not say which commit {repo} has at {revision}; is it a hub?")
    return commit


def list_files(repo: str, commit: str, folder: str = "") -> list[InputFile]:
    """The files of a commit, or those below one of its folders (none if it has no such folder), by name.

    A digest is the SHA-256 of a large file, git's blob SHA-1 of a small one.

    Raises:
        DownloadError: the hub cannot be reached, does not have it, or lists what cannot be.
    """
    _check_names(repo, commit)
    kept = _kept(repo, commit) / f"files-{quote(folder, safe='')}.json"
    try:
        entries = json.loads(read_small(kept, most_bytes=MOST_LIST_BYTES))
        return _checked(repo, commit, [(entry["path"], entry["n_bytes"], entry["digest"]) for entry in entries])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not there yet, or damaged
        pass
    try:
        tree = f"{_api(repo)}/tree/{commit}/{quote(folder)}".rstrip("/")
        files = _checked(repo, commit, _listed(f"{tree}?recursive=true"))
    except NotThere:
        if not folder:
            raise
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise DownloadError(f"{hub_endpoint()} lists impossible files of {repo} at {commit} ({error!r}).") from None
    entries = [{"path": file.name, "n_bytes": file.n_bytes, "digest": file.digest} for file in files]
    write_atomic(kept, json.dumps(entries, indent=0))
    return files


def card_configs(repo: str, commit: str) -> Any:
    """What the data set's card says of its configurations, unchecked; None if nothing.

    Raises:
        DownloadError: the hub cannot be reached, or does not have it.
    """
    _check_names(repo, commit)
    kept = _kept(repo, commit) / "configs.json"
    try:
        return json.loads(read_small(kept, most_bytes=MOST_LIST_BYTES))
    except (OSError, ValueError, RecursionError):
        pass
    answer = _ask(f"{_api(repo)}/revision/{commit}")[0]
    card = answer.get("cardData") if isinstance(answer, dict) else None
    configs = card.get("configs") if isinstance(card, dict) else None
    write_atomic(kept, json.dumps(configs))
    return configs


def url_of(repo: str, commit: str, path: str) -> str:
    return f"{hub_endpoint()}/datasets/{repo}/resolve/{commit}/{quote(path)}"


def _listed(url: str) -> Iterable[tuple[str, int, str]]:
    """Path, size and digest of each file, page after page."""
    seen: set[str] = set()
    while url and url not in seen:
        seen.add(url)
        entries, headers = _ask(url)
        for entry in entries:
            if entry["type"] == "file":
                large = entry.get("lfs") or {"oid": entry["oid"], "size": entry["size"]}
                yield entry["path"], large["size"], large["oid"]
        following = _NEXT.search(headers.get("Link", ""))
        url = urljoin(url, following[1]) if following else ""
        if url and not url.startswith(f"{hub_endpoint()}/"):
            raise ValueError(f"the next page is on another host: {url}")


def _checked(repo: str, commit: str, entries: Iterable[tuple[str, int, str]]) -> list[InputFile]:
    """The files by name; workers fetch them.

    Raises:
        ValueError: an impossible name, size or digest.
    """
    files: dict[str, InputFile] = {}
    for path, n_bytes, digest in entries:
        if not isinstance(path, str) or not _is_safe(path):
            raise ValueError(f"a file by the name of {path!r:.200}")
        if type(n_bytes) is not int or not 0 <= n_bytes < 1 << 50:
            raise ValueError(f"{path} with {n_bytes!r:.200} bytes")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"{path} with digest {digest!r:.200}")
        files[path] = InputFile("", path, n_bytes, 0, url=url_of(repo, commit, path), digest=digest)
        if len(files) > MOST_FILES:
            raise ValueError(f"more than {MOST_FILES:,} files")
    return [files[path] for path in sorted(files)]


def _is_safe(path: str) -> bool:
    """Whether it is a relative path without `..`, of characters that can be shown."""
    parts = path.split("/")
    odd = any(character in path for character in "\\\n\t") or safe_text(path) != path
    return len(path) <= MOST_CHARACTERS and not odd and not {"", ".", ".."} & set(parts)


def _check_names(repo: str, revision: str) -> None:
    if not _REPO.fullmatch(repo):
        raise UsageError(f"--repo {repo!r}: expected OWNER/NAME, as in HuggingFaceFW/fineweb-edu.")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"--revision {revision!r}: expected a branch, a tag or a commit.")


def _api(repo: str) -> str:
    return f"{hub_endpoint()}/api/datasets/{repo}"


def _ask(url: str) -> tuple[Any, Any]:
    try:
        return get_json(url)
    except NotThere:
        raise
    except DownloadError as error:
        raise DownloadError(
            f"{error} Without the hub: name a mirror in HF_ENDPOINT, or give a local copy: --input FOLDER."
        ) from None


def _kept(repo: str, commit: str) -> Path:
    return cache_dir() / "hub" / repo / commit
