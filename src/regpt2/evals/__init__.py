"""SHELF: one file per evaluation; the file name is the name on the command line.

Each entry has `evaluate(context: EvalContext) -> dict[str, float | None]` and a DESCRIPTION of one line. Every rank
calls it and gets the same figures. It has exactly one reduction over ranks, reached also by a rank that fails, so that
no rank is left waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from regpt2.base.world import World


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
    """Sequences per forward pass."""
    val_tokens: int
    """How many target tokens of the validation split to score, from its beginning."""
    on_batch: Callable[[], None] = lambda: None
    """To be called at each batch: it tells that the work moves, and raises `Stopped` when a signal asked to leave."""
