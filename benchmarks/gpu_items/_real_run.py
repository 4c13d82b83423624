"""A short real run of the command line, for items. In: a recipe and seconds; out: its evaluations and speed as rows."""

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
from regpt2.config.run import RunConfig
from regpt2.model.flops import flops_per_token
from regpt2.model.gpt import GPTConfig

GUESS = 300_000.0  # tokens per second of GPT-2 (124M), if no headline was measured


def require_training(check: Check) -> None:
    """Skip the item where the training loop cannot run."""
    if importlib.util.find_spec("tyro") is None:
        raise Skip("the training loop needs tyro: see --wheels")
    if check.data is None:
        raise Skip("no --data DIR")


def train_for(check: Check, recipe: str, seconds: float, name: str) -> None:
    """`regpt2 train RECIPE` for about `seconds`, in the folder `name`. The weights are deleted, the record is kept."""
    config = load_recipe(recipe)
    tokens = 0.6 * seconds * tokens_per_s(check, config)  # the rest: compiling, evaluations, samples, the report
    steps = 4 if check.smoke else max(20, int(tokens / config.batch.batch_tokens))
    folder = check.folder / name
    options = {
        "data": check.data,
        "run": folder,
        "device": check.device,
        "max-steps": steps,
        "eval-every": max(1, steps // 4),
        "evals.val-tokens": min(config.evals.val_tokens, 1024 if check.smoke else 1 << 21),
        "sample-every": steps,
        "save-every": steps,
        "log-every": 1 if check.smoke else 5,
        "resume": "never",
    }
    if config.schedule.warmup_steps:
        options["schedule.warmup-steps"] = max(1, steps // 20)
    if config.optim.muon.momentum_warmup_steps:
        options["optim.muon.momentum-warmup-steps"] = max(1, steps // 5)
    command = [sys.executable, "-m", "regpt2", "train", recipe]
    command += [word for option, value in options.items() for word in (f"--{option}", str(value))]
    shutil.rmtree(folder, ignore_errors=True)
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if code:
        raise Problem(f"training {recipe} ended with code {code}: see {check.log}")
    keep_run(check, read_events(folder / "metrics.jsonl"), f"{recipe}: " if name != "training" else "")


def tokens_per_s(check: Check, config: RunConfig) -> float:
    """As the headline measured it of GPT-2 in this folder, or a guess; for other models by their FLOPs."""
    path = check.folder / "headline.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    of_gpt2 = max(
        [row["tokens_per_s"] for row in rows if "ours" in row["name"] and "tokens_per_s" in row], default=GUESS
    )
    return of_gpt2 * flops_per_token(GPTConfig(), 1024) / flops_per_token(config.model, config.batch.seq_len)


def keep_run(check: Check, events: Iterable[dict[str, Any]], of: str) -> None:
    """Its evaluations, and its speed with everything that a run does besides."""
    updates = []
    for event in events:
        if event["event"] == "train":
            updates.append(event)
        elif event["event"] == "eval":
            figures = {name: value for name, value in event.items() if isinstance(value, float)}
            check.keep(f"{of}{event['eval']} at step {event['step']}", **figures)
    first, last = updates[0], updates[-1]
    speed = statistics.median(event["tokens_per_s"] for event in updates)
    learned = last["loss"] < first["loss"]
    check.judge(
        f"{of}{last['step']} updates",
        tokens=last["tokens"],
        first_loss=first["loss"],
        last_loss=last["loss"],
        tokens_per_s=speed,
        mfu=last["mfu"],
        ok=learned and not any(event["skipped"] for event in updates),
    )
