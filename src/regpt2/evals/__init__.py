"""SHELF: one file per evaluation; the file name is the name on the command line.

Every rank calls `evaluate`, with the model in eval mode and without gradients, and gets the same figures. Its sums over
ranks (`sum_over_ranks` in evals/scoring/context.py) are the same on every rank, and reached also by one that fails, so
that none is left waiting. Own options are in `context.options`. Published numbers are in references/scores.toml.
"""

from regpt2.base.shelves import Contract
from regpt2.evals.scoring.context import EvalContext, Figures

__all__ = ["EvalContext", "Figures"]

CONTRACT = Contract(
    required={
        "evaluate": "(context) -> dict[str, float]",
        "PROTOCOLS": dict,  # for each metric how it is measured, in a line
    },
    optional={
        "DESCRIPTION": str,  # what it measures, in a line
        "ASSETS": tuple,  # each an Asset: data that it needs beyond the validation split
        "PARTS": tuple,  # names of parts that can be measured alone: `context.part` is one of them, or empty
    },
)
