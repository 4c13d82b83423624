"""What can go wrong for a user: each problem carries one message (what, got, expected, mend) and an exit code."""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 4000  # of a message: what a file holds must not flood a terminal


class Problem(Exception):
    """A failure that a user, a file or the machine caused. Shown as its message alone, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """The message; of one that quotes too much, its beginning and its end, where the mend stands."""
        text, half = super().__str__(), MOST_CHARACTERS // 2
        return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


class UsageError(Problem):
    """The command line or a setting is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or option holds an unknown key, a wrong type or an impossible value."""


class DataError(Problem):
    """A data folder, shard or input file is missing, damaged or of another kind than expected."""


class CheckpointError(Problem):
    """A checkpoint or model folder is missing, damaged or of another shape than expected."""


class FailedElsewhere(Problem):
    """Another rank failed, and says so itself: this one leaves in silence, with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DownloadError(Problem):
    """Something could not be fetched, or what came is not what was asked for."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` with the nearest known name, else a full stop."""
    nearest = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
