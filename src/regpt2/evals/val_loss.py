"""Validation loss. In: a model and a prepared data folder; out: nats per token, perplexity, bits per byte.

The set is the first `val_tokens` tokens of the validation split in windows of `seq_len`, the same for every batch size
and number of ranks. The sum over all its tokens is divided once, so that a short last batch weighs what it should.
"""

import math

import numpy as np
import torch

from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.data.shards import TokenStream, open_tokens
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import EvalContext

DESCRIPTION = "loss on the validation split of a prepared data folder: nats, perplexity, bits per byte"


def evaluate(context: EvalContext) -> dict[str, float | None]:
    """`loss` (nats per token), `perplexity`, `bits_per_byte` (None where the vocabulary is not at hand), `tokens`.

    Raises:
        UsageError: no data folder was given.
        DataError: the validation split is shorter than one window.
    """
    if context.data is None:
        raise UsageError("val_loss needs a prepared data folder: --data DIR.")
    tokens = open_tokens(context.data, "val")
    try:
        n_windows = min(max(1, context.val_tokens // context.seq_len), (tokens.n_tokens - 1) // context.seq_len)
        if n_windows < 1:
            raise DataError(
                f"{context.data}: the validation split has {tokens.n_tokens:,} tokens, one window needs "
                f"{context.seq_len + 1:,}; prepare with a larger --val-fraction or lower batch.seq_len."
            )
        nats, n_bytes = _score(context, tokens, n_windows)
    finally:
        tokens.close()
    n_targets = n_windows * context.seq_len
    loss = nats / n_targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
        "tokens": n_targets,
    }


@torch.no_grad()
def _score(context: EvalContext, tokens: TokenStream, n_windows: int) -> tuple[float, int]:
    """Summed nats and summed bytes of the target tokens of windows 0 to n_windows - 1, over all ranks."""
    world, T = context.world, context.seq_len
    byte_lengths = _byte_lengths(tokens)
    totals = torch.zeros(2, dtype=torch.float64)
    mine = range(world.rank, n_windows, world.size)
    was_training = context.model.training
    context.model.eval()
    try:
        for i in range(0, len(mine), context.batch):
            rows = [tokens.read(w * T, T + 1) for w in mine[i : i + context.batch]]
            window = torch.from_numpy(np.stack(rows).astype(np.int64)).to(world.device)  # (B, T + 1)
            loss = context.model(window[:, :-1], window[:, 1:])  # the mean over this batch alone
            totals[0] += loss.cpu().double() * (len(rows) * T)
            if byte_lengths is not None:
                totals[1] += int(byte_lengths[np.stack(rows)[:, 1:]].sum())
    finally:
        context.model.train(was_training)
    totals = world.sum_on_cpu(totals)
    return float(totals[0]), int(totals[1])


def _byte_lengths(tokens: TokenStream) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]] | None:
    try:
        return load_tokenizer(tokens.tokenizer_name).token_bytes()
    except Problem:
        return None
