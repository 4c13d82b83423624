"""ARC-Challenge. In: a model and grade-school science questions; out: how often it finds the right answer likeliest."""

from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.choices import ACC, ACC_NORM, Example, Record, ai2, evaluate_choices, read_examples
from regpt2.evals.scoring.context import EvalContext, Figures

DESCRIPTION = "ARC-Challenge, test: 1,172 science questions, mostly with four answers"
PROTOCOLS = {"acc": f"{ACC}; prompt 'Question: ...\\nAnswer:'", "acc_norm": ACC_NORM}
# It is served in an archive of 680 MB, nearly all of which is another corpus.
ASSETS = (Asset("ARC-Challenge-Test.jsonl", "", "", licence="CC BY-SA 4.0", other_names=("arc_challenge.jsonl",)),)
FIELDS = "question, choices, answerKey (or query, choices, gold)"


def evaluate(context: EvalContext) -> Figures:
    """`acc` and `acc_norm` with their standard errors, and `count`."""

    def read() -> list[Example]:
        path = find(ASSETS[0], "arc_challenge", context.files)
        return read_examples(path, _example, FIELDS, limit=context.limit)

    return evaluate_choices(context, "arc_challenge", read)


def _example(record: Record) -> Example:
    return ai2(record, "Question: ", "\nAnswer:")
