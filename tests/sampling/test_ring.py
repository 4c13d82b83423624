"""A cache of the last `window` tokens: what it gives is what the whole sequence gives, however the passes are cut."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.generate import Rows, generate
from regpt2.sampling.kv_cache import KVCache, cache_for

END = 10
T = 40


def model_of(window: int, **switches: object) -> ModernGPT:
    """Random weights in fp64, large enough that the tokens before matter."""
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 64, "vocab_size": END + 1}
    model = ModernGPT(ModernConfig(**{**shape, "window": window, **switches})).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    return model.eval()


def some_ids(batch: int, length: int = T) -> Tensor:
    return torch.randint(END + 1, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, {"document_mask": True}, {"document_mask": True, "mlp_only_layer": 0}])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 39, 64])
@pytest.mark.parametrize("parts", [(40,), (3,), (20, 1, 5, 1, 1, 9), (7, 7, 7), (1, 6), (16, 16)])
def test_passes_of_any_length_give_what_the_whole_sequence_gives(
    window: int, parts: Sequence[int], switches: dict[str, bool]
) -> None:
    """The prompt in parts, shorter and longer than the window, then one token at a time."""
    model, ids = model_of(window, **switches), some_ids(3)
    plain = KVCache(model.config, 3, T, device=ids.device, dtype=torch.float64)  # keeps all; the mask hides some
    caches, ends = [cache_for(model, 3, T), plain], [*itertools.accumulate(parts)]
    for cache in caches:
        passes = []
        for start, end in itertools.pairwise([0, *ends, *range(ends[-1] + 1, T + 1)]):
            passes.append(model.head(model.hidden(ids[:, start:end], cache.layers, start)))
            cache.advance(end - start)
        assert torch.allclose(torch.cat(passes, dim=1), model(ids), rtol=0, atol=1e-9)
    assert [cache.k.shape[3] for cache in caches] == [min(window, T), T]


@torch.no_grad()
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("window", [1, 3, 8, 20])
@pytest.mark.parametrize("context", [12, 64])
def test_rows_of_unequal_lengths_give_what_each_gives_alone(window: int, context: int, document_mask: bool) -> None:
    model = model_of(window, document_mask=document_mask)
    prompts = [some_ids(1, length)[0] for length in (1, 25, 8, 9, 30)]
    rows, seen = Rows(model, prompts, 20, context=context), [ids.tolist()[-context:] for ids in prompts]
    for _ in range(20):
        expected = [model(torch.tensor([ids]))[0, -1] for ids in seen]
        logits = rows.logits()
        assert torch.allclose(logits, torch.stack(expected), rtol=0, atol=1e-9)
        rows.append(logits.argmax(dim=1))
        for ids, new in zip(seen, logits.argmax(dim=1).tolist(), strict=True):
            ids.append(new)
            if len(ids) > context:
                del ids[: len(ids) - context // 2]
    assert rows.cache is not None and rows.cache.capacity == min(window, context)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("window", [5, 17])
def test_generation_draws_what_it_draws_without_a_cache(window: int, document_mask: bool) -> None:
    """From a prompt within the window, and from one beyond it, to more than twice the window."""
    model = model_of(window, document_mask=document_mask)
    for length in (3, 20):
        drawn = [
            generate(model, some_ids(2, length), 40, generator=torch.Generator().manual_seed(4), use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*drawn)


def test_a_window_decides_what_is_drawn() -> None:
    ids = some_ids(2, 20)
    drawn = [generate(model_of(window), ids, 20, temperature=0) for window in (5, 19, 64, 0)]
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])


def test_a_cache_that_is_no_ring_takes_no_more_than_it_was_made_for() -> None:
    model, ids = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=END + 1)), some_ids(1, 20)
    cache = cache_for(model, 1, 19)
    with pytest.raises(AssertionError, match="more tokens than the cache was made for"):
        model.hidden(ids, cache.layers)
    windowed = model_of(30)
    with pytest.raises(AssertionError, match="more tokens"):  # room for fewer than the window
        windowed.hidden(ids, cache_for(windowed, 1, 19).layers)
