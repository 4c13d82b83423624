"""Reference curves: published runs as data. In: the files of curves/; out: loss over tokens, each with its source."""

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from regpt2.references.run_facts import Column

_FOLDER = Path(__file__).with_name("curves")
N_PARAMS = {  # of the models that the curves name
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "modern-124m": 162_149_376,  # of it 38,597,376 in the head, and as many in the embedding
    "modern-124m-long": 275_562_287,  # three more embeddings, a block without attention, 47 scalars instead of norms
}


@dataclass(frozen=True, eq=False)
class Curve:
    """The validation loss of one published run, or the mean of several."""

    name: str
    title: str
    dataset: str
    source: str
    batch_tokens: int
    tokens: Column
    """Tokens seen, from 0, rising."""
    loss: Column
    spread: Column | None = None
    """Standard deviation over runs at each point, where there were several; of runs like it, where that is known."""
    model: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What is known of its recipe, by the names in _RECIPE; the default of tokenizer is GPT-2's."""
    scatter: float | None = None
    """Standard deviation of the training losses of single updates, late in the run."""
    auto: bool = False
    """Is it the one for its model and data set?"""
    by_shape: bool = False
    """Made of another curve's shape and a known end, because no curve of this recipe on this data is published."""
    margin: float = 0.0
    """By how much its own level is uncertain, in nats."""

    def at(self, tokens: float) -> float:
        """The loss after `tokens`, interpolated linearly over log tokens; NaN outside of the points."""
        if not self.tokens[1] <= tokens <= self.tokens[-1]:
            return math.nan
        return float(np.interp(math.log(tokens), np.log(self.tokens[1:]), self.loss[1:]))

    def slope(self, tokens: float) -> float:
        """By how much the loss falls here while the tokens grow e-fold."""
        low, high = max(tokens / 1.1, self.tokens[1]), min(tokens * 1.1, self.tokens[-1])
        return max(0.0, self.at(low) - self.at(high)) / math.log(high / low)


@cache
def load() -> tuple[Curve, ...]:
    """All curves, by name."""
    return tuple(_read(path) for path in sorted(_FOLDER.glob("*.json")))


def names() -> list[str]:
    """What a recipe may choose."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def choose(choice: str, dataset: str | None, n_params: float | None, schedule: str | None = None) -> Curve | None:
    """The curve of this name; with "auto" the one for this model on this data, if there is one.

    GPT-2 has two on FineWeb, of two schedules: the run's own, else the cosine that it was published with.
    """
    if choice != "auto":
        return next((curve for curve in load() if curve.name == choice), None)
    fitting = {
        of.recipe["schedule"]: of
        for of in load()
        if of.auto and of.dataset == dataset and N_PARAMS[of.model] == n_params
    }
    return fitting.get(schedule) or fitting.get("cosine") or next(iter(fitting.values()), None)


def _read(path: Path) -> Curve:
    of = json.loads(path.read_text(encoding="utf-8"))
    shape = _read(path.with_name(f"{of['shape_of']}.json")) if "shape_of" in of else None
    if shape is None:
        rows = np.array(of.get("val_loss") or of["val_loss_mean_std"], dtype=np.float64)
        tokens, loss = rows[:, 0] * of["batch_tokens"], rows[:, 1]
    else:  # the fall from the first loss is stretched until it ends where it should
        stretch = (shape.loss[0] - of["end"]) / (shape.loss[0] - shape.loss[-1])
        tokens, loss = shape.tokens, shape.loss[0] - stretch * (shape.loss[0] - shape.loss)
    deviation: Column | None = None
    if shape is None and rows.shape[1] > 2:
        deviation = rows[:, 2]
    elif "runs_deviation" in of:
        deviation = np.full(len(loss), of["runs_deviation"])
    windows = np.array(of.get("train_loss_windows_of_50") or np.empty((0, 3)), dtype=np.float64)
    own_scatter = float(np.median(windows[len(windows) // 2 :, 2])) if len(windows) else None
    return Curve(
        name=path.stem,
        title=of["name"],
        dataset=of["dataset"],
        source=of["source"],
        batch_tokens=of["batch_tokens"],
        tokens=tokens,
        loss=loss,
        spread=deviation,
        model=of.get("model", ""),
        recipe={key: of[key] for key in _RECIPE if key in of},
        scatter=shape.scatter if shape else own_scatter,
        auto=of.get("auto", False),
        by_shape=shape is not None,
        margin=of.get("margin", 0.0),
    )


_RECIPE = (
    "tokenizer", "ingredients", "optimizer", "lr", "warmup_steps", "final_lr_fraction", "schedule", "decay_fraction",
    "weight_decay", "seq_len", "window_from",
)  # fmt: skip
