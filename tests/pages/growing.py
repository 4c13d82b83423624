"""Records for tests of live runs. In: how long; out: the events of a run, and lines as training writes them."""

import math
from pathlib import Path
from typing import Any

from regpt2.base.record.metrics import MetricsLog

BATCH_TOKENS = 1000
HOSTILE = "</script><img src=x onerror=alert(1)> \x1b[2J\u202e\x07 <b>bold</b>"


def start_event(max_steps: int = 100, **changes: Any) -> dict[str, Any]:
    """The event that begins a run."""
    event = {
        "event": "run", "step": 0, "time": "2026-11-30T07:40:48+00:00", "config": {"recipe": "demo", "seed": 1},
        "n_params": 1_000_000, "tokenizer": "gpt2", "dataset": "tiny", "device": "cpu: a", "batch_tokens": BATCH_TOKENS,
        "max_steps": max_steps, "total_tokens": max_steps * BATCH_TOKENS, "baselines": {"gzip": 2.5},
    }  # fmt: skip
    return event | changes


def loss_at(step: int) -> float:
    """A falling loss."""
    return 3 + 7 * math.exp(-step / 30)


def train_event(step: int, **changes: Any) -> dict[str, Any]:
    """One update."""
    event = {
        "event": "train", "step": step, "loss": loss_at(step), "grad_norm": 0.5, "lr": 6e-4, "step_ms": 100.0,
        "tokens_per_s": 10_000.0, "mfu": None, "tokens": step * BATCH_TOKENS, "skipped": False,
        "data": "60d12d6e6a65a5a1",
    }  # fmt: skip
    return event | changes


def val_event(step: int, **changes: Any) -> dict[str, Any]:
    """One validation."""
    loss = loss_at(step) + 0.1
    event = {"event": "eval", "step": step, "eval": "val_loss", "loss": loss, "perplexity": math.exp(loss)}
    return event | {"bits_per_byte": loss / 3, "tokens": 512, "elapsed_s": 0.1} | changes


def events_until(step: int, *, max_steps: int = 100, every: int = 10) -> list[dict[str, Any]]:
    """A run up to this step, with a validation and a sample every few."""
    events = [start_event(max_steps), val_event(0)]
    for at in range(1, step + 1):
        events.append(train_event(at))
        if at % every == 0:
            events += [val_event(at), {"event": "sample", "step": at, "prompt": "def ", "texts": [f"def at_{at}():"]}]
    return events


def append(run: Path, events: list[dict[str, Any]]) -> None:
    """Write events as training does."""
    run.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(run / "metrics.jsonl")
    for event in events:
        values = {key: value for key, value in event.items() if key not in ("event", "step")}
        log.log(event["event"], event["step"], **values)
