"""Published scores. In: an evaluation and its metric; out: what others measured, each with its source."""

import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from regpt2.references.core import core_scores

PAPER = "Radford et al. 2019"  # how the sources of the GPT-2 paper's figures begin
_FILE = Path(__file__).with_name("scores.toml")


@dataclass(frozen=True)
class Reference:
    """One published number."""

    eval: str
    metric: str
    model: str
    value: float
    source: str
    dataset: str = ""
    """The data it was measured on, where an evaluation may see several: val_loss."""

    @property
    def family(self) -> str:
        """GPT-2 or GPT-3."""
        return self.model.rpartition(" ")[0]

    @property
    def n_params(self) -> float:
        """As the name says it: 124M."""
        return 1e6 * float(self.model.rpartition(" ")[2].removesuffix("M"))


@cache
def references() -> tuple[Reference, ...]:
    """All of them, in the order of the files."""
    tables = tomllib.loads(_FILE.read_text(encoding="utf-8"))["of"]
    listed = tuple(
        Reference(**{key: value for key, value in table.items() if key != "models"}, **one)
        for table in tables
        for one in table["models"]
    )
    return listed + tuple(_of_core())


def core_mean(tasks: Iterable[str]) -> list[Reference]:
    """The mean of the centered accuracies over these tasks of CORE, the smallest model first."""
    return _core_references("centered_mean", core_scores().means(tasks))


def _of_core() -> Iterator[Reference]:
    """CORE, and of each of its tasks the accuracy and the centered accuracy."""
    yield from _core_references("core", core_scores().core)
    for name, task in core_scores().tasks.items():
        yield from _core_references(name, task.accuracy)
        yield from _core_references(f"{name}_centered", [task.centered(one) for one in task.accuracy])


def _core_references(metric: str, values: Sequence[float]) -> list[Reference]:
    models = zip(core_scores().models, values, core_scores().sources, strict=True)
    return [Reference("core", metric, model, value, source) for model, value, source in models]


def references_for(name: str, metric: str, dataset: str | None = None) -> list[Reference]:
    """Those of one metric, the smallest model first. With `dataset`, only those that were measured on it."""
    return [
        one
        for one in references()
        if (one.eval, one.metric) == (name, metric) and (dataset is None or one.dataset == dataset)
    ]


def nearest(found: list[Reference], n_params: int) -> list[Reference]:
    """Of each family (GPT-2, GPT-3), as each source measured it, the model whose size is nearest."""
    best: dict[tuple[str, str], Reference] = {}
    for one in found:
        other = best.setdefault((one.family, one.source), one)
        if abs(math.log(one.n_params / n_params)) < abs(math.log(other.n_params / n_params)):
            best[one.family, one.source] = one
    return list(best.values())
