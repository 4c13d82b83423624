"""A comparison as a page and as Markdown. In: its plan, runs and outcomes; out: HTML that opens offline, and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from regpt2.pages import tables
from regpt2.pages.published import Sources
from regpt2.pages.report import markdown
from regpt2.pages.report.certificate import FACTS
from regpt2.pages.report.page import charts, document, section
from regpt2.pages.safe_html import Html, fact, facts_table, fill, folded, join
from regpt2.run.comparing.charts import panels
from regpt2.run.comparing.outcomes import Outcome, answer
from regpt2.run.comparing.runs import Comparison, Run
from regpt2.run.comparing.tables import HOW_TO_READ, arms_table, costs_table, results_table, seeds_table


@dataclass(frozen=True)
class Result:
    """What a comparison over one recipe shows in place of arms beside a baseline."""

    title: str
    kind: str
    answer: str
    """In a sentence."""
    tables: list[tuple[str, list[list[str]]]]
    """Captions and rows, the head first."""
    remarks: list[str]
    how_to_read: str
    drawn: Html
    picture: bytes
    """A PNG."""
    json: dict[str, Any]


_SHOWN = (
    "Data set", "Data fingerprint", "Tokenizer", "Validation tokens", "Device", "Precision", "Threads", "Commit",
    "regpt2", "Python", "PyTorch",
)  # fmt: skip


CSS = """
main > .verdict { margin-top: 2rem; }
.verdicts th:nth-child(2), .verdicts td:nth-child(2) { text-align: left; }
@media (max-width: 36rem) {
  .verdicts th:first-child { min-width: 4rem; max-width: 9rem; white-space: normal; }
}
"""


def facts(plan: Comparison, runs: Sequence[Sequence[Run]]) -> dict[str, str]:
    """What the figures depend on; where runs differ, all values."""
    starts = [run.start for of_arm in runs for run in of_arm if run.start]
    values = {"Command": plan.command, "Budget": plan.budget, "Seeds": f"1 to {plan.seeds}"}
    for name in _SHOWN:
        values[name] = ", ".join(dict.fromkeys(str(start.get(FACTS[name]))[:200] for start in starts)) or "unknown"
    return values


def subtitle(plan: Comparison, runs: Sequence[Sequence[Run]]) -> str:
    """Budget, seeds, data and device in a line."""
    values = facts(plan, runs)
    return f"{plan.budget} · seeds {values['Seeds']} · {values['Data set']} · {values['Device']}"


def title(plan: Comparison) -> str:
    """What is compared."""
    first, *others = [arm.label for arm in plan.arms]
    return " · ".join([first, *others]) if len(others) < 3 else f"{first} and {len(others)} others"


def page(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome], remarks: Sequence[str]) -> Html:
    """The whole document."""
    notes = join(fill('<p class="remark">{remark}</p>', remark=remark) for remark in (*remarks, HOW_TO_READ))
    drawn = panels(plan, runs)
    parts = [
        fill('<p class="verdict">{answer}</p>', answer=answer(plan, found)),
        section("Result", join([_table("Result", results_table(found), "figures verdicts"), notes])),
        section("Tokens and time", _table("Tokens and time", costs_table(plan, found))),
        section("Curves", charts(drawn, Sources()) if drawn else Html("")),
        section("Each seed", _table("Final validation loss", seeds_table(plan, runs, found))),
        section("Arms", _table("Arms", arms_table(plan), "figures runs")),
        section("Certificate", facts_table(fact(name, value) for name, value in facts(plan, runs).items())),
    ]
    return document(
        title(plan),
        headline="compared",
        kind="recipes compared",
        summary=subtitle(plan, runs),
        parts=parts,
        made=_hashes(plan, runs),
        css=CSS,
    )


def result_page(
    result: Result, plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome], remarks: Sequence[str]
) -> Html:
    """The whole document of a comparison over one recipe, its answer first."""
    notes = join(fill('<p class="remark">{remark}</p>', remark=remark) for remark in (*remarks, result.how_to_read))
    first, *others = (section(caption, _table(caption, rows)) for caption, rows in result.tables)
    parts = [
        fill('<p class="verdict">{answer}</p>', answer=result.answer),
        section("Picture", result.drawn),
        first,
        *others,
        section("Remarks", notes),
        section("Each seed", _table("Final validation loss", [row[:-1] for row in seeds_table(plan, runs, found)])),
        section("Arms", _table("Arms", arms_table(plan), "figures runs")),
        section("Certificate", facts_table(fact(name, value) for name, value in facts(plan, runs).items())),
    ]
    return document(
        result.title,
        headline=result.kind,
        kind=result.kind,
        summary=subtitle(plan, runs),
        parts=parts,
        made=_hashes(plan, runs),
        css=CSS,
    )


def _hashes(plan: Comparison, runs: Sequence[Sequence[Run]]) -> Html:
    hashes = join(
        fill("<p>{place} {sha256}</p>", place=f"{arm.label}/seed-{run.seed}", sha256=run.sha256)
        for arm, of_arm in zip(plan.arms, runs, strict=True)
        for run in of_arm
        if run.sha256
    )
    return folded("SHA-256 of every metrics.jsonl", fill('<div class="hash">{hashes}</div>', hashes=hashes))


def _table(caption: str, rows: Sequence[Sequence[str]], kind: str = "figures") -> Html:
    return tables.table(caption, rows[0], rows[1:], kind)


def text(
    plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome], remarks: Sequence[str], picture: str
) -> str:
    """The same for a README or a pull request, its answer in the heading; `picture`: the name of the file beside it."""
    tables_of = results_table(found), costs_table(plan, found), seeds_table(plan, runs, found), arms_table(plan)
    results, costs, seeds, arms = (markdown.table(head, rows) for head, *rows in tables_of)
    parts = [f"# {markdown.text(answer(plan, found), 1000)}"]
    parts += [markdown.text(f"{title(plan)} · {subtitle(plan, runs)}"), results]
    parts += [markdown.text(remark) for remark in remarks]
    parts += [f"![Validation losses and differences]({quote(picture)})", costs, seeds, arms]
    parts += [markdown.text(HOW_TO_READ, 2000), markdown.table(["", ""], list(facts(plan, runs).items()))]
    return "\n\n".join(parts) + "\n"


def result_text(
    result: Result,
    plan: Comparison,
    runs: Sequence[Sequence[Run]],
    found: Sequence[Outcome],
    remarks: Sequence[str],
    picture: str,
) -> str:
    """The same for a README or a pull request, its answer in the heading."""
    parts = [f"# {markdown.text(result.answer, 600)}", markdown.text(f"{result.title} · {subtitle(plan, runs)}")]
    parts += [markdown.table(head, rows) for _, (head, *rows) in result.tables[:1]]
    parts += [f"![{markdown.text(result.title)}]({quote(picture)})"]
    parts += [markdown.table(head, rows) for _, (head, *rows) in result.tables[1:]]
    parts += [markdown.text(remark, 600) for remark in remarks]
    for head, *rows in ([row[:-1] for row in seeds_table(plan, runs, found)], arms_table(plan)):
        parts.append(markdown.table(head, rows))
    parts += [markdown.text(result.how_to_read, 2000), markdown.table(["", ""], list(facts(plan, runs).items()))]
    return "\n\n".join(parts) + "\n"
