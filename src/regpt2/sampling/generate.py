"""Ids to more ids. In: a model and a prompt (B, T); out: the prompt and up to n new ids (B, T + n), with a KV cache.

`Rows` computes the logits after several rows of ids, also of different lengths and beyond the model's context.
"""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache
from regpt2.sampling.cpu import packed_if_faster
from regpt2.sampling.cuda_graph import StaticStep, recorded_if_faster
from regpt2.sampling.draw import Choice, candidates, drawn
from regpt2.sampling.twin import twin_agrees

# B sequences, T prompt tokens, S places in the cache, H = n_head, D = n_embd / H, V = vocab_size


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


class Rows:
    """Rows of ids that grow by one id at a time. In turn: `logits()` after the last ids, `append` the next ones.

    A token is drawn after at most N = `context` ids. At first they are the prompt's last N. When there would be more,
    they shrink to the last N // 2 (at least 1), whose places count from 0, and grow again. So most tokens cost a pass
    over one id, and one token in N / 2 costs a pass over N / 2 ids. How far each of them attends is the model's own
    affair (`window`).

    Rows of equal length are computed at one place, as a single row is. Rows of different lengths begin at place 0 too;
    what is behind the end of a shorter one is hidden from it, and overwritten when it grows.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Tensor], n_new: int, *, context: int, use_cache: bool = True
    ) -> None:
        prompts = [ids[-context:] for ids in prompts]
        self.context, self.n_new = context, n_new
        self.lengths = [len(ids) for ids in prompts]  # known without asking the device, as `starts`
        self.starts = [0] * len(prompts)
        self.equal = len(set(self.lengths)) == 1
        assert self.equal or (use_cache and may_differ_in_length(model)), "such a model takes rows of equal length"
        B, T = len(prompts), max(self.lengths)
        self.ids = prompts[0].new_zeros(B, T + n_new)  # (B, T + n_new)
        self.ids[:, :T] = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        self.decoder = packed_if_faster(model, n_new, rows=B) if use_cache else model
        self.cache = cache_for(self.decoder, B, min(context, T + n_new)) if use_cache else None
        self.step: StaticStep | None = None
        self.may_record = True
        self.grows = [True] * B
        self.moves = torch.ones(B, dtype=torch.int64, device=self.ids.device)  # (B,), 0 for a row that has ended
        self.ends, self.begins = self.ids.new_tensor(self.lengths), torch.zeros_like(self.moves)  # two of (B,)
        self.every = torch.arange(B, device=self.ids.device)  # (B,)

    def end(self, row: int) -> None:
        """This row is complete. Among rows of different lengths it grows no more."""
        if not self.equal:
            self.grows[row] = False
            self.moves[row] = 0

    def append(self, new: Tensor) -> None:
        """The next id of each row (B,)."""
        if self.equal:
            self.ids[:, self.lengths[0]] = new
        else:
            self.ids[self.every, self.ends] = new
            self.ends += self.moves
        self.lengths = [length + grows for length, grows in zip(self.lengths, self.grows, strict=True)]

    def logits(self) -> Tensor:
        """The logits (B, V) after the last ids. The next call may overwrite them."""
        if self.cache is None or self.equal:
            return self._at_one_place(self.cache)
        return self._at_own_places(self.cache)

    def _at_one_place(self, cache: KVCache | None) -> Tensor:  # (B, V)
        start, end = self.starts[0], self.lengths[0]
        if end - start > self.context:
            start = end - kept_of(self.context)
            self.starts = [start] * len(self.starts)
            if cache is not None:
                cache.length = 0
        last = self.ids[:, end - 1]
        if cache is not None and cache.length and self.may_record:  # after the prompt: one token at a time
            self.step, self.may_record = _recorded(self.decoder, cache, last, self.n_new), False
        if self.step is not None and cache is not None and cache.length:
            return self.step(last, end - 1 - start)
        return _last_logits(self.decoder, self.ids[:, start:end], cache)

    def _at_own_places(self, cache: KVCache) -> Tensor:  # (B, V)
        if cache.places is None:
            cache.begin(self.ends)
            x = self.decoder.hidden(self.ids[:, : max(self.lengths)], cache.layers)  # (B, T, C)
            cache.place(self.ends - 1, max(self.lengths))
            return self.decoder.head(x[self.every, self.ends - 1])
        self._shrink_full_contexts(cache)
        longest = max(length - start for length, start in zip(self.lengths, self.starts, strict=True))
        places = self.ends - 1 - self.begins  # (B,)
        cache.place(places, longest)
        x = self.decoder.hidden(self.ids[self.every, self.ends - 1][:, None], cache.layers, places)  # (B, 1, C)
        return self.decoder.head(x[:, -1])

    def _shrink_full_contexts(self, cache: KVCache) -> None:
        """Compute what a full row keeps but its last id again, at places from 0 on."""
        full = [row for row, end in enumerate(self.lengths) if end - self.starts[row] > self.context]
        n_before = kept_of(self.context) - 1
        for row in full:
            self.starts[row] = self.lengths[row] - 1 - n_before
            self.begins[row] = self.starts[row]
        if full and n_before:
            kept = torch.stack([self.ids[row, self.starts[row] :][:n_before] for row in full])  # (rows, n_before)
            part = cache_for(self.decoder, len(full), n_before)
            self.decoder.hidden(kept, part.layers)
            n = part.capacity
            cache.documents[full, :n] = part.documents
            cache.k[:, full, :, :n], cache.v[:, full, :, :n] = part.k, part.v


def may_differ_in_length(model: nn.Module) -> bool:
    """May its rows be of different lengths? Only if every part is one of ours, unchanged, that minds the cache's mask.

    So a subclass, a replaced part or a hook means no.
    """
    for part in model.modules():
        changed = part._forward_hooks or part._forward_pre_hooks or vars(part).keys() & {"forward", "hidden", "head"}
        if changed or not type(part).__module__.startswith(("regpt2.model.", "regpt2.sampling.", "torch.nn.")):
            return False
    return True


def kept_of(context: int) -> int:
    """How many of the last ids a full context keeps."""
    return max(1, context // 2)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    stop_id: int | None = None,
    never: Sequence[int] = (),
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue prompts of equal length: ids (B, T) -> (B, T + n), n <= max_new_tokens.

    The model's mode, training or eval, is kept. To generate often on a CPU, pack it once (sampling/cpu.py).

    Args:
        temperature, top_k, top_p: see `Choice`.
        generator: of the draws, on the prompt's device; torch's own if None.
        use_cache: False computes every token from the whole sequence; slow, the reference for the cache in tests.
        stop_id: a row that has drawn this id is filled up with it; when all have, generation ends.
        never: ids that are not drawn, such as those without text.
        on_token: is given the new ids (B,) as soon as they are drawn.

    Raises:
        UsageError: an option is out of its range, or prompt and new tokens do not fit into block_size.
        CheckpointError: the model's logits are not finite.
    """
    require_some(max_new_tokens)
    choice = Choice(temperature, top_k, top_p)
    _check_prompt(model.config, prompt_ids, max_new_tokens)
    B, T = prompt_ids.shape
    banned = banned_ids(model.config.vocab_size, never, prompt_ids.device)  # (V,)
    stopped = torch.zeros(B, dtype=torch.bool, device=prompt_ids.device)
    rows = Rows(model, list(prompt_ids), max_new_tokens, context=model.config.block_size, use_cache=use_cache)
    was_training = model.training
    model.eval()
    try:
        for n in range(1, max_new_tokens + 1):
            logits = rows.logits()  # (B, V)
            if n == 1:
                require_finite(logits)
            logits = logits.masked_fill(banned, -torch.inf) if never else logits
            new = drawn(*candidates(logits, choice), generator)  # (B,)
            if stop_id is not None:
                new = new.masked_fill(stopped, stop_id)
                stopped |= new == stop_id
            rows.append(new)
            if on_token is not None:
                on_token(new)
            if stop_id is not None and stopped.all():
                return rows.ids[:, : T + n]
    finally:
        model.train(was_training)
    return rows.ids


def banned_ids(vocab_size: int, never: Sequence[int], device: torch.device) -> Tensor:
    """(V,), true for ids that are never drawn."""
    banned = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    return banned.index_fill(0, torch.tensor(never, dtype=torch.int64, device=device), True)


def require_finite(logits: Tensor) -> None:
    """A CheckpointError if the model gives no numbers."""
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights hold NaN or infinity.")


def cache_for(model: LanguageModel, batch: int, n_tokens: int) -> KVCache:
    """For as many tokens of each row, of which a model with a window needs its last ones alone.

    In the type of the activations, but fp32 on a CPU, where a bf16 query takes torch up to twice as long."""
    weight = next(model.h.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype
    return KVCache(model.config, batch, n_tokens, window=model.window, device=weight.device, dtype=dtype)


def _recorded(model: LanguageModel, cache: KVCache, ids: Tensor, n_tokens: int) -> StaticStep | None:
    """A recorded step from ids (B,) on, if it is faster and gives the model's own logits."""
    position = cache.length
    step = recorded_if_faster(model, cache.k, cache.v, position, n_tokens)
    if step is None:
        return None
    own = model.head(model.hidden(ids[:, None], cache.layers, position)[:, -1])  # (B, V)
    return step if twin_agrees("the CUDA graph", own, step(ids, position)) else None


def _last_logits(model: LanguageModel, ids: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) after the last of ids (B, T); with a cache only the ids that it has not seen are computed."""
    if cache is None:
        return model.head(model.hidden(ids)[:, -1])
    unseen = ids[:, cache.length :]
    x = model.hidden(unseen, cache.layers, position=cache.length)  # (B, T, C)
    cache.advance(unseen.shape[1])
    return model.head(x[:, -1])


def _check_prompt(config: GPTConfig, prompt_ids: Tensor, max_new_tokens: int) -> None:
    B, T = prompt_ids.shape
    if B < 1 or T < 1:
        raise UsageError(f"a prompt of {B} sequences x {T} tokens is empty; begin with <|endoftext|>.")
    require_fit(T, max_new_tokens, config.block_size)
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise UsageError(f"token id {bad} is outside the model's vocabulary of {config.vocab_size:,} tokens.")


def require_some(max_new_tokens: int) -> None:
    """A UsageError if nothing is to be drawn."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1.")


def require_fit(n_prompt: int, n_new: int, block_size: int) -> None:
    """A UsageError if prompt and new tokens are more than the model can take."""
    if n_prompt + n_new > block_size:
        room = block_size - n_prompt
        mend = f"Ask for at most {room:,} new tokens, or shorten the prompt." if room > 0 else "Shorten the prompt."
        raise UsageError(f"{in_all(n_prompt, n_new)}, and the model's context is {block_size:,}. {mend}")


def in_all(n_prompt: int, n_new: int) -> str:
    """How many tokens a prompt and its continuation have together, to begin a message."""
    return f"a prompt of {n_prompt:,} tokens plus {n_new:,} to write is {n_prompt + n_new:,} tokens"
