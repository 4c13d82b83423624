"""The FLOPs formula against torch's own counter, and the published count for 124M."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from regpt2.model.flops import flops_per_token, mfu, palm_flops_per_token
from regpt2.model.gpt import GPT, GPTConfig


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


def test_124m_takes_798_mflop_a_token() -> None:
    assert abs(flops_per_token(GPTConfig(), 1024) / 1e6 - 798.0) < 0.5


def test_the_other_convention_counts_860_mflop_a_token() -> None:
    assert abs(palm_flops_per_token(GPTConfig(), 1024) / 1e6 - 860) < 0.5
    small = GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=128, vocab_size=300)
    assert palm_flops_per_token(small, 0) == 6 * GPT(small).n_params()


def test_mfu_is_unknown_rather_than_wrong() -> None:
    assert mfu(1e6, 798e6, None, 8) is None
    assert mfu(1e6, 798e6, 989.4e12, 1) == 1e6 * 798e6 / 989.4e12
