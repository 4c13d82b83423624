"""Validation loss. In: a model and a prepared data folder; out: nats per token, perplexity, bits per byte.

The set is the first `val_tokens` tokens of the validation split in windows of `seq_len`, the same for every batch size
and number of ranks. The sum over all its tokens is divided once, so that a short last batch weighs what it should.
Of conversations only the tokens of the answers are in the sums, as in training: those that the data's mask counts.
Of a mixture each data set is scored; the figures are the mean by its weights, beside the loss of each.
A model with attention's window that is scored in longer windows than 1,024 tokens is scored in those as well, on the
same tokens: with fewer tokens before it each token is harder to foretell, so the two losses are different questions.
"""

import math
from pathlib import Path

import numpy as np
import torch

from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.data.loader import IGNORED
from regpt2.data.mixture import read_shares
from regpt2.data.tokens.shards import TokenStream, open_tokens
from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.context import EvalContext, Figures, scoring, sum_over_ranks
from regpt2.model.language_model import GPT2_CONTEXT, LanguageModel

DESCRIPTION = "loss on the validation split of a prepared data folder: nats, perplexity, bits per byte"
PROTOCOLS = {
    "loss": "mean nats per token over the first val_tokens of the split, in windows of seq_len that do not overlap; "
    "of conversations over the answers' tokens alone",
    "loss_1024": "the same targets in windows of 1,024 tokens, as GPT-2's losses are measured: another question than "
    "`loss`, whose windows are longer here",
    "perplexity": "exp(loss)",
    "bits_per_byte": "summed bits / bytes of text, <|endoftext|> and added tokens scored but without bytes",
}
ASSETS: tuple[Asset, ...] = ()
SHORT = GPT2_CONTEXT  # tokens: the windows in which GPT-2's losses are published


def evaluate(context: EvalContext) -> Figures:
    """`loss` (nats per token), `perplexity`, `bits_per_byte` (None if the vocabulary is not available), `tokens`.

    Of a mixture also `loss_NAME` of each data set; `loss_1024` as PROTOCOLS says.

    Raises:
        UsageError: no data folder was given.
        DataError: the validation split is missing or shorter than one window, or none of its tokens counts.
    """
    if context.data is None and not context.mix:
        raise UsageError("val_loss needs a prepared data folder: --data DIR.")
    shares = context.mix or read_shares(str(context.data), ())
    windowed = any(isinstance(part, LanguageModel) and part.window for part in context.model.modules())
    lengths = [context.seq_len, *[SHORT] * (windowed and context.seq_len > SHORT)]
    sums, *short = sum_over_ranks(
        context,
        "val_loss",
        lambda: torch.stack([torch.stack([_score_mine(context, s.folder, T) for s in shares]) for T in lengths]),
        torch.zeros(len(lengths), len(shares), 3),
    )
    for share, n_counted in zip(shares, sums[:, 2].tolist(), strict=True):
        if not n_counted:
            raise DataError(
                f"{share.folder}: no answer lies in the first tokens of its validation split; raise val_tokens."
            )
    per_token = sums[:, :2] / sums[:, 2:]  # nats and bytes, a row for each data set
    weights = torch.tensor([share.parts for share in shares], dtype=torch.float64)
    weights = weights / weights.sum()
    nats, n_bytes = (weights @ per_token).tolist()
    own = {f"loss_{share.name}": loss for share, loss in zip(shares, per_token[:, 0].tolist(), strict=True)}
    return {
        "loss": nats,
        **({"loss_1024": float(weights @ (short[0][:, 0] / short[0][:, 2]))} if short else {}),
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
        "tokens": int(sums[:, 2].sum()),
        **(own if len(own) > 1 else {}),
    }


def require_window(folder: Path, n_tokens: int, seq_len: int) -> None:
    """Raise a DataError if a validation split is shorter than one window."""
    if n_tokens <= seq_len:
        raise DataError(
            f"{folder}: the validation split has {n_tokens:,} tokens, expected at least {seq_len + 1:,}, for a window "
            f"of seq_len = {seq_len:,} and its last target. Prepare the data again with a larger --val-fraction or "
            "--val-tokens, or lower the sequence length."
        )


def _score_mine(context: EvalContext, folder: Path, T: int) -> torch.Tensor:
    """Summed nats, summed bytes and number of the target tokens that count in this rank's windows of T tokens."""
    world = context.world
    sums = torch.zeros(3, dtype=torch.float64)
    with scoring(context), open_tokens(folder, "val") as tokens:
        byte_lengths = _byte_lengths(tokens)
        require_window(folder, tokens.n_tokens, context.seq_len)
        batches = _batches(context, tokens.n_tokens, T)  # over all ranks
        # Ranks take whole batches in turn: the loss of a batch is the same bits wherever it is computed.
        for starts, T in batches[world.rank :: world.size]:
            context.on_batch()
            rows = np.stack([tokens.read(start, T + 1) for start in starts])
            inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)  # (B, T) each
            if tokens.masks:
                targets[~np.stack([tokens.read_mask(start + 1, T) for start in starts])] = IGNORED
            counted = targets[targets != IGNORED]
            x, y = (torch.from_numpy(np.ascontiguousarray(ids)).to(world.device) for ids in (inputs, targets))
            loss = context.model(x, y)  # the mean over this batch alone
            sums[0] += loss.cpu().double() * counted.size
            sums[1] += 0 if byte_lengths is None else int(byte_lengths[counted].sum())
            sums[2] += counted.size
    return sums


def _batches(context: EvalContext, n_tokens: int, T: int) -> list[tuple[range, int]]:
    """Where the windows of each batch begin, and their length: T, or what is left for the last one.

    Their targets are those of whole windows of `context.seq_len`.
    """
    whole = min(max(1, context.val_tokens // context.seq_len), (n_tokens - 1) // context.seq_len) * context.seq_len
    rest = whole % T
    starts = range(0, whole - rest, T)
    rows = context.rows_of(T)
    batches = [(starts[first : first + rows], T) for first in range(0, len(starts), rows)]
    return [*batches, (range(whole - rest, whole, rest), rest)] if rest else batches


def _byte_lengths(tokens: TokenStream) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]] | None:
    try:
        sizes = tokens.tokenizer().token_bytes()
        n_added = len(tokens.added)  # a mark, not text
        return np.concatenate([sizes[: len(sizes) - n_added], np.zeros(n_added, np.int32)]) if n_added else sizes
    except Problem:
        return None
