"""HellaSwag's scenes. In: a record of its file; out: the scene as lm-evaluation-harness words it."""

import re

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.choices import Example, Line

HELLASWAG = Asset(
    "hellaswag_val.jsonl",
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    licence="MIT",
    other_names=("hellaswag_val.processed.jsonl.xz", "hellaswag_val.bin"),
)


def is_processed(record: Line) -> bool:
    """Had the file's text already been cleaned of [tags]? Then its two parts are no longer apart."""
    return "ctx_a" not in record and "query" in record


def harness_scene(record: Line) -> Example:
    """`ACTIVITY: context`, cleaned of [tags], and its four endings."""
    endings, label = record["endings"], int(record["label"])
    if is_processed(record):
        return Example(record["query"], endings, label)
    prompt = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Example(_cleaned(prompt), [_cleaned(ending) for ending in endings], label)


def _cleaned(text: str) -> str:
    """As the harness cleans it: WikiHow's scenes hold tags, [title] between heading and text and others."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
