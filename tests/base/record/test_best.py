"""The best validation: the lowest loss, and how long ago it was."""

import math

import pytest

from regpt2.base.record.best import BestSoFar, best_of


def events(*losses: object, every: int = 10) -> list[dict[str, object]]:
    return [{"event": "eval", "eval": "val_loss", "step": every * i, "loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "step", "loss", "n_worse"),
    [
        ([], None, math.inf, 0),
        ([3.0], 0, 3.0, 0),
        ([3.0, 2.0, 2.5, 2.4], 10, 2.0, 2),
        ([3.0, 2.0, 2.5, 1.9], 30, 1.9, 0),
        ([2.0, 2.0, 2.0], 0, 2.0, 2),  # equal is not below
        (["nan", "inf"], None, math.inf, 0),
        ([3.0, "nan", None, math.nan], 0, 3.0, 3),
        ([3.0, 10**400], 0, 3.0, 1),
    ],
)
def test_the_best_is_the_lowest_and_the_worse_ones_since_are_counted(
    losses: list[object], step: int | None, loss: float, n_worse: int
) -> None:
    found = best_of(events(*losses))
    assert (found.step, found.loss, found.n_worse) == (step, loss, n_worse)


def test_a_step_counts_once_and_other_events_do_not() -> None:
    best = BestSoFar().after(10, 2.0).after(10, 1.0).after(5, 1.0).after(20, 2.5).after(20, 2.5)
    assert (best.step, best.loss, best.n_worse) == (10, 2.0, 1)
    other = [
        {"event": "eval", "eval": "hellaswag", "step": 40, "loss": 0.1},
        {"event": "train", "step": 41, "loss": 0.1},
    ]
    assert best_of([*events(3.0, 2.0), *other]) == BestSoFar(10, 2.0, 0, 10)
