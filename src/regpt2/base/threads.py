"""How idle threads wait. In: the environment; out: a shorter spin of OpenMP, set before torch loads it."""

import os

SPIN_COUNT = "5000"  # by benchmarks/busy.py: as fast on an idle machine, half the time or less on a busy one
_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Let idle threads sleep soon, here and in child processes, unless the user has chosen a setting.

    OpenMP's threads (GNU's, in torch for Linux) spin 300,000 times by default while they wait for work. When other
    processes use the cores too, that spinning takes the core from the thread that they wait for.
    """
    if not any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
