"""How idle threads wait. In: the environment; out: OpenMP's spinning cut short, before torch loads OpenMP."""

import os

SPIN_COUNT = "5000"  # by benchmarks/busy.py: nothing lost on a quiet machine, half the time or less on a busy one
_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Let threads without work sleep soon, here and in the processes started from here; the user's own setting stays.

    OpenMP's threads (GNU's, in torch for Linux) wait for work by spinning 300,000 times by default. Where other
    processes want the cores too, they spin in the place of the thread that they wait for.
    """
    if not any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
