"""A device's mathematics against fp64: right kernels agree within rounding, and each planted fault is seen."""

import dataclasses
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.device import Precision, choose_compute
from regpt2.machine.health import agreement as module
from regpt2.machine.health.agreement import (
    Trial,
    adamw_difference,
    agreement,
    head_difference,
    make_trial,
    tolerances,
    trials,
)
from regpt2.model import gpt
from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels.activation import Activation

numpy_gpt2 = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "independent" / "numpy_gpt2.py")))

CPU = torch.device("cpu")
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=320, vocab_size=300)
CAN_BF16 = choose_compute("auto", CPU).precision == "bf16"
EACH = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not CAN_BF16, reason="not in this CPU"))]

right_attention, right_loss = gpt.causal_attention, gpt.linear_cross_entropy


@pytest.fixture(scope="module")
def trial() -> Trial:
    return make_trial(SMALL, 2, 300)  # more than one block of queries


@pytest.mark.parametrize("precision", EACH)
def test_right_kernels_agree_within_rounding(trial: Trial, precision: Precision) -> None:
    found = agreement(trial, CPU, precision, compiled=False)
    assert not found.fault(precision)
    assert found.gradient > 0  # it is not compared with itself


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_the_exact_loss_is_that_of_numpy_from_the_papers(activation: Activation) -> None:
    """In fp64: the losses of the two forms of GELU are 2e-7 apart here, which rounding in fp32 would hide."""
    trial = make_trial(dataclasses.replace(SMALL, activation=activation), 1, 20)
    weights = {name: p.detach().double().numpy() for name, p in trial.model.named_parameters()}
    logits = numpy_gpt2.logits(weights, SMALL.n_layer, SMALL.n_head, trial.ids[0].tolist(), activation)
    loss = F.cross_entropy(torch.from_numpy(logits)[:, : SMALL.vocab_size], trial.targets[0])
    assert abs(loss - trial.loss) < 1e-12


def test_a_small_trial_has_the_kernels_of_the_model() -> None:
    long, wide = trials(GPTConfig(n_head=6, n_embd=768, vocab_size=1000, activation="gelu"), 40)
    assert long.model.config.activation == wide.model.config.activation == "gelu"
    assert (long.model.config.n_embd // long.model.config.n_head, long.ids.shape) == (128, (1, 40))
    assert (wide.model.config.padded_vocab_size, wide.ids.shape) == (1024, (12, 16))


def sees_the_future(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sees_the_next(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2]).tril(1).bool())


def forgets_a_block(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    y = right_attention(q, k, v)
    return torch.cat([y[:, :, :256], y[:, :, 256:].detach()], dim=2)


def a_head_is_nan(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    y = right_attention(q, k, v)
    return torch.cat([y[:, :1], y[:, 1:] * math.nan], dim=1)


class GradientTooLong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Tensor:
        return 1.01 * d_loss


ATTENTION = [sees_the_future, sees_the_next, forgets_a_block, a_head_is_nan]


@pytest.mark.parametrize("precision", EACH)
@pytest.mark.parametrize("wrong", ATTENTION)
def test_wrong_attention_is_seen(
    trial: Trial, precision: Precision, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "causal_attention", wrong)
    assert "(rounding:" in agreement(trial, CPU, precision, compiled=False).fault(precision)


@pytest.mark.parametrize("precision", EACH)
def test_a_loss_or_gradient_one_percent_too_large_is_seen(
    trial: Trial, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "linear_cross_entropy", lambda *given: 1.01 * right_loss(*given))
    assert agreement(trial, CPU, precision, compiled=False).fault(precision).startswith("loss is off by 1.0e-02")
    monkeypatch.setattr(gpt, "linear_cross_entropy", lambda *given: GradientTooLong.apply(right_loss(*given)))
    found = agreement(trial, CPU, precision, compiled=False)
    assert found.length == pytest.approx(0.01, abs=2e-3)
    assert "gradient's length" in found.fault(precision)


@pytest.mark.parametrize("precision", EACH)
def test_one_wrong_tensor_is_named(trial: Trial, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = module._on_device

    def wrong(*given: Any) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = on_device(*given)
        return loss, {**gradients, "h.1.ln_2.bias": 0.5 * gradients["h.1.ln_2.bias"]}

    monkeypatch.setattr(module, "_on_device", wrong)
    assert "gradient of h.1.ln_2.bias is off by 5" in agreement(trial, CPU, precision, compiled=False).fault(precision)


@pytest.mark.parametrize("precision", EACH)
def test_a_head_that_is_wrong_for_many_tokens_is_seen(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(SMALL, vocab_size=1000)
    most = tolerances(precision)["gradient"]
    assert 0 < head_difference(model, 640, CPU, precision) < most

    def loses_the_end(hidden: Tensor, *given: Any) -> Tensor:
        return right_loss(torch.cat([hidden[:512], hidden[512:].roll(1, dims=0)]), *given)

    monkeypatch.setattr(module, "linear_cross_entropy", loses_the_end)
    assert head_difference(model, 512, CPU, precision) < most
    assert head_difference(model, 640, CPU, precision) > 0.1


def test_adamw_follows_the_formula_and_another_does_not(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < adamw_difference(trial, CPU) < 1e-3
    for wrong in ({"betas": (0.9, 0.999)}, {"weight_decay": 0.11}, {"eps": 1e-5}):
        right = module.build_optimizer
        monkeypatch.setattr(
            module,
            "build_optimizer",
            lambda model, config, wrong=wrong, right=right: right(model, dataclasses.replace(config, **wrong)),
        )
        assert adamw_difference(trial, CPU) > 1e-3, wrong
        monkeypatch.undo()
