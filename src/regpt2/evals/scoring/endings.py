"""Which ending is likeliest? In: contexts with their endings, as ids; out: nats, tokens and greediness of each ending.

A context is computed once: all of its endings use its keys and values. Contexts of one length are computed
together, and so are endings of about one length, so that little is padding. The last token of an ending predicts
nothing and is never computed; logits exist only where a token is scored, a chunk at a time.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError
from regpt2.evals.scoring.context import EvalContext, scoring, sum_over_ranks
from regpt2.model.language_model import LanguageModel

# N questions, E endings of one; Q contexts of c tokens, R endings of T tokens in a pass; n scored tokens, C = n_embd

_MOST_TOKENS = {"cpu": 8192}  # in a batch; more are no faster there, and their keys and values take memory
_ENOUGH_TOKENS = 256  # in a pass: with fewer the matmuls become slow, rather a little padding
_SHORTEST = 0.9  # of the longest ending in a pass, once there are enough tokens
_LOGITS_BYTES = 1 << 27  # alive at once, as if in fp32
_BLOCK_BYTES = 1 << 22  # of fp32 logits on a CPU: they stay in its cache from the first look to the last


@dataclass(frozen=True)
class Question:
    """A context of at least one id, and what may follow it."""

    context: Sequence[int]
    endings: tuple[Sequence[int], ...]
    unscored: tuple[int, ...] = ()
    """How many of each ending's first tokens do not count; empty = all count."""


@dataclass(frozen=True)
class Scored:
    """For each question (N) and each ending (E = the most that a question has)."""

    nats: Tensor
    """(N, E) float64: the sum of -log p over its tokens; +inf where a question has fewer endings."""
    n_tokens: Tensor
    """(N, E) int64: how many of its tokens were scored."""
    greedy: Tensor
    """(N, E) bool: each of its tokens was the likeliest."""


@dataclass(frozen=True)
class _Ending:
    question: int
    number: int
    ids: Sequence[int]
    context: int
    """Which of the batch."""
    first: int
    """Its first token that counts."""


@dataclass(frozen=True)
class _Batch:
    """Contexts of one length, and their endings."""

    contexts: list[Sequence[int]] = field(default_factory=list)
    endings: list[_Ending] = field(default_factory=list)


def score_endings(context: EvalContext, name: str, questions: Sequence[Question]) -> Scored:
    """Score every ending after its context. Every rank calls it, and gets all.

    A context and ending that are too long are cut from the left; of a too long ending only its end is scored.

    Raises:
        CheckpointError: the model's loss is not finite.
    """
    N, E = len(questions), max((len(question.endings) for question in questions), default=0)
    sums = sum_over_ranks(context, name, lambda: _score_mine(context, name, questions, E), torch.zeros(3, N, E))
    n_endings = torch.tensor([len(question.endings) for question in questions], dtype=torch.int64)
    there = torch.arange(E) < n_endings.view(N, 1)  # (N, E)
    if not sums.isfinite().all():
        raise CheckpointError(f"{name}: the model's loss is not finite: its weights hold NaN or infinity.")
    return Scored(sums[0].where(there, torch.inf), sums[1].long(), there & (sums[1] == sums[2]))


def _score_mine(context: EvalContext, name: str, questions: Sequence[Question], E: int) -> Tensor:
    """(3, N, E): nats, tokens and likeliest tokens of the endings in this rank's batches; 0 for those of others."""
    world, most = context.world, context.context_size
    too_long = sum(len(ending) > most for question in questions for ending in question.endings)
    if too_long and world.is_main:
        warn(
            f"{name}: {too_long:,} endings exceed the {most:,} tokens of a context; only their last tokens are scored."
        )
    sums = torch.zeros(3, len(questions), E, dtype=torch.float64)
    most_tokens = context.batch * context.seq_len
    batches = _batches(questions, most, min(most_tokens, _MOST_TOKENS.get(world.device.type, most_tokens)))
    with scoring(context):
        gpt = context.scoring_gpt()
        # Ranks take whole batches in turn: the score of a batch is the same bits wherever it is computed.
        for batch in batches[world.rank :: world.size]:
            for ending, score in _score_batch(context, gpt, batch):
                sums[:, ending.question, ending.number] += score
    return sums


def _batches(questions: Sequence[Question], context_size: int, most_tokens: int) -> list[_Batch]:
    """The work, the same on every rank; the longest contexts first, so that memory runs out early."""
    endings_of: dict[Sequence[int], list[tuple[int, int, Sequence[int], int]]] = defaultdict(list)
    for i, question in enumerate(questions):
        for j, ending in enumerate(question.endings):
            ids: Sequence[int] = (*question.context, *ending)[-(context_size + 1) :]  # the last one is never an input
            n_context = max(1, len(ids) - len(ending))
            n_scored = len(ending) - (question.unscored[j] if question.unscored else 0)
            first = max(0, len(ids) - n_context - n_scored)
            if n_scored:  # one without tokens that count has 0 nats
                endings_of[ids[:n_context]].append((i, j, ids[n_context:], first))
    n_tokens = {ids: len(ids) + sum(len(ending) for _, _, ending, _ in endings_of[ids]) for ids in endings_of}
    batches: list[_Batch] = []
    room = 0
    for shared in sorted(endings_of, key=lambda ids: (-len(ids), n_tokens[ids])):
        if not batches or len(batches[-1].contexts[0]) != len(shared) or n_tokens[shared] > room:
            batches.append(_Batch())
            room = most_tokens
        batch = batches[-1]
        place = len(batch.contexts)
        batch.endings.extend(_Ending(i, j, ending, place, first) for i, j, ending, first in endings_of[shared])
        batch.contexts.append(shared)
        room -= n_tokens[shared]
    return batches


class _SharedContext:
    """One block's keys and values: those of the contexts are kept, then each ending sees those of its own context."""

    mask: Tensor | None = None

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None  # two of (Q, H, c, D)
        self.kept_ids: Tensor | None = None  # (Q, c)
        self.which = torch.empty(0, dtype=torch.int64)  # (R,): the context of each ending in this pass

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (R, H, T, D) -> (R, H, c + T, D)
        if self.kept is None:
            self.kept = k.contiguous(), v.contiguous()  # views would hold the queries too
            return k, v
        before_k, before_v = (kept[self.which] for kept in self.kept)  # two of (R, H, c, D)
        return torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)

    def append_ids(self, ids: Tensor) -> Tensor:  # (R, T) -> (R, c + T)
        if self.kept_ids is None:
            self.kept_ids = ids
            return ids
        return torch.cat([self.kept_ids[self.which], ids], dim=1)


def _score_batch(context: EvalContext, gpt: LanguageModel, batch: _Batch) -> Iterator[tuple[_Ending, Tensor]]:
    """Each ending with its nats, tokens and likeliest tokens (3,), in two parts: its first token, then the others."""
    device, position = context.world.device, len(batch.contexts[0])
    shared = [_SharedContext() for _ in gpt.h]

    def hidden(rows: Sequence[Sequence[int]], start: int) -> Tensor:
        context.on_batch()
        return gpt.hidden(torch.tensor(rows, device=device), list(shared), start, context.dtype)  # (R, T, C)

    last = hidden(batch.contexts, 0)[:, -1]  # (Q, C)
    counted = [ending for ending in batch.endings if not ending.first]
    if counted:
        which = torch.tensor([ending.context for ending in counted], device=device)
        firsts = _score_tokens(gpt, last[which], [ending.ids[0] for ending in counted])  # (3, R)
        yield from zip(counted, firsts.T, strict=True)
    for endings in _passes(batch.endings):
        T = len(endings[0].ids) - 1
        inputs = [[*ending.ids[:-1], *[0] * (T + 1 - len(ending.ids))] for ending in endings]  # padded on the right
        for layer in shared:
            layer.which = torch.tensor([ending.context for ending in endings], device=device)
        begins = [max(1, ending.first) for ending in endings]  # the first token has been scored above
        lengths = [len(ending.ids) - begin for ending, begin in zip(endings, begins, strict=True)]
        # Indices from the CPU: a mask on a GPU would make the host wait for the device.
        rows = enumerate(zip(begins, lengths, strict=True))
        places = [row * T + begin - 1 + i for row, (begin, n) in rows for i in range(n)]
        x = hidden(inputs, position).flatten(0, 1)[torch.tensor(places, device=device)]  # (n, C)
        targets = [token for ending, begin in zip(endings, begins, strict=True) for token in ending.ids[begin:]]
        scores = _score_tokens(gpt, x, targets)  # (3, n)
        sums = [score.sum(dim=1) for score in torch.split(scores, lengths, dim=1)]
        yield from zip(endings, sums, strict=True)


def _passes(endings: list[_Ending]) -> Iterator[list[_Ending]]:
    """Endings of about one length together, the longest first; those of one token need no pass."""
    rest = sorted((ending for ending in endings if len(ending.ids) > 1), key=lambda ending: -len(ending.ids))
    while rest:
        T = len(rest[0].ids) - 1
        alike = sum(len(ending.ids) - 1 >= _SHORTEST * T for ending in rest)
        n = max(alike, -(-_ENOUGH_TOKENS // T))
        yield rest[:n]
        rest = rest[n:]


def _score_tokens(gpt: LanguageModel, x: Tensor, targets: Sequence[int]) -> Tensor:
    """(3, n) float64, on the CPU: nats, 1, and whether it is the likeliest, for each target after x (n, C)."""
    target, vocab_size = torch.tensor(targets, device=x.device), gpt.config.vocab_size
    n_chunk = max(1, _LOGITS_BYTES // (4 * vocab_size))
    n_block = max(1, _BLOCK_BYTES // (4 * vocab_size)) if x.device.type == "cpu" else n_chunk
    nats, likeliest = [], []
    for rows, wanted in zip(torch.split(x, n_chunk), torch.split(target, n_chunk), strict=True):
        logits = gpt.head(rows)  # (n, V)
        for block, ids in zip(torch.split(logits, n_block), torch.split(wanted, n_block), strict=True):
            block = block.float()
            nats.append(F.cross_entropy(block, ids, reduction="none"))
            likeliest.append(block.argmax(dim=1) == ids)
    return torch.stack([torch.cat(nats), torch.ones_like(target), torch.cat(likeliest)]).double().cpu()
