"""Norms, in 16 bits too, against fp64: torch's own LayerNorm loses its weights' gradients, its RMS norm memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.model.kernels.norm import layer_norm, rms_norm

N, C = 4096, 96


def passed(way: object, *tensors: Tensor, d_y: Tensor) -> list[Tensor]:
    leaves = [z.clone().requires_grad_() for z in tensors]
    y = way(*leaves)  # type: ignore[operator]
    y.backward(d_y.to(y.dtype))
    return [y.detach().double(), *(z.grad.double() for z in leaves if z.grad is not None)]


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, d_y = torch.randn(2, N // 2, C, generator=generator), torch.randn(2, N // 2, C, generator=generator) + 0.05
    weight, bias = 1 + 0.1 * torch.randn(C, generator=generator), 0.1 * torch.randn(C, generator=generator)
    return x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype), d_y.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.float32, [4e-3, 4e-3, 1e-6, 1e-6]),  # y and its gradient are rounded once: 2**-8
        (torch.bfloat16, torch.bfloat16, [4e-3, 4e-3, 4e-3, 4e-3]),
        (torch.float16, torch.float32, [5e-4, 5e-4, 1e-6, 1e-6]),
        (torch.float32, torch.float32, [1e-6, 1e-6, 3e-6, 1e-6]),
        (torch.float64, torch.float64, [1e-14, 1e-14, 1e-14, 1e-14]),
    ],
)
def test_output_and_gradients_are_those_of_fp64(
    dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: list[float]
) -> None:
    x, weight, bias, d_y = inputs(dtype, weight_dtype)
    found = passed(lambda *z: layer_norm(*z, 1e-5), x, weight, bias, d_y=d_y)
    wanted = passed(
        lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-5), x.double(), weight.double(), bias.double(), d_y=d_y.double()
    )
    for name, a, b, most in zip(("y", "d_x", "d_weight", "d_bias"), found, wanted, tolerance, strict=True):
        assert float((a - b).norm() / b.norm()) < most, name


def test_the_compiled_path_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, d_y = inputs(torch.bfloat16, torch.float32)
    eager = passed(lambda *z: layer_norm(*z, 1e-5), x, weight, bias, d_y=d_y)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what a compiler traces, and a GPU runs
    traced = passed(lambda *z: layer_norm(*z, 1e-5), x, weight, bias, d_y=d_y)
    for a, b in zip(eager, traced, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3


def test_it_needs_no_gradient() -> None:
    x, weight, bias, _ = inputs(torch.bfloat16, torch.float32)
    with torch.no_grad():
        assert layer_norm(x, weight, bias, 1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.float32, [4e-3, 4e-3, 1e-6]),
        (torch.bfloat16, torch.bfloat16, [4e-3, 4e-3, 4e-3]),
        (torch.float32, torch.float32, [1e-6, 1e-6, 1e-6]),
        (torch.float64, torch.float64, [1e-14, 1e-14, 1e-14]),
    ],
)
def test_rms_norm_and_its_gradients_are_those_of_fp64(
    dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: list[float]
) -> None:
    x, weight, _, d_y = inputs(dtype, weight_dtype)
    found = passed(rms_norm, x, weight, d_y=d_y)
    wanted = passed(lambda x, w: F.rms_norm(x, (C,), w, 1e-6), x.double(), weight.double(), d_y=d_y.double())
    for name, a, b, most in zip(("y", "d_x", "d_weight"), found, wanted, tolerance, strict=True):
        assert float((a - b).norm() / b.norm()) < most, name
    found = passed(rms_norm, x, d_y=d_y)  # without a weight
    wanted = passed(lambda x: F.rms_norm(x, (C,), None, 1e-6), x.double(), d_y=d_y.double())
    for name, a, b, most in zip(("y", "d_x"), found, wanted, tolerance[:2], strict=True):
        assert float((a - b).norm() / b.norm()) < most, name


def test_rms_norms_gradient_is_its_slope_for_rows_near_zero_too() -> None:
    """By central differences; there the 1e-6 beside the mean square counts."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([1.0, 1e-3, 1e-4], dtype=torch.float64)[:, None]
    x = (rows * torch.randn(3, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight), eps=1e-8, atol=1e-4, rtol=1e-5)
    assert torch.autograd.gradcheck(rms_norm, (x,), eps=1e-8, atol=1e-4, rtol=1e-5)


def test_rms_norm_keeps_its_input_as_it_comes_and_a_number_for_each_row() -> None:
    x, weight, _, _ = (z.requires_grad_() for z in inputs(torch.bfloat16, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):  # type: ignore[func-returns-value]
        rms_norm(x, weight)
    assert sum(z.nbytes for z in kept if z.data_ptr() not in (x.data_ptr(), weight.data_ptr())) == 4 * N


def test_rms_norm_without_a_weight_keeps_its_output_which_the_next_layer_keeps_too() -> None:
    x, kept = inputs(torch.bfloat16, torch.float32)[0].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):  # type: ignore[func-returns-value]
        y = rms_norm(x)
    assert sum(z.nbytes for z in kept if z.data_ptr() != y.data_ptr()) == 4 * N


def test_rms_norm_without_a_gradient_is_the_same() -> None:
    x, weight, _, _ = inputs(torch.bfloat16, torch.float32)
    with torch.no_grad():
        plain = rms_norm(x, weight)
    kept = rms_norm(x, weight)
    assert plain.dtype == kept.dtype == torch.bfloat16
    assert float((plain - kept).norm() / kept.norm()) < 1e-3
