"""OpenBookQA. In: a model and elementary science questions; out: how often it finds the right answer likeliest."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.choices import ACC, ACC_NORM, ai2, evaluate_choices
from regpt2.evals.scoring.context import EvalContext, Figures

DESCRIPTION = "OpenBookQA, test: 500 elementary science questions with four answers, without the book"
PROTOCOLS = {"acc": f"{ACC}; the question alone is the prompt", "acc_norm": ACC_NORM}
ASSETS = (
    Asset(
        "OpenBookQA-V1-Sep2018.zip",
        "https://s3-us-west-2.amazonaws.com/ai2-website/data/OpenBookQA-V1-Sep2018.zip",
        "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46",
        licence="Apache 2.0",
        other_names=("test.jsonl", "openbookqa.jsonl"),
    ),
)
MEMBER = "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"
FIELDS = "question, choices, answerKey (or query, choices, gold)"


def evaluate(context: EvalContext) -> Figures:
    """`acc` and `acc_norm` with their standard errors, and `count`."""
    return evaluate_choices(context, ASSETS[0], ai2, FIELDS, name="openbookqa", member=MEMBER)
