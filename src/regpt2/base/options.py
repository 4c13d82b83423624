"""Options on the command line. In: a dataclass and arguments; out: an instance of it, or help as wide as the terminal.

Each field's docstring is the help of its option. It must be one line: tyro keeps the line breaks of a longer one.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import tyro

from regpt2.base.console import wrapped

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], prog: str, *, about: str = "", default: T | None = None) -> T:
    """Parse the options of a command; `about` is shown above them in its help, by default the class's docstring.

    Raises:
        SystemExit: 0 after --help, 2 after a usage error; the text is printed.
    """
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    # Indented, because tyro joins other lines and doubles blank ones.
    lines = [f"  {line}" for line in (about or kind.__doc__ or "").splitlines() if line.strip()]
    # DisallowNone: an option without a value is left out, not spelled None.
    return tyro.cli(
        kind,
        prog=prog,
        description=wrapped(lines),
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.DisallowNone,),
    )
