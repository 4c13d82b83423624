"""Runs while they train, in the terminal. In: a run folder, or a folder of runs; out: charts and figures that follow.

regpt2 watch runs/demo            until the run has ended, or Ctrl-C
regpt2 watch runs                 a table of all
regpt2 watch runs/demo --once     one view
regpt2 watch runs/demo | tee log  plain lines as they come
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.options import parse
from regpt2.pages.live.watching import watch


@dataclass(frozen=True)
class WatchOptions:
    """Watch a run while it trains: charts, speed, time left, verdict, newest sample; or a table of all runs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Path("runs")
    """A run's folder, or a folder of runs."""
    once: bool = False
    """Show it once and exit. Default: follow it; where the output is no terminal, by plain lines."""


def main(argv: Sequence[str]) -> int:
    """`regpt2 watch RUN`."""
    options = parse(WatchOptions, argv, "regpt2 watch")
    watch(options.run, once=options.once)
    return 0
