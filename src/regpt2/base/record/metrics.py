"""The record of a run: `metrics.jsonl`, one event a line. In: events; out: a file that only grows.

Every event has `event` and `step` (updates made so far). The kinds:
  run         a start or a resume: config, versions, device, data, the step from which it starts; peak_flops (FLOP/s of
              one rank, what mfu is a share of) and peak_source (DATA_SHEET or TIMED)
  train       loss, grad_norm, lr, step_ms, tokens_per_s, mfu, tokens (seen so far), skipped, data (a digest of the
              tokens of this update in their order: the same for any number of ranks)
  eval        eval (its name) and its figures, seen_tokens (trained on so far)
  best        loss: the validation loss of this step is the lowest so far; kept (is its model saved?)
  verdict     a validation loss compared with a reference curve: state, difference, band, checks, text, ...
  sample      prompt, texts
  note        text: what a reader of the record should know (a skipped step, a failed evaluation, a fallback)
  end         reason, elapsed_s, peak_bytes, best_step, best_loss (of the lowest validation loss)
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from regpt2.base.console import safe_json, warn
from regpt2.base.errors import DataError
from regpt2.base.files import SMALL_BYTES, describe_os_error, write_atomic
from regpt2.base.record.trackers import Sink
from regpt2.base.screen import lost_streams

DATA_SHEET, TIMED = "data sheet", "timed matmuls"
"""What mfu is a share of: a GPU's peak, or on a CPU the rate of matmuls that the run timed when it started."""


class MetricsLog:
    """Appends events to a file, and passes them to `sinks`. Only rank 0 has a path; without one it does nothing."""

    def __init__(self, path: Path | None, sinks: Iterable[Sink] = ()) -> None:
        self.path = path
        self._sinks = list(sinks)
        self._warned = False
        self._lost: set[str] = set()  # standard streams whose failure is recorded

    def cut_back(self, step: int) -> int:
        """Remove the events after `step`, from which the run resumes. Returns the number of updates removed.

        At step 0 the run starts from zero, maybe with another seed or other data: then all events are removed. A line
        that a kill cut in half is removed too. Notes stay: they are the run's history.
        """
        if self.path is None or not self.path.exists():
            return 0
        damaged: list[str] = []
        kept, n_forgotten = [], 0
        for event in read_events(self.path, damaged):
            if event["event"] == "note" or (step > 0 and event["step"] <= step):
                kept.append(event)
            else:
                n_forgotten += event["event"] == "train"
        if damaged:
            aside = self.path.with_name(f"{self.path.name}.bad")
            write_atomic(aside, self.path.read_bytes())
            warn(f"{len(damaged)} damaged lines of the record are left out; {aside} is the unchanged copy.")
        write_atomic(self.path, "".join(_line(event) for event in kept))
        return n_forgotten

    def observed(self, step: int) -> list[str]:
        """What is recorded of this step: the names of evaluations, and "sample"."""
        if self.path is None or not self.path.exists():
            return []
        kinds = ("eval", "sample")
        return [e.get("eval", "sample") for e in read_events(self.path) if e["step"] == step and e["event"] in kinds]

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append one event. A log that cannot be written never stops training: one warning reports it."""
        if self.path is None:
            return
        for reason in lost_streams() if event != "run" else ():
            if (stream := str(reason.filename)) not in self._lost:
                self._lost.add(stream)
                self.log("note", step, text=f"{stream} cannot be written ({reason.strerror}); the run continues")
        whole = {"event": event, "step": step, **values}
        self._append(self.path, _line(whole).encode())
        for sink in list(self._sinks):
            self._hand(sink, whole)

    def _append(self, path: Path, line: bytes) -> None:
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) != len(line):  # on a full disk a part was written
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError as error:
            if not self._warned:
                warn(f"the record is not being written: {describe_os_error(error)} Training continues.")
            self._warned = True

    def _hand(self, sink: Sink, event: dict[str, Any]) -> None:
        """Pass an event to a sink; `end` closes it. A sink that fails is reported once and dropped."""
        try:
            sink.write(event)
            if event["event"] == "end":
                sink.close()
                self._sinks.remove(sink)
        except Exception as error:  # a tracker may raise anything: a network, a service, a full disk
            self._sinks.remove(sink)
            warn(f"{type(sink).__name__} no longer receives the record ({type(error).__name__}: {error}).")


def read_events(path: Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The events of a record, in order. A last line that is cut in half, as by a kill, is left out.

    Raises:
        DataError: another line is not an event, and there is no list `damaged` to collect it.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line == "\n":
            continue
        try:
            event = event_of(line)
        except ValueError as error:
            if not line.endswith("\n"):
                return
            if damaged is not None:
                damaged.append(line)
                continue
            raise DataError(
                f"{path}:{number} is not an event ({error}); cut the file back to the line before."
            ) from None
        yield event


def event_of(line: str) -> dict[str, Any]:
    """One line of a record.

    Raises:
        ValueError: it is not an event.
    """
    try:
        event: dict[str, Any] = json.loads(line)
        kinds = (type(event["event"]), type(event["step"]))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if kinds != (str, int):
        raise ValueError(f"its event and step are of types {kinds[0].__name__} and {kinds[1].__name__}")
    return event


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing, or not a plain file.")
    with open(path, encoding="utf-8", errors="replace") as file:
        while line := file.readline(SMALL_BYTES):
            if len(line) == SMALL_BYTES:
                raise DataError(f"{path} has a line of more than {SMALL_BYTES:,} characters: it is not a run's record.")
            yield line


def _line(event: dict[str, Any]) -> str:
    return safe_json(json.dumps(_plain(event), allow_nan=False, ensure_ascii=False, separators=(",", ":"))) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
