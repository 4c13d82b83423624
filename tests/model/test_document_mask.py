"""Attention within documents, against a dense mask in NumPy, and against each document computed alone."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from regpt2.base.ranks.world import World
from regpt2.evals import EvalContext
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.model.kernels import attention, masks
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.masks import Mask, document_numbers, visible_keys
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.generate import generate
from regpt2.sampling.kv_cache import KVCache

END = 10  # the last id of the vocabulary, as in both tokenizers
T = 40
STARTS = [  # of documents, in the rows of a batch
    [],  # a window in the middle of a document longer than itself
    [0],
    [T - 1],
    [0, 15, 16, 17],  # two in a row, at the edge of a block of 16 queries
    [5, 6, 7, 33],
    list(range(T)),
]


def rows(starts: Sequence[Sequence[int]] = STARTS, length: int = T) -> Tensor:
    """Ids (B, length) with <|endoftext|> at these places."""
    ids = torch.randint(0, END, (len(starts), length), generator=torch.Generator().manual_seed(0))
    for row, places in enumerate(starts):
        ids[row, list(places)] = END
    return ids


def qkv(B: int, length: int = T, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, 2, length, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def by_definition(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> np.ndarray:
    """One query at a time over the keys from its document's <|endoftext|> to itself."""
    q, k, v = (z.detach().double().numpy() for z in (q, k, v))
    out = np.zeros_like(q)
    past = k.shape[2] - q.shape[2]
    for b, row in enumerate(ids.tolist()):
        for t in range(q.shape[2]):
            last = past + t
            first = max((i for i in range(last + 1) if row[i] == END), default=0)
            scores = np.einsum("hd,hsd->hs", q[b, :, t], k[b, :, first : last + 1]) / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, :, t] = np.einsum("hs,hsd->hd", weights, v[b, :, first : last + 1])
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The same with torch, for its gradient: every pair of tokens, and the mask written pair by pair."""
    hidden = [
        [[s > t or END in row[s + 1 : t + 1] for s in range(len(row))] for t in range(len(row))] for row in ids.tolist()
    ]
    scores = (q @ k.transpose(2, 3)) / q.shape[3] ** 0.5
    return scores.masked_fill(torch.tensor(hidden)[:, None], -torch.inf).softmax(dim=3) @ v


def mask_of(ids: Tensor, n_queries: int | None = None) -> Mask | None:
    """What the last tokens of ids (B, S) see, by default all of them."""
    S = ids.shape[1]
    return visible_keys(n_queries or S, S, device=ids.device, documents=document_numbers(ids, END))


def model_of(block_size: int = 256, **switches: object) -> ModernGPT:
    """Random weights in fp64, large enough that the tokens before matter."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": block_size, "vocab_size": END + 1}
    model = ModernGPT(ModernConfig(**{**shape, "document_mask": True, **switches})).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    return model


def test_a_document_begins_at_its_end_of_text() -> None:
    ids = torch.tensor([[1, END, 2, END, END, 3], [END, 1, 2, 3, 4, END], [1, 2, 3, 4, 5, 6]])
    assert document_numbers(ids, END).tolist() == [[0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("n_queries", [1, 9, 24, T])
def test_attention_is_the_definition(n_queries: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    ids = rows()
    q, k, v = qkv(len(ids))
    q = q[:, :, -n_queries:]
    mask = mask_of(ids, n_queries)
    ours = causal_attention(q, k, v, mask=mask)
    assert np.allclose(ours.detach().numpy(), by_definition(q, k, v, ids), rtol=0, atol=1e-12)
    table = masks._table(n_queries, T, ids.device, document_numbers(ids, END), 0)  # the way of other devices
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=table)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [16, 256])
def test_the_gradient_is_that_of_a_dense_mask(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)  # of 16: by the backward pass that computes weights again
    ids = rows()
    inputs = qkv(len(ids))
    mask = mask_of(ids)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = torch.autograd.grad((causal_attention(*inputs, mask=mask) * weight).sum(), inputs)
    wanted = torch.autograd.grad((dense(*inputs, ids) * weight).sum(), inputs)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])  # rounding of each type
def test_long_sequences_in_the_types_of_training(dtype: torch.dtype, atol: float) -> None:
    ids = rows([[], [100, 256, 290]], 300)
    q, k, v = qkv(2, 300, dtype)
    mask = mask_of(ids)
    ours = causal_attention(q, k, v, mask=mask)
    assert np.allclose(ours.detach().double().numpy(), by_definition(q, k, v, ids), rtol=0, atol=atol)
    assert torch.equal(ours[0], causal_attention(q[:1], k[:1], v[:1], mask=mask_of(ids[:1]))[0])


def test_dropout_is_within_documents_too() -> None:
    ids = rows()
    q, k, v = (z.detach() for z in qkv(len(ids)))
    mask = mask_of(ids)
    dropped = causal_attention(q, k, v, dropout_p=0.5, mask=mask)
    assert not torch.allclose(dropped, causal_attention(q, k, v, mask=mask))
    v[3, :, :15] += 100.0  # a document that those after it do not see
    torch.manual_seed(0)
    one = causal_attention(q, k, v, dropout_p=0.5, mask=mask)
    v[3, :, :15] += 100.0
    torch.manual_seed(0)
    other = causal_attention(q, k, v, dropout_p=0.5, mask=mask)
    assert torch.equal(one[3, :, 15:], other[3, :, 15:])
    assert not torch.equal(one[3, :, :15], other[3, :, :15])


def alone(model: ModernGPT, row: Tensor) -> Tensor:
    """Logits (T, V) of a row, each of its documents in a pass of its own."""
    starts = [0, *(i for i in range(1, len(row)) if row[i] == END), len(row)]
    return torch.cat([model(row[None, a:b])[0] for a, b in itertools.pairwise(starts)])


def test_each_document_is_computed_as_if_alone_and_so_are_its_gradients() -> None:
    model, ids = model_of(), rows()
    together, apart = model(ids), torch.stack([alone(model, row) for row in ids])
    assert torch.allclose(together, apart, rtol=0, atol=1e-9)  # rotary positions differ, the angles between do not
    weight = torch.randn(together.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = list(model.parameters())
    got = torch.autograd.grad((together * weight).sum(), parameters)
    wanted = torch.autograd.grad((apart * weight).sum(), parameters)
    for ours, theirs in zip(got, wanted, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-9


def test_without_the_switch_documents_see_each_other() -> None:
    ids, masked, plain = rows(STARTS[:5]), model_of(), model_of(document_mask=False)
    same = [torch.allclose(a, b) for a, b in zip(masked(ids), plain(ids), strict=True)]
    assert same == [True, True, False, False, False]


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 6, 17, 39])
def test_a_cache_gives_what_the_whole_sequence_gives(prompt: int) -> None:
    """The prompt in one pass, then one token at a time: ends of text within the prompt, and drawn after it."""
    model, ids = model_of(), rows()
    cache = KVCache(model.config, len(ids), T, device=ids.device, dtype=torch.float64)
    passes = []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, T))]:
        passes.append(model.head(model.hidden(ids[:, start:end], cache.layers, position=start)))
        cache.advance(end - start)
    assert torch.allclose(torch.cat(passes, dim=1), model(ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_a_cache_draws_the_same_ids(temperature: float) -> None:
    model, ids = model_of(), rows()
    drawn = []
    for use_cache in (True, False):
        generator = torch.Generator().manual_seed(4)
        drawn.append(generate(model, ids, 60, temperature=temperature, generator=generator, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert temperature == 0 or bool((drawn[0][:, T:] == END).any(dim=1).all())  # each row has begun a new document


def test_a_prompt_counts_from_its_last_end_of_text() -> None:
    model, ids = model_of(), rows([[3, 20], [0, 20]])
    drawn = generate(model, ids, 30, temperature=0)
    assert torch.equal(drawn[:, 20:], generate(model, ids[:, 20:], 30, temperature=0))


@torch.no_grad()
def test_endings_are_scored_within_their_documents() -> None:
    """Contexts of one length and different documents, computed once; endings that begin a document of their own."""
    model = model_of()
    contexts = [[1, 2, END, 3, 4], [END, 1, 2, 3, 4], [1, END, END, 3, 4], [4, 3, 2, 1, END], [1, 2, 3, 4, 5]]
    endings = ([5], [5, 6, 7], [5, END, 7, 8], [END, END], [END, 1, 2])
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    context = EvalContext(model=model, world=world, data=None, seq_len=256, batch=4, val_tokens=1)
    found = score_endings(context, "made_up", [Question(ids, endings) for ids in contexts]).nats
    for (i, ids), (j, ending) in itertools.product(enumerate(contexts), enumerate(endings)):
        row = torch.tensor([*ids, *ending])
        log_p = alone(model, row[:-1]).log_softmax(dim=1)[-len(ending) :]
        nats = -float(log_p[range(len(ending)), row[-len(ending) :]].sum())
        assert float(found[i, j]) == pytest.approx(nats, abs=1e-4)  # endings are summed from fp32 logits


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("flex", [False, True])
def test_a_compiler_gets_one_graph_with_the_same_gradients(flex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, which a GPU takes, by its definition: on a CPU, its mask made in the graph, and its gradient."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # it allows no gradient on a CPU
    monkeypatch.setattr(masks, "_takes_flex", lambda *_: flex and torch.compiler.is_compiling())
    ids = rows([[], [0, 100, 128, 129, 200]], 256)

    def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = mask_of(ids)
        return causal_attention(causal_attention(q, k, v, mask=mask), k, v, mask=mask)

    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True, dynamic=False)
    gradients = [
        torch.autograd.grad(f(*inputs).square().sum(), inputs)
        for f in (two_layers, compiled)
        if (inputs := qkv(2, 256))
    ]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(*gradients, strict=True))


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")
def test_the_mask_of_a_compiled_model_is_flexattentions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_takes_flex", lambda *_: torch.compiler.is_compiling())
    model, ids = model_of(n_layer=1), rows([[], [0, 100, 128, 129, 200]], 256)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(ids)
    assert torch.allclose(compiled, model(ids), rtol=0, atol=1e-9)
    assert sum("flex_attention" in str(node.target) for node in graphs[0].graph.nodes) == 1
