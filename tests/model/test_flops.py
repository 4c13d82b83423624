"""The FLOPs formula against torch's own counter, and the published count for 124M."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regpt2.model.flops import adapter_numbers, flops_per_token, keys_per_query, mfu, n_weights, palm_flops_per_token
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.training.lora import LoraConfig, with_adapters


def test_the_formula_counts_what_torch_counts() -> None:
    """On the meta device attention is counted as the full square; the formula counts the causal half of it."""
    config = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=128, vocab_size=320)
    T = 128
    with torch.device("meta"):
        model = GPT(config)
        ids = torch.zeros(2, T, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(ids).sum().backward()
    full_square = flops_per_token(config, T) + 6 * config.n_embd * T * config.n_layer
    # The counter's flash attention recomputes the scores in its backward pass: 2.5 times the forward, not 2.
    recomputed = 2 * config.n_embd * T * config.n_layer
    assert counter.get_total_flops() / (2 * T) in (full_square, full_square + recomputed)


def test_with_adapters_torch_counts_two_thirds_and_the_adapters() -> None:
    """The first layer's input needs no gradient; the formula counts one for every matrix."""
    config, T, r = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=128, vocab_size=320), 128, 8
    with torch.device("meta"):
        model = with_adapters(GPT(config), LoraConfig(rank=r), seed=1)
        ids = torch.zeros(2, T, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(ids).sum().backward()
    C, L = config.n_embd, config.n_layer
    expected = flops_per_token(config, T, lora_rank=r) + 6 * C * T * L - 2 * (3 * C * C + r * C)
    assert counter.get_total_flops() / (2 * T) in (expected, expected + 2 * C * T * L)
    assert adapter_numbers(config, r) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_124m_takes_798_mflop_a_token() -> None:
    assert abs(flops_per_token(GPTConfig(), 1024) / 1e6 - 798.0) < 0.5


def test_the_other_convention_counts_860_mflop_a_token() -> None:
    assert abs(palm_flops_per_token(GPTConfig(), 1024) / 1e6 - 860) < 0.5
    small = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=128, vocab_size=300)
    assert palm_flops_per_token(small, 0) == 6 * GPT(small).n_params()


def test_mfu_is_unknown_rather_than_wrong() -> None:
    assert mfu(1e6, 798e6, None, 8) is None
    assert mfu(1e6, 798e6, 989.4e12, 1) == 1e6 * 798e6 / 989.4e12


def test_a_window_costs_the_keys_that_it_shows_and_a_block_without_attention_costs_none() -> None:
    T, C = 4096, 768
    whole = ModernConfig(block_size=T)
    for window in (128, 1000, 4096, 9000):
        seen = sum(min(t + 1, window) for t in range(T)) / T
        assert keys_per_query(whole, T, window) == pytest.approx(seen, abs=1)
    assert keys_per_query(whole, T) == T / 2
    narrow = ModernConfig(block_size=T, window=128)
    per_key = 12 * C * 12
    saved = flops_per_token(whole, T) - flops_per_token(narrow, T)
    assert saved == pytest.approx(per_key * (T / 2 - keys_per_query(narrow, T)))
    assert flops_per_token(narrow, T, window=T) == flops_per_token(whole, T)
    without = flops_per_token(ModernConfig(block_size=T, window=128, mlp_only_layer=7), T)
    assert flops_per_token(narrow, T) - without == pytest.approx(24 * C * C + 12 * C * keys_per_query(narrow, T))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"rms_norm": False},
        {"weightless_norms": True, "mlp_only_layer": 0},
        {"mlp_only_layer": 3, "rms_norm": False},
        {"value_embeddings": True},
        {"value_embeddings": True, "mlp_only_layer": 2, "n_layer": 7},
        {"unet_skips": True, "x0_mixing": True, "n_layer": 5},
        {"value_embeddings": True, "unet_skips": True, "x0_mixing": True, "weightless_norms": True, "n_layer": 12},
    ],
    ids=str,
)
def test_all_weights_are_counted(switches: dict[str, Any]) -> None:
    config = ModernConfig(**{"n_layer": 4, "n_head": 2, "n_embd": 16, "vocab_size": 100, "block_size": 32, **switches})
    with torch.device("meta"):
        assert n_weights(config) == sum(p.numel() for p in ModernGPT(config).parameters())
