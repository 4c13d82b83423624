"""A short real run: `regpt2 train RECIPE --data DIR` for the available time; its report and its losses.

It makes as many updates as fit by the headline's speed. The weights are deleted, the record and the report kept.
"""

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from gpu_items import Check, Skip
from regpt2.base.errors import Problem
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe

GUESS = 300_000.0  # tokens per second, if no headline was measured


def run(check: Check) -> None:
    if importlib.util.find_spec("tyro") is None:
        raise Skip("the training loop needs tyro: see --wheels")
    if check.data is None:
        raise Skip("no --data DIR")
    config = load_recipe(check.recipe)
    tokens = 0.6 * check.left_s * tokens_per_s(check)  # the rest: compiling, evaluations, samples, the report
    steps = 4 if check.smoke else max(20, int(tokens / config.batch.batch_tokens))
    folder = check.folder / "training"
    options = {
        "data": check.data,
        "run": folder,
        "device": check.device,
        "max-steps": steps,
        "schedule.warmup-steps": max(1, steps // 20),
        "eval-every": max(1, steps // 4),
        "evals.val-tokens": min(config.evals.val_tokens, 1024 if check.smoke else 1 << 21),
        "sample-every": steps,
        "save-every": steps,
        "log-every": 1 if check.smoke else 5,
        "resume": "never",
    }
    command = [sys.executable, "-m", "regpt2", "train", check.recipe]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    shutil.rmtree(folder, ignore_errors=True)
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if code:
        raise Problem(f"training ended with code {code}: see {check.log}")
    keep_run(check, read_events(folder / "metrics.jsonl"))


def tokens_per_s(check: Check) -> float:
    """As the headline measured it in this folder, or a guess."""
    path = check.folder / "headline.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return max([row["tokens_per_s"] for row in rows if "ours" in row["name"] and "tokens_per_s" in row], default=GUESS)


def keep_run(check: Check, events: Iterable[dict[str, Any]]) -> None:
    """Its evaluations, and its speed with everything that a run does besides."""
    updates = []
    for event in events:
        if event["event"] == "train":
            updates.append(event)
        elif event["event"] == "eval":
            figures = {name: value for name, value in event.items() if isinstance(value, float)}
            check.keep(f"{event['eval']} at step {event['step']}", **figures)
    first, last = updates[0], updates[-1]
    speed = statistics.median(event["tokens_per_s"] for event in updates)
    learned = last["loss"] < first["loss"]
    check.judge(
        f"{last['step']} updates",
        tokens=last["tokens"],
        first_loss=first["loss"],
        last_loss=last["loss"],
        tokens_per_s=speed,
        mfu=last["mfu"],
        ok=learned and not any(event["skipped"] for event in updates),
    )
