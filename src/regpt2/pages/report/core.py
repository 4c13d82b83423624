"""CORE task by task. In: a `Record`; out: rows beside OpenAI's four GPT-2, as a table of a page and of Markdown."""

from dataclasses import dataclass

from regpt2.pages.published import Sources, latest_evals
from regpt2.pages.record import Record, number
from regpt2.pages.safe_html import Html, fill, join
from regpt2.pages.tables import table
from regpt2.references.core import core_scores

CAPTION = "CORE beside OpenAI's GPT-2, centered"
WARNING = (
    "Centered is (accuracy - chance) / (1 - chance); the figures of OpenAI's four models are centered too. Of these "
    "only 124M was scored on whole sets, the other three on at most 1,000 examples of each task."
)


@dataclass(frozen=True)
class CoreTable:
    """Texts: the measured tasks in the order of the published table, then their mean."""

    rows: list[list[str]]
    """Task, accuracy, centered; the centered accuracy of each of OpenAI's models; chance."""
    models: list[str]
    """Their sizes."""
    sources: tuple[str, ...]
    """Of each model's figures."""

    @property
    def head(self) -> list[str]:
        """The names of the columns."""
        return ["task", "accuracy", "centered", *self.models, "chance"]


def core_table(record: Record) -> CoreTable | None:
    """What the newest measurements of CORE or of parts of it say about single tasks; None if they say nothing."""
    published = core_scores()
    figures: dict[str, object] = {}
    for event in latest_evals(record):
        if str(event.get("eval")).partition(".")[0] == "core":
            figures |= event
    accuracies = {name: number(figures.get(name)) for name in published.tasks}
    measured = {name: accuracy for name, accuracy in accuracies.items() if 0 <= accuracy <= 1}
    if not measured:
        return None
    rows = []
    for name, accuracy in measured.items():
        task, stderr = published.tasks[name], number(figures.get(f"{name}_stderr"))
        spread = f" ± {100 * stderr:.1f}" if stderr >= 0 else ""
        against = [_centered(task.centered(one)) for one in task.accuracy]
        ours = [f"{100 * accuracy:.1f}{spread} %", _centered(task.centered(accuracy))]
        rows.append([name, *ours, *against, f"{100 * task.baseline:g} %"])
    centered = [published.tasks[name].centered(accuracy) for name, accuracy in measured.items()]
    whole = len(measured) == len(published.tasks)
    against = [_centered(one) for one in (published.core if whole else published.means(measured))]
    mean = "CORE, the mean" if whole else f"mean of these {len(measured)}"
    rows.append([mean, "", _centered(sum(centered) / len(centered)), *against, ""])
    return CoreTable(rows, [model.rpartition(" ")[2] for model in published.models], published.sources)


def core_section(record: Record, sources: Sources) -> Html:
    """The table of a page with its warning; empty without measured tasks."""
    found = core_table(record)
    if found is None:
        return Html("")
    first, after = found.head[: -len(found.models) - 1], found.head[-1:]
    linked = [
        fill("{model}{mark}", model=model, mark=sources.link(source))
        for model, source in zip(found.models, found.sources, strict=True)
    ]
    return join(
        [
            fill("<h3>{text}</h3>", text=CAPTION),
            table(CAPTION, [*first, *linked, *after], found.rows, "figures core"),
            fill('<p class="remark">{text}</p>', text=WARNING),
        ]
    )


def _centered(value: float) -> str:
    return f"{value:.3f}"
