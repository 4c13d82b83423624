"""Arithmetic of a step. In: a shape and a sequence length; out: weights, and FLOPs per trained token."""

from dataclasses import replace

from regpt2.model.language_model import GPTConfig
from regpt2.model.modern_config import ModernConfig

# C = n_embd, L = n_layer, T = seq_len, K = keys that a token attends to, V = padded_vocab_size


def n_weights(config: GPTConfig) -> int:
    """Numbers in all weights, the padding of the vocabulary included."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    if not isinstance(config, ModernConfig):
        return (V + config.block_size) * C + L * (12 * C * C + 13 * C) + 2 * C
    rows = V * (2 if config.untied_head else 1) + (0 if config.rotary else config.block_size)
    rows += V * config.n_value_tables
    with_attention = sum(map(config.has_attention, range(L)))
    norms = L + with_attention + 1
    norms = norms + 1 if config.rms_norm else 2 * norms  # an RMS norm has no bias; there is one more of them
    norms = 0 if config.weightless_norms else norms
    return rows * C + (8 * L + 4 * with_attention) * C * C + norms * C + _n_scalars(config)


def _n_scalars(config: ModernConfig) -> int:
    """Learned scalars: two a block of x0 mixing, one or two of its values, one of each skip."""
    mixes = 2 * config.n_layer * config.x0_mixing + config.n_layer // 2 * config.unet_skips
    if not config.value_embeddings:
        return mixes
    attending = filter(config.has_attention, range(config.n_layer))
    return mixes + sum(1 + (config.table_of(layer) is not None) for layer in attending)


def adapter_numbers(config: GPTConfig, rank: int) -> int:
    """Numbers in LoRA's A and B of all blocks: rank x (in + out) of C -> 3C, C -> C, C -> 4C and 4C -> C."""
    return 16 * rank * config.n_embd * config.n_layer


def keys_per_token(seq_len: int, window: float = 0.0) -> float:
    """How many keys a token attends to, on average: half of the sequence, or fewer with a window; documents ignored."""
    window = min(window or seq_len, seq_len)
    return window - window * window / (2 * seq_len)


def flops_per_token(config: GPTConfig, seq_len: int, *, lora_rank: int = 0, window: float | None = None) -> float:
    """Matmul FLOPs, forward and backward, of one token; causal attention counted once, no recomputation.

    72 C^2 L (QKV 18, projection 6, MLP 48) + 12 C K L (scores and values of K keys) + 6 C V (head), where K = T / 2
    without a window. For 124M at T=1024: 798 MFLOP, and 565 with LoRA of rank 16. The modern model has the same
    matmuls, but for a block without attention: a head of its own is used no more often. Attention within documents
    needs less, by how long they are; it is counted as if a sequence were one.

    `window`: attention's, if it is not the model's own now.
    """
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    without, own = 0, 0
    if isinstance(config, ModernConfig):
        without = L - sum(map(config.has_attention, range(L)))
        own = config.window
    attention = 12 * C * keys_per_token(seq_len, own if window is None else window) * (L - without)
    if lora_rank:  # no gradients of the frozen weights, which are a third; instead the adapters
        frozen = 48 * C * C * L - 16 * C * C * without
        return float(frozen + attention + 4 * C * V + 6 * adapter_numbers(config, lora_rank))
    return float(72 * C * C * L - 24 * C * C * without + attention + 6 * C * V)


def palm_flops_per_token(config: GPTConfig, seq_len: int) -> float:
    """The same by the PaLM paper's convention (arXiv:2204.02311, appendix B), as nanoGPT reports it: 6 N + 12 C T L.

    N is every parameter, positions too, and attention is the whole square. For 124M at T=1024: 860 MFLOP.
    """
    C, L, T = config.n_embd, config.n_layer, seq_len
    return float(6 * n_weights(replace(config, vocab_multiple=1)) + 12 * C * T * L)


def mfu(tokens_per_s: float, flops: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilization, 0 to 1; None where the peak is unknown, rather than a wrong number."""
    return None if peak is None else tokens_per_s * flops / (peak * world_size)
