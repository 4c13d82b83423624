"""COPA. In: a model and premises; out: how often it finds the right one of two causes or effects likelier."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.choices import ACC, Example, Line, evaluate_choices, simple
from regpt2.evals.scoring.context import EvalContext, Figures

DESCRIPTION = "COPA, validation: 100 premises, each with two causes or effects"
PROTOCOLS = {"acc": f"{ACC}; 'PREMISE because' or 'PREMISE therefore', then the choice after two spaces, as there"}
ASSETS = (
    Asset(
        "COPA.zip",
        "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
        "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f",
        licence="BSD 2-clause",
        other_names=("val.jsonl", "copa.jsonl"),
    ),
)
MEMBER = "COPA/val.jsonl"
FIELDS = "premise, choice1, choice2, question, label (or query, choices, gold)"
CONNECTORS = {"cause": "because", "effect": "therefore"}


def evaluate(context: EvalContext) -> Figures:
    """`acc` with its standard error, and `count`."""
    return evaluate_choices(context, ASSETS[0], _example, FIELDS, name="copa", member=MEMBER, norm=False)


def _example(record: Line) -> Example:
    if example := simple(record):
        return example
    premise = record["premise"].strip()[:-1]  # without its full stop
    choices = [record["choice1"], record["choice2"]]
    lowered = [f" {choice[0].lower()}{choice[1:]}" for choice in choices]  # the harness puts a space of its own before
    return Example(f"{premise} {CONNECTORS[record['question']]}", lowered, int(record["label"]))
