"""The keys and values of the tokens so far. In: those of new tokens, block by block; out: all that they may see."""

from copy import copy

import torch
from torch import Tensor

from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache

# B sequences, T new tokens, S places in the cache, H = n_head, D = n_embd / H


class KVCache:
    """Keys and values of the tokens so far, for every block, in buffers that are made once.

    Give `layers` to a model's `hidden`, first with the prompt, whole or in parts, then new tokens; after each pass,
    call `advance` with its number of tokens. Rows that differ in length call `begin` before the pass over their
    prompts, and `place` before each pass of one token. `resume` goes back to rows of equal length.

    For a model that attends within a window of W tokens it is a ring of the last W: token i is at place i % W, and
    overwrites token i - W, which no later one sees. The order of keys is nothing to attention: each was rotated by
    its own position before.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        n_tokens: int,
        *,
        window: int = 0,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Make room for `n_tokens` of each row, or the last `window` of them; 0: the model sees all tokens before."""
        self.window, capacity = window, min(n_tokens, window or n_tokens)
        shape = (config.n_layer, batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D); a masked NaN would count
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D)
        self.documents = torch.zeros(batch, capacity, device=device, dtype=torch.int32)  # (B, S)
        self._view()

    @property
    def capacity(self) -> int:
        """S: the places of a row."""
        return self.k.shape[3]

    def _view(self) -> None:
        self.length = 0
        self.places: Tensor | None = None  # (B,), of the next token of each row in its sequence; None: at `length`
        self.newest: Tensor | None = None  # (B, S), the prompt's token that each place of the ring gets; None: the last
        self.layers: list[LayerCache] = [_LayerView(self, layer) for layer in range(len(self.k))]

    def part(self, rows: slice) -> "KVCache":
        """The memory of some rows, with a length or places of their own."""
        part = copy(self)
        part.k, part.v, part.documents = self.k[:, rows], self.v[:, rows], self.documents[rows]
        part._view()
        return part

    def resume(self, length: int) -> None:
        """All rows have `length` tokens; those of the next pass come behind them."""
        self.places, self.newest, self.length = None, None, length
        for layer in self.layers:
            layer.mask = None

    def advance(self, n_tokens: int) -> None:
        """Count a finished pass over `n_tokens`: every block has appended them."""
        self.length += n_tokens

    def begin(self, lengths: Tensor) -> None:
        """The next pass is the first, over prompts that are padded on the right; each has `lengths` (B,) tokens."""
        place = torch.arange(self.capacity, device=lengths.device)  # (S,)
        rounds = (lengths[:, None] - 1 - place).div(self.capacity, rounding_mode="floor").clamp(min=0)  # (B, S)
        self.newest = place + self.capacity * rounds

    def place(self, places: Tensor, length: int) -> None:
        """The next token of each row is at its own of `places` (B,), all below `length`; it sees those before it."""
        self.places, self.newest, self.length = places, None, length
        n_keys = min(length, self.capacity)
        mask = torch.arange(n_keys, device=places.device) <= places.view(-1, 1, 1, 1)  # (B, 1, 1, n_keys)
        self.rows = torch.arange(len(places), device=places.device)  # (B,)
        for layer in self.layers:
            layer.mask = mask


class _LayerView:
    """One block's part of a KVCache."""

    mask: Tensor | None = None  # (B, 1, 1, S) of rows that differ in length

    def __init__(self, cache: KVCache, layer: int) -> None:
        self.cache, self.k, self.v = cache, cache.k[layer], cache.v[layer]  # (B, H, S, D)

    def n_keys(self, T: int) -> int:
        if self.cache.places is not None:
            return min(self.cache.length, self.cache.capacity)
        return T + (min(self.cache.length, self.cache.window - 1) if self.cache.window else self.cache.length)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, T, D) -> (B, H, n_keys, D)
        return self._kept(self.k, k, 2), self._kept(self.v, v, 2)

    def append_documents(self, numbers: Tensor) -> Tensor:  # (B, T) -> (B, n_keys)
        kept, places, length = self.cache.documents, self.cache.places, self.cache.length
        if places is not None:
            before = kept[self.cache.rows, (places - 1) % self.cache.capacity]  # (B,)
            numbers = numbers + before.where(places > 0, 0)[:, None]
        elif length:
            numbers = numbers + kept[:, (length - 1) % self.cache.capacity, None]
        return self._kept(kept, numbers, 1)

    def _kept(self, ring: Tensor, new: Tensor, dim: int) -> Tensor:
        """Keep `new`, T tokens along `dim`, in the ring; return these and those before that they may see."""
        T, start, capacity = new.shape[dim], self.cache.length, self.cache.capacity
        if self.cache.places is not None:
            rows = ring.transpose(1, dim)  # (B, S, ...)
            rows[self.cache.rows, self.cache.places % capacity] = new.transpose(1, dim)[:, 0].to(ring.dtype)
            return ring.narrow(dim, 0, self.n_keys(T))
        assert start + T <= capacity or capacity == self.cache.window, "more tokens than the cache was made for"
        n_before = self.n_keys(T) - T
        if T > 1 and start + T > capacity:  # in the order of the sequence, as its mask is
            all_of_it = torch.cat([*_parts(ring, dim, start - n_before, n_before), new.to(ring.dtype)], dim)
            self._write(ring, new, dim)
            return all_of_it
        self._write(ring, new, dim)
        return new if start == 0 else ring.narrow(dim, 0, n_before + T)

    def _write(self, ring: Tensor, new: Tensor, dim: int) -> None:
        T, newest = new.shape[dim], self.cache.newest
        if newest is not None and self.cache.capacity < T:  # else prompts end where they end
            places = newest.view(len(newest), *[1] * (dim - 1), -1, *[1] * (new.dim() - dim - 1))
            shape = [*new.shape[:dim], self.cache.capacity, *new.shape[dim + 1 :]]
            ring.copy_(new.gather(dim, places.expand(shape)))
            return
        n = min(T, self.cache.capacity)
        first, start = new.narrow(dim, T - n, n), self.cache.length + T - n
        for part in _parts(ring, dim, start, n):
            part.copy_(first.narrow(dim, 0, part.shape[dim]))
            first = first.narrow(dim, part.shape[dim], first.shape[dim] - part.shape[dim])


def _parts(ring: Tensor, dim: int, start: int, n: int) -> list[Tensor]:
    """The places of n tokens from `start` on, in one piece or two."""
    capacity = ring.shape[dim]
    place = start % capacity
    n_first = min(n, capacity - place)
    parts = [ring.narrow(dim, place, n_first)]
    return parts if n_first == n else [*parts, ring.narrow(dim, 0, n - n_first)]


def cache_for(model: LanguageModel, batch: int, n_tokens: int) -> KVCache:
    """For as many tokens of each row, of which a model with a window needs its last ones alone.

    In the type of the activations, but fp32 on a CPU, where a bf16 query takes torch up to twice as long."""
    weight = next(model.h.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype
    return KVCache(model.config, batch, n_tokens, window=model.window, device=weight.device, dtype=dtype)
