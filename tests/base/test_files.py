"""Files are whole or not there; a folder has one owner."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import (
    atomic_file,
    cache_dir,
    describe_os_error,
    folder_lock,
    require_free_space,
    sha256_file,
    write_atomic,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "first\n")

    def break_off() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_bytes() == b"first\n"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"


def test_sha256_is_that_of_hashlib_and_progress_adds_up(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    assert sha256_file(tmp_path / "f", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)


HOLDER = """
import sys, time
from pathlib import Path
from regpt2.base.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_owner_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    with (
        pytest.raises(UsageError, match=rf"is in use by process {holder.pid} on host \S+ since \d{{4}}-"),
        folder_lock(tmp_path),
    ):
        pass
    assert (tmp_path / ".lock").read_bytes().startswith(b" process"), "the owner would not be readable on Windows"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with folder_lock(tmp_path):
        pass


STARTER = """
import sys
from pathlib import Path
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with folder_lock(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.readline()
except UsageError:
    print("refused", flush=True)
"""


def test_of_twenty_starts_at_once_exactly_one_wins_and_a_killed_winner_leaves_no_lock(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    starts = [subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path / "run")], **pipes) for _ in range(20)]
    try:
        assert [start.stdout.readline() for start in starts] == ["ready\n"] * 20
        for start in starts:
            start.stdin.write("go\n")
        said = [start.stdout.readline().strip() for start in starts]
        assert sorted(said) == ["refused"] * 19 + ["won"]
        winner = starts[said.index("won")]
        winner.kill()
        winner.wait()
        with folder_lock(tmp_path / "run"):
            pass
    finally:
        for start in starts:
            start.kill()
            start.communicate()


def test_too_little_space_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"the corpus needs 1,000,000,000,000.0 MB and .* MB are free"):
        require_free_space(tmp_path / "not" / "yet", 10**18, "the corpus")
    require_free_space(tmp_path, 1, "nothing")


def test_os_errors_are_told_with_their_mend() -> None:
    assert describe_os_error(OSError(28, "No space left on device", "/x")) == (
        "/x: No space left on device; free some space or choose a folder on another disk."
    )
    assert "permissions" in describe_os_error(PermissionError(13, "Permission denied", "/x"))


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("REGPT2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/regpt2")
