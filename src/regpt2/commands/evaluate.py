"""Measure a model. In: a model and names of evaluations; out: figures beside published ones, printed and as JSON.

regpt2 evaluate runs/gpt2_124m --data DIR
regpt2 evaluate hf:gpt2 --evals hellaswag lambada
regpt2 evaluate runs/gpt2_124m --evals paper --out paper.json
"""

from regpt2.base.options import parse
from regpt2.base.shelves import extended, words_after
from regpt2.evals.measuring.measure import EvaluateOptions, expanded, measure


def main(arguments: list[str]) -> int:
    """`regpt2 evaluate MODEL [options]`: 1 if an evaluation failed."""
    kind = extended(EvaluateOptions, "evals", expanded(words_after(arguments, "--evals")))
    return 1 if measure(parse(kind, arguments, "regpt2 evaluate"), shown=True).failed else 0
