"""Weighted sums of streams against plain products, in every type: values, gradients, and what is kept for them."""

import pytest
import torch
from torch import Tensor

from regpt2.model.kernels.mixing import mixed


def streams(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(n)
    scalars = torch.randn(n, generator=generator, dtype=torch.float64)
    return scalars, [torch.randn(3, 64, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_sum_and_its_gradients_are_those_of_plain_products(n: int) -> None:
    scalars, parts = streams(n)
    inputs = [scalars.requires_grad_(), *(part.requires_grad_() for part in parts)]
    plain = sum(scalars[i] * parts[i] for i in range(n))
    ours = mixed(*inputs)
    assert torch.allclose(ours, plain, rtol=1e-14)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, wanted = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, plain))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(mixed(*inputs), ours)


def test_in_bf16_it_rounds_once_and_sums_up_in_fp32() -> None:
    """Rounded scalars and products would be off by 2**-9 each; a gradient summed up in bf16 by far more."""
    scalars, parts = streams(2, torch.bfloat16)
    exact = [scalars.requires_grad_(), *(part.double().requires_grad_() for part in parts)]
    inputs = [scalars.detach().float().requires_grad_(), *(part.requires_grad_() for part in parts)]
    ours, wanted = mixed(*inputs), mixed(*exact)
    assert ours.dtype == torch.bfloat16
    assert (ours - wanted).abs().le(2**-8 * wanted.abs()).all()
    d_y = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, true = torch.autograd.grad(ours, inputs, d_y), torch.autograd.grad(wanted, exact, d_y.double())
    assert got[0].dtype == torch.float32
    assert torch.allclose(got[0].double(), true[0], rtol=1e-5, atol=1e-4)
    assert all((a - b).abs().le(2**-8 * b.abs()).all() for a, b in zip(got[1:], true[1:], strict=True))


def test_only_what_is_mixed_is_kept() -> None:
    scalars, parts = streams(2, torch.bfloat16)
    inputs, kept = [scalars.requires_grad_(), *(part.requires_grad_() for part in parts)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z.data_ptr()) or z, lambda z: z):  # type: ignore[func-returns-value]
        mixed(*inputs)
    assert set(kept) == {z.data_ptr() for z in inputs}
