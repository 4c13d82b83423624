"""Ids to more ids. In: a model and a prompt (B, T); out: the prompt and up to n new ids (B, T + n), with a KV cache.

`Rows` computes the logits after several rows of ids, also of different lengths and beyond the model's context.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.model.language_model import GPTConfig, LanguageModel
from regpt2.sampling.draw import Choice, candidates, drawn
from regpt2.sampling.kv_cache import KVCache, cache_for
from regpt2.sampling.twins.cpu import packed_if_faster
from regpt2.sampling.twins.cuda_graph import StaticStep, recorded_if_faster
from regpt2.sampling.twins.twin import twin_agrees

# B sequences, T prompt tokens, V = vocab_size


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

    The model's mode, training or eval, is kept. To generate often on a CPU, pack it once (sampling/twins/cpu.py).

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
