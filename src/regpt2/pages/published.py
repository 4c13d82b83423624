"""Published results beside a run. In: a `Record`; out: scores of its size and on its data, and their sources."""

import math

from regpt2.pages.record import Event, Record, number
from regpt2.pages.safe_html import Html, fill
from regpt2.references.run_facts import dataset_of
from regpt2.references.scores import Reference, references_for

SIZES = {"124M": 124e6, "350M": 354e6, "774M": 774e6, "1558M": 1558e6}  # as the papers name them: parameters
CHANCE = {"hellaswag": 0.25}
CORE = ("core", "centered_mean")  # of CORE only these; its tasks have a table of their own
NO_METRICS = ("event", "eval", "step", "time", "elapsed_s", "count", "tokens", "seen_tokens")


class Sources:
    """The sources of the published numbers on a page, each with a number, in the order of first use."""

    def __init__(self) -> None:
        self.named: list[str] = []

    def mark(self, source: str) -> int:
        """The source's number, from 1."""
        if source not in self.named:
            self.named.append(source)
        return self.named.index(source) + 1

    def link(self, source: str) -> Html:
        """The source's number as a link to the list of sources, after a space; nothing for no source."""
        if not source:
            return Html("")
        return fill(' <a class="mark" href="#source-{n}">[{n}]</a>', n=self.mark(source))


def size_of(record: Record) -> str:
    """GPT-2's size that is nearest to the run's, by ratio; the smallest where the run's is unknown."""
    n_params = number(record.start.get("n_params"))
    if not (math.isfinite(n_params) and n_params > 0):
        return "124M"
    return min(SIZES, key=lambda size: abs(math.log(SIZES[size] / n_params)))


def references_of(record: Record, name: str, metric: str) -> list[Reference]:
    """Published scores for one metric of the run; for a loss only those on the same data set, in GPT-2's tokens."""
    dataset = None
    if name == "val_loss":
        config = record.start.get("config")
        folder = config.get("data") if isinstance(config, dict) else None  # shards without a name go by their folder's
        dataset = dataset_of(record.dataset or str(folder))
        if not dataset or record.start.get("tokenizer") != "gpt2":
            return []
    return [one for one in references_for(name, metric, dataset) if one.model.endswith(f" {size_of(record)}")]


def latest_evals(record: Record) -> list[Event]:
    """The newest event of each evaluation of the run, in the order of the record; then what was measured later."""
    return [*{str(event.get("eval")): event for event in record.evals}.values(), *record.measured]


def metrics_of(event: Event) -> list[str]:
    """The keys of an evaluation's metrics, without standard errors and other fields."""
    entry, _, part = str(event.get("eval")).partition(".")
    if entry == "core":  # its tasks have a table of their own
        return [] if part else [key for key in CORE if key in event]
    named = (key for key, value in event.items() if not isinstance(value, dict | list))
    return [key for key in named if key not in NO_METRICS and not key.endswith("_stderr")]
