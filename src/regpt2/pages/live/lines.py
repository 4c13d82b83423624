"""A run as lines of a log. In: its record and status, again and again; out: what is new since the last time."""

import math
from collections.abc import Iterator

from regpt2.base.console import count, duration
from regpt2.pages.live.status import RUNNING, Status
from regpt2.pages.live.view import steps_of
from regpt2.pages.record import Event, Record, number
from regpt2.pages.tables import figure

EVERY_S = 10.0
MOST_CHARACTERS = 300


class Lines:
    """Remembers what it gave. The first time it gives the state alone, not the whole history."""

    def __init__(self) -> None:
        self._given: dict[str, int] | None = None
        self._step = -1.0
        self._spoke_at = -math.inf

    def of(self, record: Record, status: Status, now_s: float) -> Iterator[str]:
        """The new lines. An update gets one at most every EVERY_S seconds, any other event its own."""
        events = {"eval": record.evals, "verdict": record.verdicts, "sample": record.samples, "note": record.notes}
        counts = {kind: len(found) for kind, found in events.items()}
        if self._given is None:
            yield from (f"{status.recipe or record.name}: {status.state}", _update(status))
            self._spoke_at, self._step = now_s, status.step
        elif status.step < self._step or any(counts[kind] < given for kind, given in self._given.items()):
            yield f"the record was cut back or begun anew; it is at step {status.step:,.0f}"
            self._step = status.step
        else:
            for kind, found in events.items():
                yield from (_line(kind, event) for event in found[self._given[kind] :])
        self._given = counts
        if status.step > self._step and (now_s - self._spoke_at >= EVERY_S or status.has_ended):
            yield _update(status)
            self._spoke_at, self._step = now_s, status.step


def last_line(status: Status) -> str:
    """How the run ended."""
    reason = _one_line(status.reason)
    lead = reason if reason.startswith(status.state) else f"{status.state}{reason and ': '}{reason}"
    took = f" after {duration(status.elapsed_s)}" if math.isfinite(status.elapsed_s) else ""
    best = ""
    if math.isfinite(status.best_loss):
        best = f"; best validation loss {status.best_loss:.4f} at step {status.best_step:,.0f}"
    return f"{lead} at step {steps_of(status)}{took}{best}"


def _update(status: Status) -> str:
    parts = [f"step {steps_of(status)}"]
    parts += [f"loss {status.loss:.4f}"] if math.isfinite(status.loss) else []
    parts += [f"norm {status.grad_norm:.3f}"] if math.isfinite(status.grad_norm) else []
    parts += [f"lr {status.lr:.2e}"] if math.isfinite(status.lr) else []
    parts += [f"{count(status.tokens_per_s)} tok/s"] if math.isfinite(status.tokens_per_s) else []
    parts += [f"{status.mfu_name} {status.mfu:.1%}"] if math.isfinite(status.mfu) else []
    left = status.state == RUNNING and math.isfinite(status.left_s)
    return " | ".join([*parts, f"{duration(status.left_s)} left"] if left else parts)


def _line(kind: str, event: Event) -> str:
    at = f"step {number(event.get('step')):,.0f}"
    if kind == "eval":
        figures = [
            f"{key} {figure(key, event[key])}"
            for key in ("loss", "loss_1024", "perplexity", "bits_per_byte", "acc_norm")
            if event.get(key) is not None
        ]
        return f"{at} | {str(event.get('eval'))[:40]}: {', '.join(figures)}"
    if kind == "sample":
        texts = event.get("texts")
        first = texts[0] if isinstance(texts, list) and texts else texts
        return f"{at} | sample: {_one_line(str(first))}"
    return f"{at} | {kind}: {_one_line(str(event.get('text') or event.get('state')))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MOST_CHARACTERS]
