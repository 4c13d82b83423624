"""How a run does, in a line. In: its record so far, and whether a process trains it; out: a `Status`."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regpt2.base.files import LOCK, is_locked
from regpt2.pages.live.follow import Follower
from regpt2.pages.record import Column, Record, number
from regpt2.pages.report.results import final_training_loss
from regpt2.pages.report.verdicts import after_state, checks_of, state_of

RECENT = 20
"""Updates whose speed is the speed now."""
GROWING_S = 30.0
"""A record without a lock beside it, as one that is copied from another machine, is growing if it is younger."""
WAITING, RUNNING, FINISHED, STOPPED, FAILED, KILLED = "waiting", "running", "finished", "stopped", "failed", "killed"


@dataclass(frozen=True)
class Status:
    """The line of a run. NaN where nothing is known."""

    state: str
    """waiting, running, finished, stopped, failed or killed."""
    reason: str
    """The rest of why it ended."""
    recipe: str
    step: float
    max_steps: float
    tokens: float
    total_tokens: float
    loss: float
    """Of training, averaged over the newest updates."""
    val_loss: float
    """The newest."""
    best_loss: float
    best_step: float
    tokens_per_s: float
    """Of the newest updates."""
    mfu: float
    """Likewise: how much of `peak` they used."""
    peak_is_timed: bool
    """Is the peak the matmul rate of a CPU, and not that of a data sheet?"""
    lr: float
    grad_norm: float
    elapsed_s: float
    left_s: float
    """Time left at this speed; 0 where it ended."""
    verdict: str
    """In a word or two; empty without one."""
    verdict_text: str
    """The rest of its sentence."""
    checks: tuple[str, ...]
    """What to check, by the newest verdict."""

    @property
    def mfu_name(self) -> str:
        """What `mfu` is called, before its value."""
        return "matmul share" if self.peak_is_timed else "MFU"

    @property
    def share(self) -> float:
        """How much of the run is done, from 0 to 1; NaN if unknown."""
        done, whole = (self.tokens, self.total_tokens) if self.total_tokens > 0 else (self.step, self.max_steps)
        return min(1.0, done / whole) if whole > 0 else math.nan

    @property
    def has_ended(self) -> bool:
        """Nothing more is to be expected, unless the run is resumed."""
        return self.state in (FINISHED, STOPPED, FAILED, KILLED)


def status_of(follower: Follower) -> Status:
    """The status now. Asks the system for the lock of the run's folder."""
    record = follower.record
    state, reason = _state(follower, record)
    verdict = record.verdicts[-1] if record.verdicts else {}
    validations, best = record.validations, record.best
    total_tokens, speed = _newest_start(record, "total_tokens"), _newest(record.train["tokens_per_s"])
    left_s = 0.0 if state == FINISHED else max(0.0, total_tokens - record.tokens) / speed if speed > 0 else math.nan
    return Status(
        state=state,
        reason=reason,
        recipe=record.recipe if record.runs else "",
        step=record.last_step,
        max_steps=_newest_start(record, "max_steps"),
        tokens=record.tokens,
        total_tokens=total_tokens,
        loss=final_training_loss(record),
        val_loss=number(validations[-1].get("loss")) if validations else math.nan,
        best_loss=best.loss if best.step is not None else math.nan,
        best_step=float(best.step) if best.step is not None else math.nan,
        tokens_per_s=speed,
        mfu=_newest(record.train["mfu"]),
        peak_is_timed=record.has_timed_peak,
        lr=_last(record.train["lr"]),
        grad_norm=_last(record.train["grad_norm"]),
        elapsed_s=record.elapsed_s,
        left_s=left_s,
        verdict=state_of(verdict) if verdict else "",
        verdict_text=after_state(verdict) if verdict else "",
        checks=tuple(checks_of(verdict)),
    )


def _state(follower: Follower, record: Record) -> tuple[str, str]:
    if not follower.exists:
        return WAITING, ""
    if record.end is not None:
        ended = str(record.end.get("reason") or "ended")[:1000]
        if ended == FINISHED:
            return FINISHED, ""
        return FAILED if ended.startswith(FAILED) else STOPPED, ended.removeprefix(f"{FAILED}: ")
    return (RUNNING if _is_trained(follower.run, follower.changed_at) else KILLED), ""


def _is_trained(run: Path, changed_at: float) -> bool:
    if (run / LOCK).exists():
        return is_locked(run)
    return time.time() - changed_at < GROWING_S


def _newest_start(record: Record, key: str) -> float:
    """Of the newest start: a resumed run may be longer."""
    return number(record.runs[-1].get(key)) if record.runs else math.nan


def _newest(values: Column) -> float:
    recent = values[-RECENT:]
    recent = recent[np.isfinite(recent)]
    return float(np.median(recent)) if len(recent) else math.nan


def _last(values: Column) -> float:
    return float(values[-1]) if len(values) else math.nan
