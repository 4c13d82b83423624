"""The lecture's ways give our loss and gradients, on the same weights, and are what they say they are."""

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regpt2.machine.speed.lecture_steps import LecturePart, lecture_model, unfused_adamw
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.activation import Activation
from regpt2.training.optimizer import OptimConfig, build_optimizer

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=257)
PARTS: tuple[LecturePart, ...] = ("plain_attention", "torch_attention", "kept_gelu", "whole_logits")


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        0, TINY.vocab_size, (3, 21), generator=torch.Generator().manual_seed(0)
    )  # fewer than block_size
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model: GPT, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*batch(), dtype)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def lively(model: GPT) -> GPT:
    """Weights large enough for attention to be uneven, so that an error in it shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "wte.weight":
                p.mul_(8)
    return model


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), ("plain_attention", "kept_gelu", "whole_logits")])
def test_each_part_gives_our_loss_and_gradients(parts: Collection[LecturePart], activation: Activation) -> None:
    """In fp64, where two orders of the same sums differ by 1e-15 or so."""
    config = replace(TINY, activation=activation)
    expected, gradients = loss_and_gradients(lively(GPT(config, seed=1)).double())
    model = lively(lecture_model(config, parts, torch.bfloat16, 1)).double()
    loss, found = loss_and_gradients(model)
    assert abs(loss - expected) < 1e-12
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-13), name


def test_autocast_keeps_the_stream_in_fp32_and_rounds_before_each_matmul() -> None:
    seen: dict[str, torch.dtype] = {}
    model = lecture_model(TINY, ("whole_logits", "autocast"), torch.bfloat16, 1)
    model.h[0].register_forward_hook(lambda *all_of_it: seen.update(stream=all_of_it[2].dtype))
    model.h[0].mlp.c_fc.register_forward_hook(lambda *all_of_it: seen.update(matmul=all_of_it[2].dtype))
    loss, found = loss_and_gradients(model)
    assert seen == {"stream": torch.float32, "matmul": torch.bfloat16}
    expected, gradients = loss_and_gradients(GPT(TINY, seed=1))
    assert 0 < abs(loss - expected) < 2e-3
    for name, gradient in gradients.items():  # bf16 has 8 bits: each product is off by up to 0.4 %
        assert (found[name] - gradient).norm() < 0.03 * gradient.norm(), name


def test_weights_do_not_depend_on_the_padding_of_the_vocabulary() -> None:
    padded = lecture_model(TINY, (), torch.float32, 1)
    bare = lecture_model(replace(TINY, vocab_multiple=1), ("plain_attention",), torch.float32, 1)
    assert (len(padded.wte.weight), len(bare.wte.weight)) == (320, 257)
    assert torch.equal(padded.wte.weight[:257], bare.wte.weight)
    assert all(torch.equal(p, q) for p, q in zip([*padded.parameters()][1:], [*bare.parameters()][1:], strict=True))
    assert abs(loss_and_gradients(padded)[0] - loss_and_gradients(bare)[0]) < 1e-5
    same = GPT(TINY, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(padded.parameters(), same.parameters(), strict=True))


def test_without_parts_it_is_the_model_of_every_run() -> None:
    assert type(lecture_model(TINY, (), torch.float32, 1)) is GPT


def test_unfused_adamw_makes_our_updates() -> None:
    models = [GPT(TINY, seed=1), GPT(TINY, seed=1)]
    ours, theirs = build_optimizer(models[0], OptimConfig()), unfused_adamw(models[1], OptimConfig())
    assert ours.defaults["fused"] and not theirs.defaults["fused"]
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            loss_and_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if not name.endswith(
            "c_attn.bias"
        ):  # softmax ignores the keys' bias: its gradient is rounding, and so its sign
            assert (p - q).abs().max() < 1e-6, name
