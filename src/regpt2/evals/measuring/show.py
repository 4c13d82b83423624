"""Results on the screen. In: what was measured; out: lines with protocols and published figures, the paper's table."""

from typing import Any

from regpt2.base.console import figure, say
from regpt2.evals.measuring.core_table import core_table
from regpt2.references.scores import PAPER, Reference, nearest, references_for

# The table of the GPT-2 paper, column by column: its head, the evaluation, the metric.
PAPER_TABLE = (
    ("LAMBADA ppl", "lambada", "perplexity"),
    ("LAMBADA acc", "lambada", "accuracy"),
    ("CBT-CN", "cbt", "cn_accuracy"),
    ("CBT-NE", "cbt", "ne_accuracy"),
    ("WikiText2", "wikitext", "wikitext2_perplexity"),
    ("PTB", "ptb", "perplexity"),
    ("enwik8", "enwik8", "bits_per_byte"),
    ("text8", "text8", "bits_per_character"),
    ("WikiText103", "wikitext", "wikitext103_perplexity"),
    ("1BW", "one_billion_words", "perplexity"),
)


def show_result(name: str, result: dict[str, Any], n_params: int) -> None:
    """One evaluation: each metric with its standard error and protocol, published numbers of this size beside it."""
    count = result.get("count", result.get("tokens"))
    say(f"{name}" + (f", {count:,.0f} {'examples' if 'count' in result else 'tokens'}" if count else ""))
    is_core = name.partition(".")[0] == "core"
    if is_core:
        say(core_table(result))
    for metric, protocol in {} if is_core else result["protocol"].items():
        stderr = result.get(f"{metric}_stderr")
        spread = "" if stderr is None else f" +- {stderr:.2g}"
        say(f"  {metric:<22} {_number(result[metric]) + spread:<20} {protocol}")
        for one in nearest([Reference(**kept) for kept in result["references"].get(metric, ())], n_params):
            say(f"  {'':<22} {_number(one.value):<20} {one.model}: {one.source}")
    for metric, difference in result.get("fp32_check", {}).get("difference", {}).items():
        if difference:
            say(f"  {metric}: {difference:+.2g} against fp32 on the first {result['fp32_check']['examples']}")


def paper_table(results: dict[str, Any]) -> str:
    """This model's row of the GPT-2 paper's table 3, above the paper's own rows."""
    rows: dict[str, list[float | None]] = {
        "this model": [results.get(name, {}).get(metric) for _, name, metric in PAPER_TABLE]
    }
    for column, (_, name, metric) in enumerate(PAPER_TABLE):
        for one in (one for one in references_for(name, metric) if one.source.startswith(PAPER)):
            rows.setdefault(f"{one.model}, paper", [None] * len(PAPER_TABLE))[column] = one.value
    scales = [100 if "accuracy" in metric else 1 for _, _, metric in PAPER_TABLE]  # the paper prints percent
    cells = {"": [head for head, _, _ in PAPER_TABLE]} | {
        row: ["-" if value is None else f"{scale * value:.2f}" for scale, value in zip(scales, values, strict=True)]
        for row, values in rows.items()
    }
    return "\n".join(f"{row:<20}" + "".join(f"{cell:>13}" for cell in line) for row, line in cells.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else figure(value, 5)
