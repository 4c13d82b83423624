"""Files that are complete or absent: atomic writes, SHA-256, locks, free space."""

import errno
import hashlib
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from regpt2.base.errors import Problem, UsageError

CHUNK_BYTES = 1 << 20
_BUILTIN = Path(__file__).parents[1] / "builtin"
LOCK = ".lock"
LOOKS, LOOK_S = 5, 0.02  # `is_locked` holds a lock that it finds free, but far shorter
SMALL_BYTES = 16 << 20  # JSON can take thirty times its size in memory


def cache_dir() -> Path:
    """Where downloads are kept: $REGPT2_CACHE, else regpt2 below the user's cache folder. Not created here."""
    if own := os.environ.get("REGPT2_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regpt2"


def builtin_folder(spec: str) -> Path | None:
    """Where a model that comes with the package is, with its tokenizer; None if `spec` is not "builtin:NAME".

    Raises:
        UsageError: none has this name.
    """
    if not spec.startswith("builtin:"):
        return None
    folders = {f"builtin:{folder.name}": folder for folder in _BUILTIN.iterdir() if folder.is_dir()}
    if spec not in folders:
        raise UsageError(f"{spec!r:.200} does not come with regpt2; give {', '.join(sorted(folders))}.")
    return folders[spec]


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a file, read in pieces; `on_bytes` gets the size of each piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def read_small(path: Path, kind: type[Problem] = Problem, most_bytes: int = SMALL_BYTES) -> str:
    """The text of a small file: a configuration, a manifest, a vocabulary.

    Raises:
        kind: it is not a plain file (reading a pipe could wait forever), or is too large for its kind.
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise kind(f"{path} is not a plain file.")
    if status.st_size > most_bytes:
        raise kind(f"{path} has {status.st_size:,} bytes, expected at most {most_bytes:,} for a file of its kind.")
    return path.read_text(encoding="utf-8")


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable. Does nothing on Windows, which has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_dir(folder: Path) -> None:
    """Make `folder` and its missing parents, durable against a loss of power."""
    if folder.is_dir():
        return
    make_dir(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def forget_cached(file: IO[bytes]) -> None:
    """Drop `file` from the system's cache, where that is possible, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under `path` only when it is complete and on disk.

    It is written under another name, fsynced, renamed, and the folder fsynced. After an exception nothing is left.
    """
    make_dir(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        fsync_dir(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file at once, atomically (see `atomic_file`). Text is UTF-8 with `\\n` line ends."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; the system frees the lock when the process ends.

    Raises:
        UsageError: another process has locked it.
    """
    make_dir(folder)
    with open(folder / LOCK, "a+b") as file:
        if not _lock_soon(file):
            file.seek(1)
            owner = file.read(400).decode(errors="replace").strip() or "another process"
            raise UsageError(f"{folder} is in use by {owner}; wait for it to end, or use another folder.")
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        # The space: on Windows the first byte is the locked one, which no other process can read.
        file.write(f" process {os.getpid()} on host {socket.gethostname()} since {since}".encode())
        file.flush()
        yield


def _lock_soon(file: IO[bytes]) -> bool:
    """Lock `file`, though somebody may look at its lock right now."""
    for _ in range(LOOKS):
        if try_lock(file):
            return True
        time.sleep(LOOK_S)
    return False


def is_locked(folder: Path) -> bool:
    """Does a process hold the lock of `folder`? Where that cannot be learned, no."""
    try:
        with open(folder / LOCK, "rb") as file:
            return not try_lock(file)
    except (OSError, UsageError):
        return False


def try_lock(file: IO[bytes]) -> bool:
    """Try to lock `file` without waiting; the system frees the lock when the file is closed.

    Raises:
        UsageError: its file system has no locks.
    """
    import filelock  # noqa: PLC0415  (needed only for locks)

    try:
        return filelock.lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        raise UsageError(
            f"{file.name} cannot be locked ({error.strerror}); choose a folder on a file system that has locks "
            "(Lustre: mounted with -o flock), or two runs could write into one folder."
        ) from None


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(one for one in (path, *path.parents) if one.exists())


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(nearest_folder(folder)).free


def require_free_space(folder: Path, need_bytes: int, what: str) -> None:
    """Refuse to start work that the disk has no room for.

    Raises:
        Problem: fewer than `need_bytes` are free on the disk of `folder`.
    """
    have_bytes = free_bytes(folder)
    if have_bytes < need_bytes:
        raise Problem(
            f"{folder}: {what} needs {need_bytes / 1e6:,.1f} MB and {have_bytes / 1e6:,.1f} MB are free; "
            "free some space or choose a folder on another disk."
        )


def describe_os_error(error: OSError) -> str:
    """One line for a failed file operation: where, what, and the usual remedy if there is one."""
    place = f"{error.filename}: " if error.filename else ""
    mends = {
        "ENOSPC": "free some space or choose a folder on another disk",
        "EROFS": "the file system is read-only: choose another folder",
        "EACCES": "check the permissions, or choose another folder",
        "EPERM": "check the permissions, or choose another folder",
        "EDQUOT": "your quota is used up: free some space",
        "EMFILE": "too many open files: raise the limit (ulimit -n)",
    }
    mend = next((text for name, text in mends.items() if error.errno == getattr(errno, name, None)), "")
    return f"{place}{error.strerror or error}{'; ' + mend if mend else ''}."
