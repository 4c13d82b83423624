"""Errors shown to the user: each has one message (what, got, expected, remedy) and an exit code."""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 4000  # of a message: quoted content of a file must not flood a terminal


class Problem(Exception):
    """A failure that a user, a file or the machine caused. Shown as its message alone, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """The message; of one that is too long only the beginning, and the end with the remedy."""
        text, half = super().__str__(), MOST_CHARACTERS // 2
        return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


class UsageError(Problem):
    """The command line or a setting is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or option holds an unknown key, a wrong type or an impossible value."""


class DataError(Problem):
    """A data folder, shard or input file is missing, damaged or of the wrong kind."""


class CheckpointError(Problem):
    """A checkpoint or model folder is missing, damaged or of the wrong shape."""


class FailedElsewhere(Problem):
    """Another rank failed, and reports it itself: this one exits silently with the same code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DownloadError(Problem):
    """A download failed, or its content is not the expected one."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` with the nearest known name, else a full stop."""
    nearest = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
