"""The key that clients of a server must send. In: a file, or REGPT2_API_KEY; out: the key, or None.

Never an option: every user of a machine can list the command lines of its processes.
"""

import os
import re
from pathlib import Path

from regpt2.base.errors import UsageError
from regpt2.base.files import describe_os_error

VARIABLE = "REGPT2_API_KEY"
FEWEST_CHARACTERS, MOST_CHARACTERS = 16, 512
_MAKE_ONE = 'python -c "import secrets; print(secrets.token_urlsafe())" > FILE makes one.'


def read_api_key(file: Path | None) -> str | None:
    """The key in this file, else in the environment; None if there is neither.

    Raises:
        UsageError: the file cannot be read, or what it holds is no key.
    """
    if file is None:
        key = os.environ.get(VARIABLE, "")
        return _checked(key, VARIABLE) if key else None
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            key = stream.read(MOST_CHARACTERS + 2).strip()
    except OSError as error:
        raise UsageError(f"--api-key-file: {describe_os_error(error)} {_MAKE_ONE}") from None
    return _checked(key, str(file))


def _checked(key: str, where: str) -> str:
    """The key, if a client can send it. The message does not quote it."""
    if not re.fullmatch(f"[!-~]{{{FEWEST_CHARACTERS},{MOST_CHARACTERS}}}", key):
        raise UsageError(
            f"{where} must hold one API key of {FEWEST_CHARACTERS} to {MOST_CHARACTERS} ASCII characters without "
            f"spaces; it has {len(key)}. {_MAKE_ONE}"
        )
    return key
