"""What a run is held against. In: a `Record`; out: published scores of its size and on its data, and their sources."""

import math

from regpt2.pages.record import Event, Record, number
from regpt2.references.run_facts import dataset_of
from regpt2.references.scores import Reference, references_for

SIZES = {"124M": 124e6, "350M": 354e6, "774M": 774e6, "1558M": 1558e6}  # as the papers name them: parameters
CHANCE = {"hellaswag": 0.25}
NO_METRICS = ("event", "eval", "step", "time", "elapsed_s", "count", "tokens", "seen_tokens")


class Sources:
    """Where the numbers of others on this page come from: each source has one number, in the order of first use."""

    def __init__(self) -> None:
        self.named: list[str] = []

    def mark(self, source: str) -> int:
        """The source's number, from 1."""
        if source not in self.named:
            self.named.append(source)
        return self.named.index(source) + 1


def size_of(record: Record) -> str:
    """The size among GPT-2's that is nearest to the run's: by ratio; the smallest where nothing is known."""
    n_params = number(record.start.get("n_params"))
    if not (math.isfinite(n_params) and n_params > 0):
        return "124M"
    return min(SIZES, key=lambda size: abs(math.log(SIZES[size] / n_params)))


def references_of(record: Record, name: str, metric: str) -> list[Reference]:
    """Published scores beside one of the run's. A loss has some only on the very data set, in GPT-2's own tokens."""
    dataset = _dataset(record) if name == "val_loss" else None
    if name == "val_loss" and not (dataset and record.start.get("tokenizer") == "gpt2"):
        return []
    return [one for one in references_for(name, metric, dataset) if one.model.endswith(f" {size_of(record)}")]


def _dataset(record: Record) -> str | None:
    """The data as the references call it: by its name or, of shards that came without one, by their folder's."""
    config = record.start.get("config")
    folder = config.get("data") if isinstance(config, dict) else None
    return dataset_of(record.dataset or str(folder))


def latest_evals(record: Record) -> list[Event]:
    """The newest event of each evaluation of the run, in the order in which they came; then what was measured later."""
    return [*{str(event.get("eval")): event for event in record.evals}.values(), *record.measured]


def metrics_of(event: Event) -> list[str]:
    """The keys of an evaluation's figures: neither what is around them nor their standard errors."""
    named = (key for key, value in event.items() if not isinstance(value, dict | list))
    return [key for key in named if key not in NO_METRICS and not key.endswith("_stderr")]
