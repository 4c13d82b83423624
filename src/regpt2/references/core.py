"""OpenAI's four GPT-2 on CORE. In: nothing; out: each task's accuracy by chance, and what the four models reach."""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("core.toml")


@dataclass(frozen=True)
class TaskScores:
    """One task."""

    baseline: float
    """The accuracy that is worth nothing, 0 to 1."""
    accuracy: tuple[float, ...]
    """Of each of the models, 0 to 1."""

    def centered(self, accuracy: float) -> float:
        """0 at the baseline and 1 where all is right (DCLM, arXiv:2406.11794, section 3.5)."""
        return (accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class CoreScores:
    """All tasks, in the order of the published table."""

    models: tuple[str, ...]
    sources: tuple[str, ...]
    """Of each model's figures."""
    core: tuple[float, ...]
    """Of each model, as published."""
    tasks: dict[str, TaskScores]

    def means(self, names: Iterable[str]) -> Sequence[float]:
        """The mean of the centered accuracies over these tasks, of each model."""
        scores = [self.tasks[name] for name in names]
        return [sum(one.centered(one.accuracy[i]) for one in scores) / len(scores) for i in range(len(self.models))]


@cache
def core_scores() -> CoreScores:
    """The file's content."""
    found = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    tasks = {name: TaskScores(row["baseline"] / 100, tuple(row["accuracy"])) for name, row in found["tasks"].items()}
    return CoreScores(tuple(found["models"]), tuple(found["sources"]), tuple(found["core"]), tasks)
