"""What an evaluation may use. In: a model, the ranks, paths of data; out: sums over ranks, also if a rank fails."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regpt2.base.errors import Problem, UsageError
from regpt2.base.ranks.world import World
from regpt2.data.mixture import Share
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.twins.cpu import packed_if_faster

LONG_SEQUENCE = 8192  # tokens; the memory of a batch does not grow with longer ones

Figures = dict[str, float | None]
"""A metric's name and value; beside `<metric>` its standard error `<metric>_stderr`; `count` examples or tokens."""


@dataclass(frozen=True)
class EvalContext:
    """What an evaluation may use. It changes neither weights nor data order."""

    model: nn.Module
    """forward(ids, targets=None): logits, or the mean loss in nats; the plain module in the compute type."""
    world: World
    data: Path | None
    """The prepared data folder."""
    seq_len: int
    batch: int
    """Sequences of `seq_len` tokens per forward pass; shorter ones are packed to as many, long ones are fewer."""
    val_tokens: int
    """How many target tokens of the validation split to score, from its beginning."""
    on_batch: Callable[[], None] = lambda: None
    """Called at each batch: reports progress, and raises `Stopped` when a signal asked the run to stop."""
    on_part: Callable[[str, float], None] = lambda name, value: None
    """Called on every rank when a part of an evaluation is done, with its name and first figure."""
    tokenizer: Tokenizer | Callable[[], Tokenizer] | None = None
    """The model's, or a function that finds it when needed; None if unknown."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Local data by name of the evaluation: a file, or a folder of several."""
    mix: tuple[Share, ...] = ()
    """Instead of `data`: the data sets of a run, and their weights."""
    limit: int = 0
    """Only the first N examples; 0 = all."""
    brief: bool = False
    """While training: only the one protocol that the report draws."""
    part: str = ""
    """Of an entry with PARTS, the only one to measure: `core.piqa`; empty = all."""
    options: Any = None
    """The entry's own `Options`, if it has any."""

    @property
    def gpt(self) -> LanguageModel:
        """The plain model within `model`: for its hidden states, its head, its cache."""
        return next(module for module in self.model.modules() if isinstance(module, LanguageModel))

    @property
    def context_size(self) -> int:
        """The most tokens of a context with its ending: the larger of the training length and `seq_len`."""
        return max(self.seq_len, self.gpt.context_size)

    @property
    def pass_tokens(self) -> int:
        """Tokens of a forward pass: `batch` sequences, of which 8,192 tokens count at most; at least one sequence."""
        return max(self.seq_len, self.batch * min(self.seq_len, LONG_SEQUENCE))

    def rows_of(self, n_tokens: int) -> int:
        """How many sequences of `n_tokens` tokens a forward pass takes."""
        return max(1, self.pass_tokens // n_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""
        return getattr(self.model, "dtype", None) or next(self.model.parameters()).dtype

    def scoring_gpt(self) -> LanguageModel:
        """The model for many passes: its matrices are rounded to the compute type and packed once, not per pass.

        A copy, if they have another type or packing is faster; it shares the embeddings, which are summed unrounded.
        """
        gpt, dtype = self.gpt, self.dtype
        if next(gpt.h.parameters()).dtype != dtype:
            embeddings = {id(module.weight) for module in gpt.modules() if isinstance(module, nn.Embedding)}
            memo = {
                id(p): p if id(p) in embeddings else nn.Parameter(p.detach().to(dtype), requires_grad=False)
                for p in gpt.parameters()
            }
            gpt = copy.deepcopy(gpt, memo)
        return packed_if_faster(gpt, n_tokens=1000, rows=1000)  # or any larger numbers

    def need_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            Problem: it is unknown or not available, so no text can be scored.
        """
        if self.tokenizer is None:
            raise UsageError("the model does not say which tokenizer it was trained with: no text can be scored.")
        return self.tokenizer if isinstance(self.tokenizer, Tokenizer) else self.tokenizer()


def sum_over_ranks(context: EvalContext, name: str, score_mine: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The sum over ranks of what `score_mine` returns on each: float64, of the shape of `like`.

    A rank that fails joins the sum too, so that no rank waits for it; then every rank raises.

    Raises:
        Exception: what this rank failed with.
        Problem: another rank failed.
    """
    total = torch.zeros(like.numel() + 1, dtype=torch.float64)  # the last counts failures
    error: Exception | None = None
    try:
        total[:-1] = score_mine().flatten()
    except Exception as e:
        total[-1], error = 1.0, e
    total = context.world.sum_on_cpu(total)
    if total[-1] > 0:
        raise error or Problem(f"{name} failed on {int(total[-1])} other rank(s)")
    return total[:-1].view(like.shape)


@contextmanager
def scoring(context: EvalContext) -> Iterator[None]:
    """In eval mode and without gradients; restores the model's mode."""
    was_training = context.model.training
    context.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        context.model.train(was_training)
