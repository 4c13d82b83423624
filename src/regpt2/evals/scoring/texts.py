"""How well a model predicts long texts. In: documents of token ids; out: summed nats per text, and per word or byte.

Each document has <|endoftext|> before it and is scored in windows of seq_len that do not overlap, every token exactly
once; the last window begins earlier, so that it is full: lm-evaluation-harness's rolling windows. (Windows that do
overlap give lower figures than the paper's: GPT-2 large has 19.4 on WikiText-2 without, 16.4 with half a window,
transformers' page on perplexity; the paper says 19.9.)

A text has no standard error: its tokens depend on each other, and the test set is the whole of what is measured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.errors import Problem, UsageError
from regpt2.evals.scoring.context import EvalContext, scoring, sum_over_ranks
from regpt2.model.language_model import LanguageModel

# B windows, T = seq_len tokens, n scored positions, C = n_embd, V = vocab_size

Ids = npt.NDArray[np.uint16]
_LOGIT_BYTES = 1 << 27  # of fp32 logits alive at once


@dataclass(frozen=True)
class Text:
    """What is scored: documents, none of which is seen from another, and how many units they hold."""

    documents: Sequence[Ids]
    n_units: int
    """What the loss is divided by: words, bytes, characters, tokens."""


@dataclass(frozen=True)
class TextScore:
    """How well a text was predicted."""

    nats: float
    n_tokens: int
    n_units: int

    @property
    def perplexity(self) -> float | None:
        """exp(nats per unit); None for an empty text."""
        return math.exp(min(self.nats / self.n_units, 700.0)) if self.n_units else None

    @property
    def token_perplexity(self) -> float | None:
        """exp(nats per token); None for an empty text."""
        return math.exp(min(self.nats / self.n_tokens, 700.0)) if self.n_tokens else None

    @property
    def bits(self) -> float | None:
        """Bits per unit; None for an empty text."""
        return self.nats / math.log(2) / self.n_units if self.n_units else None


@dataclass(frozen=True)
class Score:
    """How well a model predicted a text, every token once."""

    nats: float
    """The loss, summed over all tokens."""
    n_tokens: int
    n_bytes: int
    """Of the text in UTF-8."""

    @property
    def nats_per_token(self) -> float:
        """The mean loss, as training reports it."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte: it compares models with different tokenizers."""
        return self.nats / math.log(2) / self.n_bytes

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token)."""
        return math.exp(min(self.nats_per_token, 700.0))


def score_text(context: EvalContext, text: str) -> Score:
    """The score of one text.

    Raises:
        UsageError: it is empty, or has a character that the tokenizer lacks.
    """
    ids = np.asarray(context.need_tokenizer().encode(text), dtype=np.uint16)
    if not len(ids):
        raise UsageError("the text to score is empty.")
    (found,) = score_texts(context, "score", 1, lambda: [Text([ids], len(text.encode()))])
    return Score(found.nats, found.n_tokens, found.n_units)


def score_texts(
    context: EvalContext, name: str, n_texts: int, read: Callable[[], Sequence[Text]]
) -> tuple[TextScore, ...]:
    """The scores of the `n_texts` texts that `read` returns; every rank reads all and scores its share.

    Raises:
        Exception: what reading or scoring failed with on this rank.
        Problem: another rank failed.
    """

    def score_mine() -> Tensor:
        texts = read()
        with scoring(context):
            gpt = context.scoring_gpt()
            # The sizes of a text come from one rank only, because the rows are summed over ranks.
            sizes = [(sum(map(len, text.documents)), text.n_units) for text in texts]
            rows = [
                (*_score_mine(context, gpt, text), *(size if context.world.is_main else (0, 0)))
                for text, size in zip(texts, sizes, strict=True)
            ]
        return torch.tensor(rows, dtype=torch.float64)

    sums = sum_over_ranks(context, name, score_mine, torch.zeros(n_texts, 4))
    for _, n_scored, n_tokens, _ in sums.tolist():
        if n_scored != n_tokens:
            raise Problem(f"{name}: {n_scored:,.0f} of {n_tokens:,.0f} tokens were scored: the ranks read other data.")
    return tuple(TextScore(nats, int(n_tokens), int(n_units)) for nats, n_tokens, _, n_units in sums.tolist())


def _score_mine(context: EvalContext, gpt: LanguageModel, text: Text) -> tuple[float, int]:
    """Summed nats and number of the tokens in this rank's windows."""
    world, start_id = context.world, context.need_tokenizer().start_id
    windows = [window for ids in text.documents for window in _windows(ids, start_id, context.seq_len)]
    nats, n_tokens = 0.0, 0
    # Ranks take whole batches in turn: the loss of a batch is the same bits wherever it is computed.
    rows = context.rows_of(context.seq_len)
    for first in range(world.rank * rows, len(windows), world.size * rows):
        context.on_batch()
        batch = windows[first : first + rows]
        nats += _batch_nats(context, gpt, batch)
        n_tokens += sum(n_new for _, n_new in batch)
    return nats, n_tokens


def _windows(ids: Ids, start_id: int, seq_len: int) -> Iterator[tuple[Ids, int]]:
    """Up to seq_len + 1 tokens, and how many of the last are scored; each token of `ids` is in one window."""
    stream = np.concatenate([np.array([start_id], dtype=ids.dtype), ids])
    for start in range(0, len(ids), seq_len):
        end = min(start + seq_len, len(ids))
        yield stream[max(0, end - seq_len) : end + 1], end - start


def _batch_nats(context: EvalContext, gpt: LanguageModel, batch: Sequence[tuple[Ids, int]]) -> float:
    """Summed nats of the scored tokens of a batch; logits are computed only for those, a chunk at a time."""
    longest = max(len(window) for window, _ in batch)
    rows = np.zeros((len(batch), longest), dtype=np.int64)  # shorter windows end in padding, which is not scored
    is_scored = np.zeros((len(batch), longest - 1), dtype=bool)
    for row, (window, n_new) in enumerate(batch):
        rows[row, : len(window)] = window
        is_scored[row, len(window) - 1 - n_new : len(window) - 1] = True
    where = np.flatnonzero(is_scored)  # on the CPU: on a GPU this would wait for the device
    ids, scored = (torch.from_numpy(array).to(context.world.device) for array in (rows[:, :-1], where))
    hidden = gpt.hidden(ids, dtype=context.dtype).flatten(0, 1)[scored]  # (B, T, C) -> (n, C)
    targets = torch.from_numpy(rows[:, 1:].reshape(-1)[where]).to(context.world.device)  # (n,)
    chunk = max(1, _LOGIT_BYTES // (4 * gpt.config.vocab_size))
    nats = 0.0
    for x, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        logits = gpt.head(x)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats += float(F.cross_entropy(logits, y, reduction="none").cpu().double().sum())
    return nats
