"""enwik8. In: a model and 100,000,000 bytes of Wikipedia's XML; out: bits per byte of the last 5,000,000."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import score_last_bytes

N_TEST_BYTES = 5_000_000

DESCRIPTION = "enwik8, its last 5,000,000 bytes (Wikipedia with markup): bits per byte, as in the GPT-2 paper's table"
PROTOCOLS = {
    "bits_per_byte": "bits / bytes of the last 5,000,000 bytes as they are, characters cut in two left out of both",
}
ASSETS = (
    Asset(
        "enwik8.zip",
        "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        licence="CC BY-SA 3.0",
        other_names=("enwik8",),
    ),
)


def evaluate(context: EvalContext) -> Figures:
    """`bits_per_byte`, and how many `tokens` and `bytes` it is of. `limit` counts windows."""
    score = score_last_bytes(context, ASSETS[0], N_TEST_BYTES, name="enwik8")
    return {"bits_per_byte": score.bits, "tokens": score.n_tokens, "bytes": score.n_units}
