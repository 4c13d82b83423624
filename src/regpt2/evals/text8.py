"""text8. In: a model and 100,000,000 letters and spaces; out: bits per character of the last 5,000,000."""

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import score_last_bytes

N_TEST_CHARACTERS = 5_000_000

DESCRIPTION = (
    "text8, its last 5,000,000 characters (a to z and space): bits per character, as in the GPT-2 paper's table"
)
PROTOCOLS = {"bits_per_character": "bits / characters of the last 5,000,000 characters as they are"}
ASSETS = (
    Asset(
        "text8.zip",
        "https://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        licence="CC BY-SA 3.0",
        other_names=("text8",),
    ),
)


def evaluate(context: EvalContext) -> Figures:
    """`bits_per_character`, and how many `tokens` and `characters` it is of. `limit` counts windows."""
    score = score_last_bytes(context, ASSETS[0], N_TEST_CHARACTERS, name="text8")  # ASCII: a character is a byte
    return {"bits_per_character": score.bits, "tokens": score.n_tokens, "characters": score.n_units}
