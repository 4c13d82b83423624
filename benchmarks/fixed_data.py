"""Many passes over little data: the best validation loss of each arm. In: folders of runs; out: JSON, and a picture.

    python benchmarks/fixed_data.py RUNS --out JSON --picture PNG

RUNS has a folder for each arm, and in it one for each seed: ARM/seed-N, as `regpt2 compare` makes them or
`regpt2 train --run RUNS/ARM/seed-N`. Each arm is compared with the one that it differs from in one part (`base_of`),
seed by seed.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from regpt2.base.record.metrics import read_events
from regpt2.pages.charts.draw import PRINT, RUN_COLORS, heading, png

SHOWN = {
    "one pass": "one_pass",
    "many passes as usual": "naive",
    "the recipe": "recipe",
    "the recipe, 24 passes": "recipe_24",
    "24, light decay": "no_decay_24",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--about", default="", help="what the data is, for the file")
    options = parser.parse_args()
    arms = {
        folder.name: [read(run) for run in sorted(folder.glob("seed-*"))] for folder in sorted(options.runs.iterdir())
    }
    table = {
        name: {"base": base_of(name), **summary(runs, arms.get(base_of(name), []))}
        for name, runs in arms.items()
        if runs
    }
    options.out.write_text(json.dumps({"about": options.about, "arms": table, "runs": arms}, indent=1) + "\n")
    for name, row in table.items():
        print(json.dumps({"arm": name, **row}))
    if options.picture:
        draw(options.picture, arms)


def base_of(arm: str) -> str:
    """What an arm is compared with."""
    if arm.endswith("_24"):
        return "recipe_24"
    return "with_dropout" if arm.startswith("with_dropout_") else "recipe"


def read(run: Path) -> dict[str, Any]:
    """The validation losses of a run, and what it was."""
    events = list(read_events(run / "metrics.jsonl"))
    start = next(event for event in events if event["event"] == "run")
    found = [event for event in events if event["event"] == "eval" and event["eval"] == "val_loss"]
    losses = [event["loss"] for event in found]
    return {
        "seed": start["config"]["seed"],
        "best": min(losses),
        "best_tokens": found[int(np.argmin(losses))]["seen_tokens"],
        "last": losses[-1],
        "finished": events[-1]["event"] == "end" and events[-1]["reason"] == "finished",
        "tokens": [event["seen_tokens"] for event in found],
        "losses": losses,
        **{key: start[key] for key in ("command", "version", "torch", "device", "precision", "threads", "n_params")},
        "train_tokens": start["train_tokens"],
        "data_fingerprint": start["data_fingerprint"],
        "config": {key: start["config"][key] for key in ("max_steps", "model", "batch", "optim", "schedule")},
    }


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of the best loss over seeds; the mean difference to the base's runs of equal seeds."""
    best = [run["best"] for run in runs]
    of_base = {run["seed"]: run["best"] for run in base}
    pairs = [run["best"] - of_base[run["seed"]] for run in runs if run["seed"] in of_base]
    return {
        "seeds": len(runs),
        "best": float(np.mean(best)),
        "standard_error": error(best),
        "last": float(np.mean([run["last"] for run in runs])),
        "passes_at_best": float(np.mean([run["best_tokens"] / run["train_tokens"] for run in runs])),
        "to_base": float(np.mean(pairs)) if pairs else None,
        "to_base_standard_error": error(pairs),
        "pairs": len(pairs),
    }


def error(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def draw(path: Path, arms: dict[str, list[dict[str, Any]]]) -> None:
    """The loss against the tokens seen: the mean over seeds, its lowest point marked and named."""
    figure = Figure(figsize=(10, 5.2), dpi=160, facecolor="white")
    axes = figure.add_axes((0.07, 0.11, 0.7, 0.71))
    million = arms["recipe"][0]["train_tokens"] / 1e6
    for i, (label, name) in enumerate(SHOWN.items()):
        runs = [run for run in arms.get(name, []) if run["tokens"] == arms[name][0]["tokens"]]
        if not runs:
            continue
        tokens, mean = np.array(runs[0]["tokens"]) / 1e6, np.mean([run["losses"] for run in runs], axis=0)
        at, color = int(np.argmin(mean)), RUN_COLORS[i]
        axes.plot(tokens[1:], mean[1:], color=color, linewidth=1.7)
        axes.plot(tokens[at], mean[at], "o", color=color, markersize=6)
        best = np.mean([run["best"] for run in runs])
        axes.annotate(
            f"{label}: {best:.3f}", (tokens[-1], mean[-1]), xytext=(8, 7), textcoords="offset points",
            va="center", color=color, fontsize=10,
        )  # fmt: skip
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(PRINT["grid"])
    axes.grid(axis="y", color=PRINT["grid"], linewidth=0.8)
    axes.tick_params(length=0, labelcolor=PRINT["faint"], labelsize=9)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"tokens seen, million; a pass is {million:.3f}", color=PRINT["faint"], fontsize=9)
    subtitle = "Validation loss, nats per token, mean over seeds; the dot is the lowest"
    heading(figure, "The same text, read many times", subtitle, (0.92, 0.865))
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
