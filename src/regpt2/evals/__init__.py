"""SHELF: one file per evaluation; the file name is the name on the command line.

Each entry has

    DESCRIPTION                                what it measures, in a line
    PROTOCOLS: dict[str, str]                  for each metric how it is measured, in a line
    ASSETS: tuple[Asset, ...]                  data that it needs beyond the validation split; () = none
    evaluate(context: EvalContext) -> Figures  every rank calls it and gets the same figures

Its reductions over ranks (`scoring.context.sum_over_ranks`) are the same on every rank, and reached also by one that
fails, so that none is left waiting. Published numbers beside its metrics are in references/scores.toml, by their names.
"""

from regpt2.evals.scoring.context import EvalContext, Figures

__all__ = ["EvalContext", "Figures"]
