"""Ids to more ids. In: a model and a prompt (B, T); out: the prompt and up to n new ids (B, T + n), with a KV cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache
from regpt2.sampling.cpu import packed_if_faster
from regpt2.sampling.cuda_graph import StaticStep, recorded_if_faster
from regpt2.sampling.twin import twin_agrees

# B sequences, T prompt tokens, S places in the cache, H = n_head, D = n_embd / H, V = vocab_size, K candidates

_SMALL = 1e-3  # logits are below 1e35
_LEAST = torch.finfo(torch.float32).tiny  # a smaller divisor may be zero on the device


class KVCache:
    """Keys and values of all tokens so far, for every block, in buffers that are made once.

    Give `layers` to a model's `hidden`, first with the whole prompt, then with one token at a time; after each pass,
    call `advance` with its number of tokens.
    """

    def __init__(
        self, config: GPTConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D); a masked NaN would count
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D)
        self.ids = torch.zeros(batch, capacity, device=device, dtype=torch.int64)  # (B, S)
        self.length = 0
        self.layers: list[LayerCache] = [_LayerView(self, layer) for layer in range(config.n_layer)]

    def advance(self, n_tokens: int) -> None:
        """Count a finished pass over `n_tokens`: every block has appended them."""
        self.length += n_tokens


class _LayerView:
    """One block's part of a KVCache."""

    mask: Tensor | None = None

    def __init__(self, cache: KVCache, layer: int) -> None:
        self.cache, self.k, self.v = cache, cache.k[layer], cache.v[layer]  # (B, H, S, D)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, T, D) -> (B, H, length + T, D)
        start, T = self.cache.length, k.shape[2]
        self.k.narrow(2, start, T).copy_(k)
        self.v.narrow(2, start, T).copy_(v)
        if start == 0:
            return k, v
        assert T == 1, "the prompt comes first and whole: attention masks nothing after it"
        return self.k.narrow(2, 0, start + T), self.v.narrow(2, 0, start + T)

    def append_ids(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, length + T)
        end = self.cache.length + ids.shape[1]
        self.cache.ids[:, self.cache.length : end] = ids
        return self.cache.ids[:, :end]


def next_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one id for each row: logits (B, V) -> ids (B,).

    Args:
        temperature: divides the logits; 0, or a value near 0, takes the likeliest id.
        top_k: only the k likeliest ids; 0 = all.
        top_p: of those, the fewest that together have this probability (nucleus), at least one; above 0, 1 = all.
        generator: on the device of the logits; torch's own if None.
    """
    logits = logits.float()  # in bf16 torch's argmax takes four times as long on a CPU
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=1)
    if temperature < _SMALL:  # quotients may be infinite: 0 for the likeliest and -inf for others give no NaN
        logits, temperature = logits - logits.amax(dim=1, keepdim=True), max(temperature, _LEAST)
    logits = logits / temperature
    if top_k == 0 and top_p == 1:
        return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    logits, ids = logits.topk(min(top_k, logits.shape[1]) or logits.shape[1], dim=1)  # two of (B, K), likeliest first
    p = logits.softmax(dim=1)  # (B, K)
    if top_p < 1:
        likelier = p.cumsum(dim=1) - p  # the probability of all that come before
        p = p.masked_fill(likelier >= top_p, 0.0)  # the first has none before it, so it stays
    choice = torch.multinomial(p, 1, generator=generator)  # (B, 1); weights need not sum to one
    return ids.gather(1, choice).squeeze(1)


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
        temperature, top_k, top_p, generator: see `next_token`.
        use_cache: False computes every token from the whole sequence; slow, the reference for the cache in tests.
        stop_id: a row that has drawn this id is filled up with it; when all have, generation ends.
        never: ids that are not drawn, such as those without text.
        on_token: is given the new ids (B,) as soon as they are drawn.

    Raises:
        UsageError: an option is out of its range, or prompt and new tokens do not fit into block_size.
        CheckpointError: the model's logits are not finite.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p)
    _check_prompt(model.config, prompt_ids, max_new_tokens)
    B, T = prompt_ids.shape
    ids = torch.cat([prompt_ids, prompt_ids.new_zeros(B, max_new_tokens)], dim=1)  # (B, T + max_new_tokens)
    banned = ids.new_zeros(model.config.vocab_size, dtype=torch.bool).index_fill(0, ids.new_tensor(never), True)  # (V,)
    stopped = torch.zeros(B, dtype=torch.bool, device=ids.device)
    decoder = packed_if_faster(model, max_new_tokens, rows=B) if use_cache else model
    cache = _cache_for(decoder, B, ids.shape[1]) if use_cache else None
    step: StaticStep | None = None
    was_training = model.training
    model.eval()
    try:
        for end in range(T, T + max_new_tokens):
            if cache is not None and end == T + 1:  # after the prompt: one token at a time
                step = _recorded(decoder, cache, ids[:, T], max_new_tokens)
            logits = step(ids[:, end - 1], end - 1) if step else _last_logits(decoder, ids[:, :end], cache)  # (B, V)
            if end == T and not logits.isfinite().all():
                raise CheckpointError("the model's logits are not finite: its weights hold NaN or infinity.")
            logits = logits.masked_fill(banned, -torch.inf) if never else logits
            new = next_token(logits, temperature, top_k, top_p, generator)  # (B,)
            if stop_id is not None:
                new = new.masked_fill(stopped, stop_id)
                stopped |= new == stop_id
            ids[:, end] = new
            if on_token is not None:
                on_token(new)
            if stop_id is not None and stopped.all():
                return ids[:, : end + 1]
    finally:
        model.train(was_training)
    return ids


def _cache_for(model: LanguageModel, batch: int, capacity: int) -> KVCache:
    """In the type of the activations, but fp32 on a CPU, where a bf16 query takes torch up to twice as long."""
    weight = next(model.h.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype
    return KVCache(model.config, batch, capacity, device=weight.device, dtype=dtype)


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


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature = {temperature} must be 0 (always the likeliest token) or more; 1 is usual.")
    if top_k < 0:
        raise UsageError(f"top_k = {top_k} must be 0 (all tokens) or more; 50 is usual.")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p = {top_p} must be above 0 and at most 1 (all tokens).")


def _check_prompt(config: GPTConfig, prompt_ids: Tensor, max_new_tokens: int) -> None:
    B, T = prompt_ids.shape
    if B < 1 or T < 1:
        raise UsageError(f"a prompt of {B} sequences x {T} tokens is empty; begin with <|endoftext|>.")
    if T + max_new_tokens > config.block_size:
        raise UsageError(
            f"{T:,} prompt tokens + {max_new_tokens:,} new ones = {T + max_new_tokens:,}, the model can take "
            f"{config.block_size:,}; ask for at most {max(0, config.block_size - T):,} new ones, or shorten the prompt."
        )
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise UsageError(f"token id {bad} is outside the model's vocabulary of {config.vocab_size:,} tokens.")
