"""Which keys a query sees: against loops over every pair of tokens, as a rule, as a table and as FlexAttention's."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from regpt2.model.kernels import attention, masks
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.masks import FLEX_BLOCK, Reach, visible_keys

CPU = torch.device("cpu")
NUMBERS = [  # of the documents that the tokens of two rows are in, 40 of each
    None,
    [[0] * 40, [0] * 40],
    [[1] * 15 + [2] + [3] * 24, [0] * 33 + [1] * 7],
    [list(range(40)), [0] * 16 + [1] * 16 + [2] * 8],
]
WINDOWS = [0, 1, 2, 15, 16, 17, 39, 40, 100]


def by_definition(T: int, S: int, documents: list[list[int]] | None, window: int) -> np.ndarray:
    """(B, 1, T, S) bool, pair by pair."""
    rows = documents or [[0] * S]
    seen = np.zeros((len(rows), 1, T, S), dtype=bool)
    for b, t, key in itertools.product(range(len(rows)), range(T), range(S)):
        query = S - T + t
        reach = window or S
        seen[b, 0, t, key] = query - reach < key <= query and rows[b][key] == rows[b][query]
    return seen


def numbers_of(documents: list[list[int]] | None) -> Tensor | None:
    return None if documents is None else torch.tensor(documents, dtype=torch.int32)


def qkv(T: int, S: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T + S)
    return [torch.randn(2, 3, n, 4, generator=generator, dtype=dtype).requires_grad_() for n in (T, S, S)]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: np.ndarray) -> Tensor:
    scores = (q @ k.transpose(2, 3)) / q.shape[3] ** 0.5
    return scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(dim=3) @ v


@pytest.mark.parametrize("documents", NUMBERS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T", [1, 9, 40])
def test_attention_by_the_rule_and_its_gradients_are_those_of_every_pair(
    T: int, window: int, documents: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = by_definition(T, 40, documents, window)
    for block in (8, 256):  # of 8: by the backward pass that computes weights again
        monkeypatch.setattr(attention, "_BLOCK", block)
        inputs = qkv(T, 40)
        mask = visible_keys(T, 40, device=CPU, documents=numbers_of(documents), window=window)
        assert isinstance(mask, Reach) == (T > 1 and (documents is not None or 0 < window < 40))
        ours, wanted = causal_attention(*inputs, mask=mask), dense(*inputs, seen)
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)
        if isinstance(mask, Reach):  # as other devices do, where nothing is read
            monkeypatch.setattr(attention, "_PART", block)
            elsewhere = attention._in_parts(*inputs, 0.0, Reach(mask.window, mask.documents))
            assert torch.allclose(elsewhere, wanted, rtol=0, atol=1e-12)
        weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        got, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, wanted))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("documents", NUMBERS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T", [1, 9, 40])
def test_a_table_is_the_definition(T: int, window: int, documents: list[list[int]] | None) -> None:
    expected = torch.from_numpy(by_definition(T, 40, documents, window))
    for reach in (window, torch.tensor(window or 40)):
        table = masks._table(T, 40, CPU, numbers_of(documents), reach)
        assert torch.equal(table, expected)
        if T == 1:
            assert torch.equal(masks._of_one_query(40, CPU, numbers_of(documents), reach, None), expected)


@pytest.mark.parametrize("window", [0, 3, 12])
def test_rows_of_one_query_at_places_of_their_own(window: int) -> None:
    """What is behind a row's place was written before, for another sequence."""
    places, documents = [0, 4, 11], [[1] * 12, [0, 0, 1, 1, 1, 7, 7, 9, 9, 9, 9, 9], [0] * 9 + [1, 1, 1]]
    seen = torch.arange(12) <= torch.tensor(places).view(-1, 1, 1, 1)
    for numbers in (None, documents):
        got = visible_keys(1, 12, device=CPU, documents=numbers_of(numbers), window=window, seen=seen)
        assert isinstance(got, Tensor)
        for b, place in enumerate(places):
            row = None if numbers is None else [numbers[b][: place + 1]]
            assert np.array_equal(got[b, 0, 0, : place + 1], by_definition(1, place + 1, row, window)[0, 0, 0])
            assert not got[b, 0, 0, place + 1 :].any()


def test_the_gradient_within_a_window_is_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 4)
    documents = numbers_of([[0] * 5 + [1] * 7, [3] * 12])
    mask = visible_keys(12, 12, device=CPU, documents=documents, window=6)
    inputs = [z[:, :1].detach().requires_grad_() for z in qkv(12, 12)]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, mask=mask), inputs)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])  # rounding of each type
def test_a_window_in_the_types_of_training(dtype: torch.dtype, atol: float) -> None:
    inputs = qkv(700, 700, dtype)
    mask = visible_keys(700, 700, device=CPU, window=130)
    expected = dense(*(z.double() for z in inputs), by_definition(700, 700, None, 130))
    assert torch.allclose(causal_attention(*inputs, mask=mask).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [0, 700])  # of documents; 0: one
def test_keys_that_no_query_of_a_block_sees_are_skipped(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: of T x T weights as many as T x (window + a block's own queries), or fewer."""
    T, window = 8192, 500
    computed: list[int] = []
    real = attention._weights

    def spy(*args: object) -> Tensor:
        computed.append((weights := real(*args)).numel())  # type: ignore[arg-type]
        return weights

    monkeypatch.setattr(attention, "_weights", spy)
    q, k, v = (torch.zeros(1, 1, T, 2, requires_grad=True) for _ in range(3))
    documents = torch.arange(T, dtype=torch.int32)[None] // length if length else None
    mask = visible_keys(T, T, device=CPU, documents=documents, window=window if not length else 0)
    causal_attention(q, k, v, mask=mask).sum().backward()
    assert sum(computed) <= 2 * T * ((length or window) + attention._BLOCK)


def test_a_rule_of_65536_tokens_is_small() -> None:
    documents = (torch.arange(65536, dtype=torch.int32) // 1000)[None]
    mask = visible_keys(65536, 65536, device=CPU, documents=documents, window=1792)
    assert isinstance(mask, Reach) and mask.begins is not None
    assert mask.begins.numel() == 65536
    assert mask.first_key(2500) == 2000
    assert mask.first_key(2999) == 2000  # the document begins nearer than the window
    assert Reach(window=400, begins=mask.begins).first_key(2999) == 2600


def random_numbers(draw: st.DrawFn, B: int, T: int) -> Tensor:
    """Documents of any length, many at the edges of blocks."""
    edges = st.sampled_from([0, 1, FLEX_BLOCK - 1, FLEX_BLOCK, FLEX_BLOCK + 1, 2 * FLEX_BLOCK])
    starts = st.lists(st.one_of(edges, st.integers(0, T - 1)), max_size=6)
    numbers = torch.zeros(B, T, dtype=torch.int32)
    for row in range(B):
        for place in draw(starts):
            numbers[row, place:] += 1
    return numbers


@st.composite
def rules(draw: st.DrawFn) -> tuple[int, Tensor | None, int]:
    T = FLEX_BLOCK * draw(st.integers(1, 5))
    documents = random_numbers(draw, draw(st.integers(1, 2)), T) if draw(st.booleans()) else None
    near = st.sampled_from([1, FLEX_BLOCK - 1, FLEX_BLOCK, FLEX_BLOCK + 1, 2 * FLEX_BLOCK - 1, 2 * FLEX_BLOCK])
    return T, documents, draw(st.one_of(st.just(0), near, st.integers(1, T)))


def listed(number: Tensor, indices: Tensor) -> np.ndarray:
    """(B, n, n) bool: the blocks of keys that are listed for each block of queries."""
    B, _, n, _ = indices.shape
    found = np.zeros((B, n, n), dtype=bool)
    for b, i in itertools.product(range(B), range(n)):
        kept = indices[b, 0, i, : number[b, 0, i]].tolist()
        assert len(set(kept)) == len(kept) and kept == sorted(kept)
        found[b, i, kept] = True
    return found


@settings(max_examples=60, deadline=None)
@given(rules())
def test_flexattentions_mask_is_the_table(rule: tuple[int, Tensor | None, int]) -> None:
    """Full blocks hold nothing hidden, partial ones something seen and something hidden, others nothing seen."""
    T, documents, window = rule
    table = masks._table(T, T, CPU, documents, window)[:, 0]  # (B, T, T)
    blocks = table.unflatten(1, (-1, FLEX_BLOCK)).unflatten(3, (-1, FLEX_BLOCK))  # (B, n, 128, n, 128)
    some, all_of_it = blocks.any(dim=4).any(dim=2), blocks.all(dim=4).all(dim=2)
    for reach in (window, torch.tensor(window or T)):
        mask = masks._block_mask(T, CPU, documents, reach)
        full, partial = (
            listed(mask.full_kv_num_blocks, mask.full_kv_indices),
            listed(mask.kv_num_blocks, mask.kv_indices),
        )
        assert np.array_equal(full, all_of_it) and np.array_equal(partial, some & ~all_of_it)
        assert np.array_equal(mask.to_dense()[:, 0].bool(), some)
        b, query, key = (torch.arange(n) for n in table.shape)
        tokens = mask.mask_mod(b[:, None, None], torch.tensor(0), query[:, None], key).expand_as(table)
        assert torch.equal(tokens, table)


@settings(max_examples=10, deadline=None)
@given(rules())
def test_flexattentions_mask_lists_what_torchs_own_would(rule: tuple[int, Tensor | None, int]) -> None:
    """For the backward pass too: the blocks of queries of each block of keys."""
    T, documents, window = rule
    ours = masks._block_mask(T, CPU, documents, window)
    B = 1 if documents is None else len(documents)
    theirs = create_block_mask(ours.mask_mod, B, None, T, T, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    for name in ("kv", "full_kv", "q", "full_q"):
        got, wanted = (
            listed(getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")) for mask in (ours, theirs)
        )
        assert np.array_equal(got, wanted), name
    assert (ours.seq_lengths, ours.BLOCK_SIZE) == (theirs.seq_lengths, theirs.BLOCK_SIZE)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiled pass takes FlexAttention, here by its definition, and its gradient, which torch refuses on a CPU."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(masks, "_takes_flex", lambda device, T, S: torch.compiler.is_compiling() and T == S)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_window_that_changes_compiles_nothing_again(with_documents: bool, as_on_a_gpu: None) -> None:
    T = 3 * FLEX_BLOCK
    documents = torch.zeros(2, T, dtype=torch.int32)
    documents[1, 100:] += 1
    documents[1, 300:] += 1
    kept = documents if with_documents else None

    def two_layers(q: Tensor, k: Tensor, v: Tensor, window: Tensor | int) -> Tensor:
        mask = visible_keys(T, T, device=CPU, documents=kept, window=window)
        return causal_attention(causal_attention(q, k, v, mask=mask), k, v, mask=mask)

    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in (1, 64, 128, 200, T, 0):
            plain, traced = qkv(T, T), qkv(T, T)
            expected = torch.autograd.grad(two_layers(*plain, window).square().sum(), plain)
            got = torch.autograd.grad(compiled(*traced, torch.tensor(window)).square().sum(), traced)
            assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow  # a C++ compiler takes half a minute
@pytest.mark.filterwarnings("ignore")
def test_flexattention_compiled_for_a_cpu_gives_what_a_table_gives() -> None:
    """torch's own kernel, which reads the lists of full and partial blocks; uncompiled it reads the rule alone."""
    T, window = 4 * FLEX_BLOCK, 200
    documents = torch.zeros(2, T, dtype=torch.int32)
    documents[1, 150:] += 1
    q, k, v = (torch.randn(2, 2, T, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = masks._block_mask(T, CPU, documents, window)
    with torch.no_grad():
        got = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=masks._table(T, T, CPU, documents, window))
    assert isinstance(mask, BlockMask) and torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("documents", [None, numbers_of([[0] * 200 + [1] * 120] * 2)])
def test_a_cpu_compiles_a_table(documents: Tensor | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: Tensor | int) -> Tensor:
        return causal_attention(q, k, v, mask=visible_keys(320, 320, device=CPU, documents=documents, window=window))

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for window in (90, 30):
        plain, traced = qkv(320, 320), qkv(320, 320)
        expected, got = attend(*plain, window), compiled(*traced, torch.tensor(window))
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), traced),
            torch.autograd.grad(expected.square().sum(), plain),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.seconds
@pytest.mark.parametrize("with_documents", [False, True])
def test_an_export_holds_for_every_length(with_documents: bool) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
            T = q.shape[2]
            numbers = documents if with_documents else None
            mask = visible_keys(T, T, device=q.device, documents=numbers, window=9)
            return causal_attention(q, k, v, mask=mask)

    def inputs(T: int) -> tuple[Tensor, ...]:
        return *(z.detach() for z in qkv(T, T)), (torch.arange(T, dtype=torch.int32) // 7).expand(2, T)

    length = torch.export.Dim("T", min=2, max=64)
    shapes = {"q": {2: length}, "k": {2: length}, "v": {2: length}, "documents": {1: length}}
    program = torch.export.export(Attention(), inputs(20), dynamic_shapes=shapes)
    for T in (2, 5, 9, 10, 33, 64):  # within the window and beyond it
        assert torch.allclose(program.module()(*inputs(T)), Attention()(*inputs(T)), rtol=0, atol=1e-12)
