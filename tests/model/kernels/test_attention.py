"""Attention in blocks equals the definition, forward and backward, and drops what it should."""

import math

import pytest
import torch
from torch import Tensor

from regpt2.model.kernels import attention
from regpt2.model.kernels.attention import causal_attention


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time, over the keys that it may see."""
    rows = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] @ k[:, :, : t + 1].transpose(2, 3)) / math.sqrt(q.shape[3])
        rows.append(scores.softmax(dim=3) @ v[:, :, : t + 1])
    return torch.cat(rows, dim=2)


def qkv(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, 3, T, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 48, 50])
def test_it_is_the_definition_forward_and_backward(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 16)
    q, k, v = qkv(T)
    forced = attention._in_blocks(q, k, v, 0.0)
    expected = by_definition(q, k, v)
    assert torch.allclose(forced, expected, atol=1e-12)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = torch.autograd.grad((forced * weight).sum(), (q, k, v))  # from 17 on by the hand-written backward pass
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("block", [4, 256])  # fewer queries than a block go in blocks, more through torch's kernel
@pytest.mark.parametrize("T", [1, 2, 9, 20])
def test_queries_may_be_the_last_of_the_tokens(T: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    q, k, v = qkv(20)
    assert torch.allclose(causal_attention(q[:, :, -T:], k, v), by_definition(q, k, v)[:, :, -T:], atol=1e-12)
    blocks = attention._in_blocks(q[:, :, -T:], k, v, 0.0)
    assert torch.allclose(blocks, by_definition(q, k, v)[:, :, -T:], atol=1e-12)


@pytest.mark.parametrize("T", [17, 20])  # all tokens, and the last of them; finite differences, nothing of ours
def test_the_gradient_is_the_slope(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 8)
    q, k, v = (z[:1, :2, :, :4].detach().requires_grad_() for z in qkv(20))
    assert torch.autograd.gradcheck(lambda q, k, v: attention._in_blocks(q[:, :, -T:], k, v, 0.0), (q, k, v))


def test_no_weights_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.numel()) or z, lambda z: z):
        causal_attention(*qkv(50, torch.bfloat16))
    assert max(kept) == 2 * 3 * 50 * 8  # queries, keys or values


@pytest.mark.parametrize("T", [20, 300])  # one block; two, by the backward pass that computes weights again
def test_in_bf16_the_gradient_is_that_of_fp64_within_its_rounding(T: int) -> None:
    exact = qkv(T, torch.bfloat16)
    wide = [z.detach().double().requires_grad_() for z in exact]
    weight = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = torch.autograd.grad((causal_attention(*exact) * weight).sum(), exact)
    wanted = torch.autograd.grad((by_definition(*wide) * weight).sum(), wide)
    for ours, definition in zip(got, wanted, strict=True):  # bf16 keeps 8 bits: 2**-8 a rounding, a few in a row
        assert float((ours.double() - definition).norm() / definition.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_torch_agree(dtype: torch.dtype) -> None:
    q, k, v = qkv(300, dtype)
    ours = causal_attention(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_no_token_sees_the_future() -> None:
    q, k, v = qkv(20)
    before = causal_attention(q, k, v)
    with torch.no_grad():
        k[:, :, 12:] += 100.0
        v[:, :, 12:] += 100.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.allclose(before[:, :, 12:], after[:, :, 12:])


@pytest.mark.parametrize("block", [8, 256])
def test_dropout_drops_only_when_asked(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    q, k, v = qkv(20, torch.bfloat16)
    assert torch.equal(causal_attention(q, k, v), causal_attention(q, k, v))
    assert not torch.allclose(causal_attention(q, k, v, dropout_p=0.5), causal_attention(q, k, v, dropout_p=0.5))
    mean = torch.stack([causal_attention(q, k, v, dropout_p=0.3) for _ in range(2000)]).float().mean(dim=0)
    assert torch.allclose(mean, causal_attention(q, k, v).float(), atol=0.15)


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_compiler_takes_it_as_one_graph() -> None:
    """By torch's own attention, which in fp32 takes what is longer than a block, and by blocks."""
    torch._dynamo.reset()
    whole = torch.compile(causal_attention, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(300, dtype)
        assert torch.equal(whole(q, k, v), causal_attention(q, k, v))
