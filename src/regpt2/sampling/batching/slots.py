"""Keys and values of continuations that come and go. In: ids and their slots; out: what the head reads, and logits.

The rows that are written now have the first slots. The last slot holds a prompt while it is computed, part by part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.base.free_memory import free_bytes
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.kv_cache import KVCache, cache_for
from regpt2.sampling.twins.cpu import packed_if_faster

# B rows, T tokens, C = n_embd, V = vocab_size

_ALWAYS = 1_000_000_000  # tokens: a copy of the matrices pays off


class Slots:
    """The memory of `n` continuations of at most `context` tokens each."""

    def __init__(self, model: LanguageModel, n: int, context: int) -> None:
        self.n, self.context, self.vocab_size = n, context, model.config.vocab_size
        self.device = next(model.parameters()).device
        self.decoder = packed_if_faster(model, _ALWAYS, rows=n)
        self.cache = _with_memory(self.decoder, n, context)
        self.first: dict[int, KVCache] = {}  # the memory of the first B rows
        self.aside = self.cache.part(slice(n - 1, n))

    @property
    def n_bytes(self) -> int:
        """The size of all keys and values."""
        return self.cache.k.nbytes + self.cache.v.nbytes

    def prepare(self, ids: Tensor, position: int) -> Tensor:
        """The next ids (T,) of a prompt, the first at `position`, into the last slot; -> what the head reads (T, C)."""
        self.aside.resume(position)
        x: Tensor = self.decoder.hidden(ids[None], self.aside.layers, position)[0]  # (T, C)
        return x

    def step(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """One more id of each of the first B rows, at its own place; -> logits (B, V)."""
        B, longest = len(ids), max(places)
        if B not in self.first:
            self.first[B] = self.cache.part(slice(0, B))
        cache = self.first[B]
        both = torch.tensor([ids, places], device=self.device)  # (2, B)
        if min(places) == longest:
            cache.resume(longest)
            x = self.decoder.hidden(both[0, :, None], cache.layers, longest)  # (B, 1, C)
        else:
            cache.place(both[1], longest + 1)
            x = self.decoder.hidden(both[0, :, None], cache.layers, both[1])  # (B, 1, C)
        return self.decoder.head(x[:, -1])

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """The first tokens of a slot, to another one."""
        if source != target:
            self.cache.k[:, target, :, :n_tokens] = self.cache.k[:, source, :, :n_tokens]
            self.cache.v[:, target, :, :n_tokens] = self.cache.v[:, source, :, :n_tokens]
            self.cache.documents[target, :n_tokens] = self.cache.documents[source, :n_tokens]

    def clear(self, slots: slice) -> None:
        """Forget what they have: a number that is not finite would count even where it is masked."""
        self.cache.k[:, slots] = 0
        self.cache.v[:, slots] = 0


def _with_memory(model: LanguageModel, n: int, context: int) -> KVCache:
    """A cache that fits. On a CPU the system gives memory only when it is written, and then ends who takes too much."""
    what = f"slots = {n:,} x context = {context:,} tokens: there is no memory for their keys and values"
    free = free_bytes(next(model.parameters()).device)
    try:
        cache = cache_for(model, n, context)
    except RuntimeError as error:
        raise UsageError(f"{what} ({str(error).splitlines()[0]}); use fewer slots.") from None
    need = cache.k.nbytes + cache.v.nbytes
    if free is not None and need > free:
        raise UsageError(f"{what}: {need / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; use fewer slots.")
    return cache
