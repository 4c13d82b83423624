"""Look inside a model. In: a model; out: its tensors, nearest tokens and attention in words; with --out also as a page.

regpt2 explore hf:gpt2
regpt2 explore runs/gpt2_124m --out look        also writes look/explore.html, and its pictures as PNG
regpt2 explore hf:gpt2 --tokens " king" " Monday" --prompt "When Mary and John went out, Mary"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import say
from regpt2.base.errors import Problem
from regpt2.base.options import parse
from regpt2.exploring.measure import DEFAULT_PROMPT, Explored, measure
from regpt2.exploring.page import write_page
from regpt2.exploring.terminal import describe
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.sampling.tokenizer import tokenizer_of


@dataclass(frozen=True)
class ExploreOptions:
    """Look inside a model: its tensors, which tokens it treats alike, what its attention heads look at."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format, hf:gpt2, or builtin:novels."""
    out: Path | None = None
    """A folder for explore.html, which opens offline, and its pictures: wpe, wte and attention maps, as PNG."""
    tokens: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens whose nearest ones to show: " king" " Monday". Default: a few common ones of the vocabulary."""
    prompt: str | None = None
    """The text to show attention for; of a long one its beginning. Default: a text that repeats itself."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 explore`."""
    options = parse(ExploreOptions, argv, "regpt2 explore")
    found = explore(load_model(options.model), options.tokens, options.prompt)
    say(describe(found))
    if options.out is not None:
        pictures = write_page(found, options.out)
        say(f"\nWrote {options.out / 'explore.html'}, and beside it {', '.join(pictures)} as PNG.")
    return 0


def explore(loaded: LoadedModel, words: Sequence[str] | None = None, prompt: str | None = None) -> Explored:
    """What there is to see in a model. Without its tokenizer, tokens and attention are left out.

    Raises:
        UsageError: one of the words is not a single token, or the prompt is empty.
        Problem: words or a prompt are given, and the tokenizer is not available.
    """
    tokenizer, no_text = None, ""
    try:
        tokenizer = tokenizer_of(loaded)
    except Problem as problem:
        if words is not None or prompt is not None:
            raise
        no_text = str(problem)
    if tokenizer is not None and words is None and prompt is None and not tokenizer.can_encode(DEFAULT_PROMPT):
        tokenizer, no_text = None, f"The model has no tokens for {DEFAULT_PROMPT!r}: give a text to --prompt."
    return measure(loaded, tokenizer, words, prompt, no_text)
