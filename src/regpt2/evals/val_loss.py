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
from regpt2.scoring.assets import Asset
from regpt2.scoring.context import EvalContext, Figures, scoring, sum_over_ranks

DESCRIPTION = "loss on the validation split of a prepared data folder: nats, perplexity, bits per byte"
PROTOCOLS = {
    "loss": "mean nats per token over the first val_tokens of the split, in windows of seq_len that do not overlap",
    "perplexity": "exp(loss)",
    "bits_per_byte": "summed bits / bytes of text, <|endoftext|> scored but without bytes",
}
ASSETS: tuple[Asset, ...] = ()


def evaluate(context: EvalContext) -> Figures:
    """`loss` (nats per token), `perplexity`, `bits_per_byte` (None where the vocabulary is not at hand), `tokens`.

    Raises:
        UsageError: no data folder was given.
        DataError: the validation split is missing or shorter than one window.
    """
    sums = sum_over_ranks(context, "val_loss", lambda: _score_mine(context), torch.zeros(3))
    nats, n_bytes, n_targets = sums.tolist()
    loss = nats / n_targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
        "tokens": int(n_targets),
    }


def n_val_windows(context: EvalContext, tokens: TokenStream) -> int:
    """How many windows are scored, over all ranks.

    Raises:
        DataError: the split is shorter than one.
    """
    n_windows = min(max(1, context.val_tokens // context.seq_len), (tokens.n_tokens - 1) // context.seq_len)
    if n_windows < 1:
        raise DataError(
            f"{context.data}: the validation split has {tokens.n_tokens:,} tokens, one window needs "
            f"{context.seq_len + 1:,}; prepare with a larger --val-fraction or lower the sequence length."
        )
    return n_windows


def _score_mine(context: EvalContext) -> torch.Tensor:
    """Summed nats, summed bytes and number of the target tokens in this rank's windows."""
    if context.data is None:
        raise UsageError("val_loss needs a prepared data folder: --data DIR.")
    world, T = context.world, context.seq_len
    sums = torch.zeros(3, dtype=torch.float64)
    with scoring(context), open_tokens(context.data, "val") as tokens:
        byte_lengths = _byte_lengths(tokens)
        windows = range(n_val_windows(context, tokens))
        # Ranks take whole batches in turn: the loss of a batch is the same bits wherever it is computed.
        for first in range(world.rank * context.batch, len(windows), world.size * context.batch):
            context.on_batch()
            rows = np.stack([tokens.read(w * T, T + 1) for w in windows[first : first + context.batch]])
            window = torch.from_numpy(rows.astype(np.int64)).to(world.device)  # (B, T + 1)
            loss = context.model(window[:, :-1], window[:, 1:])  # the mean over this batch alone
            sums[0] += loss.cpu().double() * rows[:, 1:].size
            sums[1] += 0 if byte_lengths is None else int(byte_lengths[rows[:, 1:]].sum())
            sums[2] += rows[:, 1:].size
    return sums


def _byte_lengths(tokens: TokenStream) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]] | None:
    try:
        return load_tokenizer(tokens.tokenizer_name).token_bytes()
    except Problem:
        return None
