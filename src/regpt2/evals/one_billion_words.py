"""One Billion Word Benchmark. In: a model and the first held-out part; out: perplexity per original word."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import score_sentences

_FOLDER = "1-billion-word-language-modeling-benchmark-r13output"
_MEMBER = f"{_FOLDER}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"

DESCRIPTION = "One Billion Word Benchmark, held-out part 0: perplexity per original word, as in the GPT-2 paper's table"
PROTOCOLS = {
    "perplexity": "exp(nats of the sentences, detokenized, as one text / original words); line ends are no words",
}
# Served only within an archive of 1.8 GB (statmt.org/lm-benchmark): give the archive, or this file of 1 MB.
ASSETS = (Asset("news.en.heldout-00000-of-00050", "", "", other_names=(f"{_FOLDER}.tar.gz", _MEMBER)),)


def evaluate(context: EvalContext) -> Figures:
    """`perplexity`, and how many `tokens` and `words` it is of. `limit` counts sentences."""
    return score_sentences(context, ASSETS[0], _MEMBER, name="one_billion_words")
