"""The best validation of a run. In: the validation losses of its record, in order; out: the lowest one and its step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BestSoFar:
    """The lowest validation loss of a run, and how many validations since then were not below it."""

    step: int | None = None
    """Updates made at the best validation; None before the first."""
    loss: float = math.inf
    n_worse: int = 0
    """Validations in a row, up to the newest, whose loss is not below the best."""
    newest: int = -1
    """The step of the newest validation."""

    def after(self, step: int, loss: object) -> "BestSoFar":
        """With one more validation. A loss that is no finite number is worse than any; a step counts once."""
        if step <= self.newest:
            return self
        if isinstance(loss, float) and math.isfinite(loss) and loss < self.loss:
            return BestSoFar(step, loss, 0, step)
        return BestSoFar(self.step, self.loss, self.n_worse + (self.step is not None), step)


def best_of(events: Iterable[dict[str, Any]]) -> BestSoFar:
    """The best validation of a record; events of other kinds are passed over."""
    best = BestSoFar()
    for event in events:
        if event.get("event") == "eval" and event.get("eval") == "val_loss":
            best = best.after(event["step"], event.get("loss"))
    return best
