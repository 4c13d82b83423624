"""Arithmetic of a step. In: a shape and a sequence length; out: weights, and FLOPs per trained token."""

from dataclasses import dataclass, replace

from regpt2.model.language_model import GPTConfig
from regpt2.model.modern import ModernConfig

# C = n_embd, L = n_layer, T = seq_len, V = padded_vocab_size


def n_weights(config: GPTConfig) -> int:
    """Numbers in all weights, the padding of the vocabulary included."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    if not isinstance(config, ModernConfig):
        return (V + config.block_size) * C + L * (12 * C * C + 13 * C) + 2 * C
    rows = V * (1 + config.untied_head + config.n_value_tables) + (0 if config.rotary else config.block_size)
    with_attention = blocks_with_attention(config)
    norms = with_attention + L + 1  # before attention, before the MLP, and the last one
    norms = norms + 1 if config.rms_norm else 2 * norms  # an RMS norm has no bias; there is one more of them
    if config.weightless_norms:
        norms = 0
    scalars = 2 * L * config.x0_mixing + L // 2 * config.unet_skips
    if config.value_embeddings:
        mixing = [config.table_of(layer) is not None for layer in range(L) if config.has_attention(layer)]
        scalars += len(mixing) + sum(mixing)
    return rows * C + (8 * L + 4 * with_attention) * C * C + norms * C + scalars


def blocks_with_attention(config: GPTConfig) -> int:
    """All, but in a modern model perhaps one."""
    return config.n_layer - (isinstance(config, ModernConfig) and config.mlp_only_layer >= 0)


def keys_per_query(config: GPTConfig, seq_len: int, window: float | None = None) -> float:
    """How many tokens one sees on average, of a sequence: half of all, or fewer where a window ends before them.

    The mean of min(position, window). A document mask hides more of them, which depends on the text. `window`:
    attention's, where it is not yet the model's own.
    """
    if window is None:
        window = config.window if isinstance(config, ModernConfig) else 0
    reach = min(window or seq_len, seq_len)
    return reach * (1 - reach / (2 * seq_len)) if seq_len else 0.0


def adapter_numbers(config: GPTConfig, rank: int) -> int:
    """Numbers in LoRA's A and B of all blocks: rank x (in + out) of C -> 3C, C -> C, C -> 4C and 4C -> C."""
    return (10 * config.n_layer + 6 * blocks_with_attention(config)) * rank * config.n_embd


def flops_per_token(config: GPTConfig, seq_len: int, *, lora_rank: int = 0, window: float | None = None) -> float:
    """Matmul FLOPs, forward and backward, of one token; causal attention counted once, no recomputation.

    72 C^2 L (QKV 18, projection 6, MLP 48) + 6 C T L (scores and values, half of the square) + 6 C V (head).
    For 124M at T=1024: 798 MFLOP, and 565 with LoRA of rank 16. The modern model has the same matmuls: a head of its
    own is used no more often, and of value embeddings a token reads one row each. A window, `window` if
    it is not yet the model's own, leaves fewer scores, and a block may have no attention.
    """
    C, L, V, A = config.n_embd, config.n_layer, config.padded_vocab_size, blocks_with_attention(config)
    matrices, scores = (8 * L + 4 * A) * C * C, 12 * C * A * keys_per_query(config, seq_len, window)
    if lora_rank:  # no gradients of the frozen weights, which are a third; instead the adapters
        return float(4 * matrices + scores + 4 * C * V + 6 * adapter_numbers(config, lora_rank))
    return float(6 * matrices + scores + 6 * C * V)


def palm_flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """The same by the PaLM paper's convention (arXiv:2204.02311, appendix B), as nanoGPT reports it: 6 N + 12 C T L.

    N is every parameter, positions too, and attention is the whole square, or twice what a window leaves of it. For
    124M at T=1024: 860 MFLOP.
    """
    scores = 24 * config.n_embd * blocks_with_attention(config) * keys_per_query(config, seq_len)
    return float(6 * n_weights(replace(config, vocab_multiple=1)) + scores)


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    flops: float
    """FLOP/s of one rank."""
    source: str
    """Where it is from, as in base/record/metrics.py."""


def mfu(tokens_per_s: float, flops: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilization, 0 to 1; None where the peak is unknown, rather than a wrong number."""
    return None if peak is None else tokens_per_s * flops / (peak * world_size)
