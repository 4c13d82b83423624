"""The loss in chunks against the loss with whole logits: value and both gradients; padding rows take no part."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.loss import (
    IGNORED,
    _opaque_loss,
    _softmax_loss_,
    chunk_rows,
    gpu_kernel,
    linear_cross_entropy,
    reference_cross_entropy,
    softcapped,
)

N, C, VOCAB = 37, 12, 23  # N is prime: the last chunk is never full
CHUNKS = [1, 5, 36, 37, 1000, None]


def inputs(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(rows, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (N,), generator=generator)


def loss_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# fp64 and fp32: sums in another order, a few roundings of 1e-16 and 6e-8. bf16: the reference itself rounds logits'
# gradients to 8 bits, 2^-9 relative each, and so do we, at another place.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("rows", [VOCAB, 32], ids=["unpadded", "padded"])
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_chunked_loss_equals_the_plain_one(
    dtype: torch.dtype, tolerance: float, rows: int, chunk_tokens: int | None
) -> None:
    hidden, weight, targets = inputs(dtype, rows)
    got = loss_and_gradients(
        linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=chunk_tokens), hidden, weight
    )
    expected = loss_and_gradients(reference_cross_entropy(hidden, weight, targets, VOCAB), hidden, weight)
    for ours, plain in zip(got, expected, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("rows", [VOCAB, 32], ids=["unpadded", "padded"])
@pytest.mark.parametrize("chunk_tokens", [5, None])
@pytest.mark.parametrize("softcap", [2.0, 15.0])  # of logits up to 11: one bends them hard, one hardly
def test_soft_capped_loss_equals_the_formula(rows: int, chunk_tokens: int | None, softcap: float) -> None:
    hidden, weight, targets = inputs(torch.float64, rows)
    got = linear_cross_entropy(hidden, weight, targets, VOCAB, softcap=softcap, chunk_tokens=chunk_tokens)
    logits = softcap * torch.tanh((hidden @ weight.T)[:, :VOCAB] / softcap)
    reference = reference_cross_entropy(hidden, weight, targets, VOCAB, softcap=softcap)
    expected = loss_and_gradients(F.cross_entropy(logits, targets), hidden, weight)
    for loss in (got, reference):
        for ours, plain in zip(loss_and_gradients(loss, hidden, weight), expected, strict=True):
            assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_soft_capped_gradient_in_bf16_is_rounded_once() -> None:
    """Against fp64 on the same bf16 logits: tanh is taken in fp32, so only the result has the 8 bits of bf16."""
    logits = torch.linspace(-40, 40, 64, dtype=torch.bfloat16).repeat(3, 1)
    exact = logits.double().requires_grad_()
    targets = torch.tensor([0, 40, 63])
    F.cross_entropy(softcapped(exact, 15.0), targets, reduction="sum").backward()
    assert exact.grad is not None
    loss = _softmax_loss_(logits, targets, 64, 15.0, torch.float32)
    assert abs(loss - F.cross_entropy(softcapped(exact.detach(), 15.0), targets, reduction="sum")) < 1e-5
    assert torch.allclose(logits.double(), exact.grad, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("chunk_tokens", [5, None])
def test_bf16_loss_is_near_the_exact_one(chunk_tokens: int | None) -> None:
    """Against fp64 on the same bf16 numbers. Logits of up to 10 are rounded to 2^-9 of that; their mean is nearer."""
    hidden, weight, targets = inputs(torch.bfloat16, 32)
    exact = reference_cross_entropy(hidden.double(), weight.double(), targets, VOCAB)
    got = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=chunk_tokens)
    assert got.dtype == torch.float32
    assert abs(got - exact) < 1e-2 * exact


def test_the_gradient_of_fp32_weights_is_not_rounded_to_bf16() -> None:
    """It is a sum over all tokens, and the largest tensor of a small GPT: the weights' own type is kept."""
    hidden, weight, targets = inputs(torch.float32, 32)
    rounded = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(rounded, weight, targets, VOCAB)
    d_hidden, d_weight = torch.autograd.grad(loss, (rounded, weight))
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(d_weight, d_weight.bfloat16().float())
    same = torch.autograd.grad(linear_cross_entropy(rounded, w := weight.bfloat16(), targets, VOCAB), w)
    assert torch.allclose(d_weight, same[0].float(), rtol=2**-8, atol=1e-6)


def test_gradient_is_scaled_by_what_comes_after() -> None:
    hidden, weight, targets = inputs(torch.float64, 32)
    one = loss_and_gradients(linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=5), hidden, weight)
    three = loss_and_gradients(3 * linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=5), hidden, weight)
    for a, b in zip(one, three, strict=True):
        assert torch.allclose(3 * a, b, rtol=1e-14)


def test_finite_differences_agree() -> None:
    """Independent of the plain loss: the slope along a random direction, by central differences."""
    hidden, weight, targets = inputs(torch.float64, 32)
    d_hidden, d_weight = loss_and_gradients(
        linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=7), hidden, weight
    )[1:]
    generator, step = torch.Generator().manual_seed(1), 1e-5
    along_h, along_w = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (hidden, weight))
    with torch.no_grad():
        above, below = (
            linear_cross_entropy(hidden + s * along_h, weight + s * along_w, targets, VOCAB) for s in (step, -step)
        )
    slope = (d_hidden * along_h).sum() + (d_weight * along_w).sum()
    assert abs((above - below) / (2 * step) - slope) < 1e-8  # the error of the difference is of order step squared


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = inputs(torch.float32, 32)
    loss = linear_cross_entropy(hidden, weight, targets, VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        loss.backward()


def test_without_gradient_the_loss_is_the_same() -> None:
    hidden, weight, targets = inputs(torch.float32, 32)
    with_gradient = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=5)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, VOCAB, chunk_tokens=5)
    assert torch.equal(with_gradient.detach(), without)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_large_logits_stay_finite(softcap: float) -> None:
    hidden, weight, targets = inputs(torch.float32, 32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets, VOCAB, softcap=softcap)
    got = loss_and_gradients(loss, hidden, weight)
    assert all(value.isfinite().all() for value in got)


def test_padding_rows_get_no_gradient_and_stay_zero_under_adamw() -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(0))
    before = model.wte.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert model.wte.weight.grad is not None
        assert not model.wte.weight.grad[50:].any()
        optimizer.step()
    assert model.wte.weight.shape[0] == 64
    assert not model.wte.weight[50:].any()
    assert (model.wte.weight[:50] != before[:50]).all()


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("ignored", [slice(30, 37), slice(3, 9), slice(0, 1)], ids=["last chunk", "some", "one"])
def test_ignored_targets_are_left_out_of_the_mean(ignored: slice, softcap: float) -> None:
    """As torch's own cross entropy does; a whole chunk of 10 among them."""
    hidden, weight, targets = inputs(torch.float64, 32)
    targets[ignored] = IGNORED
    got = linear_cross_entropy(hidden, weight, targets, VOCAB, softcap=softcap, chunk_tokens=10)
    expected = reference_cross_entropy(hidden, weight, targets, VOCAB, softcap=softcap)
    for ours, plain in zip(
        loss_and_gradients(got, hidden, weight), loss_and_gradients(expected, hidden, weight), strict=True
    ):
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_every_negative_target_is_ignored() -> None:
    hidden, weight, targets = inputs(torch.float64, 32)
    minus_one, minus_hundred = targets.clone(), targets.clone()
    minus_one[5:9], minus_hundred[5:9] = -1, IGNORED
    one, other = (linear_cross_entropy(hidden, weight, t, VOCAB) for t in (minus_one, minus_hundred))
    assert torch.equal(one, other)


def test_where_every_target_is_ignored_loss_and_gradients_are_zero() -> None:
    hidden, weight, targets = inputs(torch.float32, 32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), VOCAB)
    assert not any(value.any() for value in loss_and_gradients(loss, hidden, weight))


@pytest.mark.parametrize(
    ("n_tokens", "device", "rows", "n_chunks"),
    [
        (65_536, "cuda", 9_472, 7),  # 1 GiB holds 10,672 rows of 50,304 logits in 16 bits
        (1_024, "cuda", 1_024, 1),
        (1_000, "cuda", 1_024, 1),
        (10_673, "cuda", 5_376, 2),
        (4_096, "cpu", 2_048, 2),
        (1_000, "cpu", 1_000, 1),
    ],
)
def test_chunks_are_of_equal_size_and_on_a_gpu_of_whole_tiles(
    n_tokens: int, device: str, rows: int, n_chunks: int
) -> None:
    assert chunk_rows(n_tokens, 50_304, 2, device) == rows
    assert -(-n_tokens // rows) == n_chunks


def test_a_chunk_has_a_tile_even_where_that_is_too_much() -> None:
    assert chunk_rows(65_536, 10_000_000, 4, "cuda") == 256
    assert chunk_rows(7, 1_000_000_000, 4, "cpu") == 1


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_operator_keeps_what_it_promises_the_compiler(dtype: torch.dtype, with_gradient: bool) -> None:
    """torch's own check: schema, no hidden mutation, fake shapes and strides, autograd, static and dynamic shapes."""
    hidden, weight, targets = inputs(torch.float32, 32)
    rounded, weight = hidden.detach().to(dtype), weight.detach()
    rounded.requires_grad_(with_gradient), weight.requires_grad_(with_gradient)
    torch.library.opcheck(_opaque_loss, (rounded, weight, targets, VOCAB, 15.0, 10, with_gradient, with_gradient))


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("chunk_tokens", [5, 37])
def test_the_operators_gradients_are_those_of_the_formula(softcap: float, chunk_tokens: int) -> None:
    hidden, weight, targets = inputs(torch.float64, 32)
    loss = 3 * _opaque_loss(hidden, weight, targets, VOCAB, softcap, chunk_tokens, True, True)[0] / N
    expected = 3 * reference_cross_entropy(hidden, weight, targets, VOCAB, softcap=softcap)
    for ours, plain in zip(
        loss_and_gradients(loss, hidden, weight), loss_and_gradients(expected, hidden, weight), strict=True
    ):
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_a_gpu_without_triton_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_kernel.cache_clear()
    try:
        assert [gpu_kernel(torch.device("mps")) for _ in range(3)] == [None] * 3
    finally:
        gpu_kernel.cache_clear()
    assert capsys.readouterr().err.count("the loss uses torch's own kernels on mps") == 1
