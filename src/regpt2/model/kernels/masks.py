"""Which keys each query sees. In: documents, a window; out: a mask for attention, made once for all layers.

A token sees itself and those before it, in its own document, and at most `window` tokens with itself. A table of that
has T x S entries: 4.3 GB at T = 65,536. So most masks are rules, by which attention skips what nothing sees.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

# B sequences, T queries, the last of S keys, n queries in a block, s keys that they may see

FLEX_BLOCK = 128  # FlexAttention's own: queries and keys of a block that is computed or left out as a whole
_LARGEST_TABLE = 8192**2  # entries, a byte each; in longer sequences a GPU's evaluations go by a rule too


@dataclass(frozen=True, eq=False)
class Reach:
    """The rule by which a block of queries finds its keys. Nothing in it grows faster than the number of tokens."""

    window: int
    """Tokens that a query sees, itself included; 0: all before."""
    documents: Tensor | None = None
    """(B, S), the number of each token's document."""
    begins: Tensor | None = None
    """(S,), where the document of each token begins, the earliest over the rows; None: not to be read here."""

    def first_key(self, query: int) -> int:
        """The first key that the query at this place, or a later one, sees in any row."""
        first = max(0, query - self.window + 1) if self.window else 0
        return first if self.begins is None else max(first, int(self.begins[query]))

    def hidden(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """(B or 1, 1, n, s), true where a query does not see a key. Both are places among the S tokens."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]  # (n, 1)
        key = torch.arange(keys.start, keys.stop, device=device)  # (s,)
        hidden = key > query  # (n, s)
        if self.window and queries.stop - self.window > keys.start:
            hidden |= key <= query - self.window
        if self.documents is None or self._is_one_document(keys.start, queries.stop - 1):
            return hidden[None, None]
        own, theirs = self.documents[:, queries.start : queries.stop], self.documents[:, keys.start : keys.stop]
        return hidden | (own[:, None, :, None] != theirs[:, None, None, :])

    def _is_one_document(self, first: int, last: int) -> bool:
        if self.documents is None or self.begins is None:
            return False
        return bool((self.documents[:, first] == self.documents[:, last]).all())


Mask = Tensor | BlockMask | Reach
"""Which keys each query sees: (B or 1, 1, T, S) bool, or as a rule, or for FlexAttention."""


def is_exporting() -> bool:
    """Is this pass exported, for every T? torch 2.11 answers yes inside of torch.compile as well, so both are asked."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def document_numbers(ids: Tensor, end_id: int) -> Tensor:
    """(B, S), the number of the document that each token of ids (B, S) is in, within its row.

    <|endoftext|>, `end_id`, comes first in a document. What is before the first one is the end of document 0.
    """
    return (ids == end_id).cumsum(dim=1, dtype=torch.int32)


def visible_keys(
    T: int,
    S: int,
    *,
    device: torch.device,
    documents: Tensor | None = None,
    window: int | Tensor = 0,
    seen: Tensor | None = None,
) -> Mask | None:
    """What the last T of S tokens see: themselves and those before, in their document and within the window.

    None means that plain causal attention is the same. It is FlexAttention's in a pass that is compiled for a GPU, a
    rule on a CPU and for long sequences elsewhere, and else a table.

    Args:
        documents: (B, S), the number of each token's document, which never falls along a row; None: all are one.
        window: tokens that attention reaches back, the token itself included; 0: all before. A tensor () where the
            pass is compiled, so that a new value does not compile it again.
        seen: (B, 1, 1, S), for rows of one query each at places of their own: which keys were written before it.
    """
    if isinstance(window, Tensor):
        window = torch.where(window > 0, window, S)
    elif not is_exporting() and window >= S:  # an export is for every S
        window = 0
    if documents is None and isinstance(window, int) and not window:
        return seen
    if is_exporting():
        return _table(T, S, device, documents, window)
    if T == 1 or seen is not None:
        return _of_one_query(S, device, documents, window, seen)
    if not torch.compiler.is_compiling() and (device.type == "cpu" or T * S > _LARGEST_TABLE):
        assert isinstance(window, int), "a tensor is for compiled passes"
        if documents is None or device.type != "cpu":  # there the host would wait for the device
            return Reach(window, documents)
        return Reach(window, documents, _begins(documents))
    if _takes_flex(device, T, S):
        return _block_mask(T, device, documents, window)
    return _table(T, S, device, documents, window)


def _begins(documents: Tensor) -> Tensor:
    """(S,): where the document of each token of (B, S) begins, the earliest over the rows."""
    place = torch.arange(1, documents.shape[1], device=documents.device)  # (S - 1,)
    begins = place.where(documents[:, 1:] != documents[:, :-1], 0).cummax(dim=1).values.amin(dim=0)  # (S - 1,)
    return torch.cat([begins.new_zeros(1), begins])


def _of_one_query(
    S: int, device: torch.device, documents: Tensor | None, window: int | Tensor, seen: Tensor | None
) -> Tensor:
    """(B or 1, 1, 1, S). The query is the last that is seen, and its document is the highest of those seen."""
    there = torch.ones(1, 1, 1, S, dtype=torch.bool, device=device) if seen is None else seen  # (B or 1, 1, 1, S)
    visible = there
    if isinstance(window, Tensor) or window:
        visible = visible & (torch.arange(S, device=device) >= there.sum(dim=3, keepdim=True) - window)
    if documents is not None:
        numbers = documents[:, None, None, :]  # (B, 1, 1, S)
        visible = visible & (numbers == numbers.where(there, 0).amax(dim=3, keepdim=True))
    return visible


def _table(T: int, S: int, device: torch.device, documents: Tensor | None, window: int | Tensor) -> Tensor:
    """(B or 1, 1, T, S)."""
    query, key = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)  # (T, 1), (S,)
    visible = key <= query  # (T, S)
    if isinstance(window, Tensor) or window:
        visible = visible & (key > query - window)
    if documents is None:
        return visible[None, None]
    return visible & (documents[:, None, S - T :, None] == documents[:, None, None, :])


def _takes_flex(device: torch.device, T: int, S: int) -> bool:
    """FlexAttention skips blocks of keys that no query sees. Uncompiled it is slower than a table."""
    return device.type == "cuda" and torch.compiler.is_compiling() and S == T and T % FLEX_BLOCK == 0


def _block_mask(T: int, device: torch.device, documents: Tensor | None, window: int | Tensor) -> BlockMask:
    """The same for FlexAttention, from the first and last token of each block: torch would look at all T x T places.

    A full block needs no look at its tokens: its keys are before all of its queries, within reach of the last one, and
    in the one document of both. Numbers never fall along a row, so the tokens at the ends decide for those between.
    """
    first = torch.arange(0, T, FLEX_BLOCK, device=device)  # (T / 128,), the first token of each block
    last = first + FLEX_BLOCK - 1
    touches = first[:, None] >= first  # (queries' blocks, keys' blocks): some query sees some key
    full = first[:, None] > first  # each query sees each key
    if isinstance(window, Tensor) or window:
        touches = touches & (last > first[:, None] - window)
        full = full & (first > last[:, None] - window)
    B = 1 if documents is None else len(documents)
    touches, full = touches.expand(B, 1, -1, -1), full.expand(B, 1, -1, -1)
    if documents is not None:
        starts, ends = documents[:, ::FLEX_BLOCK], documents[:, FLEX_BLOCK - 1 :: FLEX_BLOCK]  # two of (B, T / 128)
        touches = touches & (starts[:, None, :, None] == ends[:, None, None, :])
        full = full & (ends[:, None, :, None] == starts[:, None, None, :])
        touches = touches | torch.eye(len(first), dtype=torch.bool, device=device)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if isinstance(window, Tensor) or window:
            seen = seen & (key > query - window)
        if documents is not None:
            seen = seen & (documents[b, key] == documents[b, query])
        return seen

    return BlockMask.from_kv_blocks(
        *_listed(touches & ~full), *_listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(T, T)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (B, 1, n), and first which they are, (B, 1, n, n)."""
    number = blocks.sum(dim=3, dtype=torch.int32)
    return number, blocks.to(torch.int32).argsort(dim=3, descending=True, stable=True).to(torch.int32)
