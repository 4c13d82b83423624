"""BoolQ. In: a model, passages with a yes-or-no question; out: how often the right answer is the likelier one."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.choices import ACC, Example, Line, evaluate_choices, simple
from regpt2.evals.scoring.context import EvalContext, Figures

DESCRIPTION = "BoolQ, validation: 3,270 yes-or-no questions about a passage (always yes: 62.2 %)"
PROTOCOLS = {"acc": f"{ACC}; prompt 'TITLE -- PASSAGE\\nQuestion: ...?\\nAnswer:', as SuperGLUE words the passage"}
ASSETS = (
    Asset(
        "dev.jsonl",
        "https://storage.googleapis.com/boolq/dev.jsonl",
        "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
        licence="CC BY-SA 3.0",
        other_names=("boolq.jsonl", "val.jsonl"),
    ),
)
FIELDS = "passage, question, answer (or query, choices, gold)"


def evaluate(context: EvalContext) -> Figures:
    """`acc` with its standard error, and `count`."""
    return evaluate_choices(context, ASSETS[0], _example, FIELDS, name="boolq", norm=False)


def _example(record: Line) -> Example:
    if example := simple(record):
        return example
    passage = f"{record['title']} -- {record['passage']}" if "title" in record else record["passage"]
    yes = record["answer"] if "answer" in record else record["label"]
    return Example(f"{passage}\nQuestion: {record['question']}?\nAnswer:", ("no", "yes"), int(yes))
