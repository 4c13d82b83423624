"""Trackers that also get the record. In: the events of a run; out: TensorBoard files, a Weights & Biases run.

Both are extras: `pip install 'regpt2[tensorboard]'`, `pip install 'regpt2[wandb]'`. A resumed run continues in the same
place. A failure here never stops the run: `MetricsLog` reports it once and drops the tracker.
"""

import importlib.util
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from regpt2.base.console import safe_text
from regpt2.base.errors import ConfigError, did_you_mean
from regpt2.base.files import write_atomic

Event = dict[str, Any]
INIT_TIMEOUT_S = 60  # a network without an answer must not delay a run longer


class Sink(Protocol):
    """Gets each event as it is recorded. The first is a `run` event, with the step from which the run starts."""

    def write(self, event: Event) -> None:
        """Record one event. May raise anything."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `run/tensorboard`. Later steps of an earlier start are hidden."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self._writer: Any = None

    def write(self, event: Event) -> None:
        step = event["step"]
        if event["event"] == "run":
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an extra)

            self.close()
            purge_step = step + 1 if step else 0  # a run that starts from zero hides all before it
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=30)
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts(event).items():
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """A run of Weights & Biases, found again by the id in `run/wandb.id`. WANDB_MODE=offline needs no network."""

    def __init__(self, run: Path) -> None:
        self.folder = run
        self._run: Any = None

    def write(self, event: Event) -> None:
        """Log over our own step: W&B's never goes back, but a resumed run does."""
        if event["event"] == "run":
            self._begin(event)
        row = scalars(event) | texts(event)
        if row:
            self._run.log({"step": event["step"], **row})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self, event: Event) -> None:
        import wandb  # noqa: PLC0415  (an extra)

        self.close()
        self._run = wandb.init(
            project="regpt2",
            id=self._id(afresh=event["step"] == 0),
            name=str(event.get("recipe") or self.folder.name),
            dir=self.folder,
            config={key: value for key, value in event.items() if key not in ("event", "step")},
            resume="allow",
            settings=wandb.Settings(console="off", disable_git=True, init_timeout=INIT_TIMEOUT_S, quiet=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _id(self, *, afresh: bool) -> str:
        path = self.folder / "wandb.id"
        if afresh or not path.is_file():
            write_atomic(path, secrets.token_hex(4) + "\n")
        return path.read_text(encoding="utf-8").strip()


SINKS: dict[str, Callable[[Path], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}


def open_sinks(names: Sequence[str], run: Path) -> list[Sink]:
    """The trackers of these names, for the run in this folder; nothing is written before the first event.

    Raises:
        ConfigError: an unknown tracker, or its package is not installed.
    """
    for name in names:
        if name not in SINKS:
            known = ", ".join(SINKS)
            raise ConfigError(f"track: there is no tracker {name!r}{did_you_mean(name, SINKS)} Available: {known}.")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track: {name} is not installed; pip install 'regpt2[{name}]'.")
    return [SINKS[name](run) for name in names]


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event, by a name that groups them: train/loss, val_loss/perplexity, verdict/difference."""
    if event["event"] not in ("train", "eval", "verdict"):
        return {}
    group = str(event.get("eval") or event["event"])
    numbers = {key: value for key, value in event.items() if key != "step" and isinstance(value, int | float)}
    return {f"{group}/{key}": float(value) for key, value in numbers.items()}


def texts(event: Event) -> dict[str, str]:
    """The texts of an event: samples, a note, the verdict's sentence."""
    if event["event"] == "sample":
        return {f"sample/{place}": safe_text(str(text)) for place, text in enumerate(event.get("texts") or ())}
    words = event.get("text") if event["event"] in ("note", "verdict") else None
    return {event["event"]: safe_text(str(words))} if words else {}
