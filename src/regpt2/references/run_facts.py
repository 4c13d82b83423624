"""What a run recorded. In: the events of its record, of any version; out: `Facts`, each of which may be unknown."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Event = dict[str, Any]
Column = NDArray[np.float64]

# Longest first: "fineweb" is a part of the other's names ("edu_fineweb10B", "finewebedu", "fineweb-edu").
_DATASETS = {"fineweb_edu": r"fineweb.?edu|edu.?fineweb", "fineweb": "fineweb", "openwebtext": r"openwebtext|\bowt"}


def _nothing() -> Column:
    return np.empty(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What a record says; None, or an empty column, is unknown."""

    init: str | None = None
    """The model that it began from."""
    dataset: str | None = None
    """As scores.toml and the curves call it."""
    n_params: float | None = None
    vocab_size: float | None = None
    tokenizer: str | None = None
    batch_tokens: float | None = None
    """Of an update, at its largest."""
    ramp_from: float | None = None
    """Of the first update, where batches grow; 0: they do not."""
    max_steps: float | None = None
    total_tokens: float | None = None
    """Of the whole run."""
    lr: float | None = None
    warmup_steps: float | None = None
    final_lr_fraction: float | None = None
    schedule: str | None = None
    weight_decay: float | None = None
    seq_len: float | None = None
    """Tokens of a training sequence."""
    window_from: float | None = None
    """Tokens that attention reaches back in the first update, where that grows; 0: it does not."""
    optimizer: str | None = None
    model: Event = field(default_factory=dict)
    """The model's configuration."""
    order: str | None = None
    precision: str | None = None
    gzip_bits: float | None = None
    """Bits per byte of gzip on the validation split."""
    skipped: int = 0
    """Updates that were skipped."""
    train_steps: Column = field(default_factory=_nothing)
    train_losses: Column = field(default_factory=_nothing)
    eval_steps: Column = field(default_factory=_nothing)
    eval_tokens: Column = field(default_factory=_nothing)
    """Trained on before each."""
    eval_losses: Column = field(default_factory=_nothing)
    eval_bits: Column = field(default_factory=_nothing)


def facts_of(events: Iterable[Event]) -> Facts:
    """Everything that a verdict depends on. A record is not trusted: what is no finite number counts as unknown."""
    start: Event = {}
    train: dict[float, tuple[float, ...]] = {}
    evals: dict[float, tuple[float, ...]] = {}
    skipped = 0
    for event in events:
        kind, step, loss = event.get("event"), number(event.get("step")), number(event.get("loss"))
        if kind == "run":
            start = {**start, **event}
        elif kind == "train" and step >= 0:
            skipped += event.get("skipped") is True
            train[step] = (step, loss)
        elif kind == "eval" and event.get("eval") == "val_loss" and step >= 0 and math.isfinite(loss):
            evals[step] = (step, loss, number(event.get("bits_per_byte")), number(event.get("seen_tokens")))
    trained = np.array([train[step] for step in sorted(train)]).reshape(-1, 2).T
    evaluated = np.array([evals[step] for step in sorted(evals)]).reshape(-1, 4).T
    of_the_start = _of_the_start(start)
    # Older records have no tokens beside an evaluation; in them all updates were of equal size.
    of_equal_updates = evaluated[0] * number(of_the_start["batch_tokens"])
    return Facts(
        **of_the_start,
        skipped=skipped,
        train_steps=trained[0],
        train_losses=trained[1],
        eval_steps=evaluated[0],
        eval_losses=evaluated[1],
        eval_bits=evaluated[2],
        eval_tokens=np.where(np.isnan(evaluated[3]), of_equal_updates, evaluated[3]),
    )


def _of_the_start(start: Event) -> dict[str, Any]:
    config = _table(start, "config")
    model, batch, optim, schedule = (_table(config, name) for name in ("model", "batch", "optim", "schedule"))
    return {
        "init": _text(config.get("init")),
        "dataset": dataset_of(f"{start.get('dataset')} {config.get('data')}"),
        "n_params": known(start.get("n_params")),
        "vocab_size": known(model.get("vocab_size")),
        "tokenizer": _text(start.get("tokenizer")),
        "batch_tokens": known(start.get("batch_tokens")),
        "ramp_from": known(batch.get("ramp_from")),
        "max_steps": known(start.get("max_steps")),
        "total_tokens": known(start.get("total_tokens")),
        "lr": known(optim.get("lr")),
        "warmup_steps": known(schedule.get("warmup_steps")),
        "final_lr_fraction": known(schedule.get("min_lr_fraction")),
        "schedule": _text(schedule.get("kind")),
        "weight_decay": known(optim.get("weight_decay")),
        "seq_len": known(batch.get("seq_len")),
        "window_from": known(schedule.get("window_from")),
        "optimizer": _text(optim.get("name")),
        "model": model,
        "order": "one batch" if batch.get("one_batch") is True else _text(batch.get("order")),
        "precision": _text(start.get("precision")),
        "gzip_bits": known(_table(start, "baselines").get("gzip")),
    }


def dataset_of(text: str) -> str | None:
    """The data set in a name or a path, as the references call it."""
    return next((name for name, pattern in _DATASETS.items() if re.search(pattern, text.lower())), None)


def number(value: object) -> float:
    """A recorded value as a float; NaN for anything else, or too large for any of these."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return float(value) if usable else math.nan  # type: ignore[arg-type]


def known(value: object) -> float | None:
    """The same, or None."""
    return None if math.isnan(number(value)) else number(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _table(of: Event, key: str) -> Event:
    value = of.get(key)
    return value if isinstance(value, dict) else {}
