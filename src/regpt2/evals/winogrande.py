"""WinoGrande. In: a model, sentences with a blank; out: how often the right name makes the rest of it likelier."""

from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.choices import Line, accuracy, predictions, read_examples
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.endings import score_endings
from regpt2.evals.scoring.questions import question, read_on_all_ranks

DESCRIPTION = "WinoGrande, validation: 1,267 sentences with a blank and two names for it"
PROTOCOLS = {
    "acc": "share of sentences whose rest after the blank has the lower summed loss with the right name in the blank "
    "(partial evaluation); zero-shot, as in the EleutherAI harness 0.4",
}
ASSETS = (
    Asset(
        "winogrande_1.1.zip",
        "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
        "3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318",
        licence="CC BY 4.0",
        other_names=("dev.jsonl", "winogrande.jsonl"),
    ),
)
MEMBER = "winogrande_1.1/dev.jsonl"
FIELDS = "sentence with a _, option1, option2, answer 1 or 2"


def evaluate(context: EvalContext) -> Figures:
    """`acc` with its standard error, and `count`."""

    def read() -> list[tuple[list[str], str, int]]:
        path = find(ASSETS[0], "winogrande", context.files)
        return read_examples(path, _example, FIELDS, limit=context.limit, member=MEMBER)

    examples = read_on_all_ranks(context, "winogrande", read)
    tokenizer = context.need_tokenizer()
    questions = [question(tokenizer, start, [f" {rest}"]) for starts, rest, _ in examples for start in starts]
    nats = score_endings(context, "winogrande", questions).nats.view(-1, 2)  # (N, 2): with each name
    gold = [right for _, _, right in examples]
    return {**accuracy("acc", predictions(nats), gold), "count": len(examples)}


def _example(record: Line) -> tuple[list[str], str, int]:
    """The two beginnings, the rest that both have, and which beginning is right."""
    before, blank, rest = record["sentence"].partition("_")
    if not blank:
        raise ValueError("no blank")
    return [before + record["option1"], before + record["option2"]], rest.strip(), ("1", "2").index(record["answer"])
