"""PIQA. In: a model and everyday goals; out: how often it finds the right one of two ways to reach them likelier."""

import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.choices import ACC, ACC_NORM, Example, Line, evaluate_choices, simple
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import read_text

DESCRIPTION = "PIQA, validation: 1,838 everyday goals, each with two ways to reach it"
PROTOCOLS = {"acc": f"{ACC}; prompt 'Question: GOAL\\nAnswer:'", "acc_norm": ACC_NORM}
ASSETS = (
    Asset(
        "physicaliqa-train-dev.zip",
        "https://storage.googleapis.com/ai2-mosaic/public/physicaliqa/physicaliqa-train-dev.zip",
        "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
        licence="AFL 3.0",
        other_names=("dev.jsonl", "valid.jsonl", "piqa.jsonl"),
    ),
)
MEMBER = "physicaliqa-train-dev/dev.jsonl"
LABELS = "dev-labels.lst"  # beside it
FIELDS = "goal, sol1, sol2, label (or query, choices, gold)"


def evaluate(context: EvalContext) -> Figures:
    """`acc` and `acc_norm` with their standard errors, and `count`."""

    @cache
    def labels() -> Iterator[str]:
        return iter(_labels(find(ASSETS[0], "piqa", context.files)))

    def wording(record: Line) -> Example:
        if example := simple(record, "\nAnswer:"):
            return example
        label = record["label"] if "label" in record else next(labels(), None)
        if label is None:
            raise ValueError(f"no label, here or in a file {LABELS} beside it")
        return Example(f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), int(label))

    return evaluate_choices(context, ASSETS[0], wording, FIELDS, name="piqa", member=MEMBER)


def _labels(path: Path) -> list[str]:
    """One for each example, from the archive or from the file beside `path`; none where there is no such file."""
    if zipfile.is_zipfile(path):
        return read_text(path, MEMBER.replace("dev.jsonl", LABELS)).split()
    beside = path.with_name(LABELS)
    return read_text(beside, "").split() if beside.is_file() else []
