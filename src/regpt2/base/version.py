"""Which code this is. In: nothing; out: the commit of the source tree, and a digest of the package's own files."""

import hashlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def commit() -> str | None:
    """The commit of the source tree; None if it is not a git checkout."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def digest(*rooms: str) -> str:
    """A digest of every module in these rooms of the package: it also tells uncommitted changes apart."""
    files = sorted(path for room in rooms for path in (PACKAGE / room).rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]
