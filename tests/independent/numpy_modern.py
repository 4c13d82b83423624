"""The modern GPT in NumPy, from the papers alone. In: weights by name, ids (T,); out: logits (T, V), fp64, or the loss.

Written from Su et al. 2021 (rotary positions), Henry et al. 2020 (normalized queries and keys), So et al. 2021 (squared
ReLU), Zhang & Sennrich 2019 (RMS norm), Gemma Team 2024 (soft-capped logits), and, switched off, GPT-2's ways; what
modded-nanogpt added until 2025-01-04_SoftCap is written from the description of that record: value embeddings, U-net
skips, the embedding mixed into every block, a block without attention, half of the pairs turning, a sliding window.
It shares no code with the package, loops where a loop is clearer, and is slow.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(weights: dict[str, Array], config: Any, ids: list[int]) -> Array:
    """Logits (T, V) for one sequence. Matrices are (out, in), as nn.Linear keeps them."""
    x = np.stack([weights["wte.weight"][token] for token in ids])
    if not config.rotary:
        x = x + weights["wpe.weight"][: len(ids)]
    if config.rms_norm:
        x = norm(weights, "ln_emb", x, config)
    x0, waiting = x, []
    for layer in range(config.n_layer):
        block = {name.removeprefix(f"h.{layer}."): w for name, w in weights.items() if name.startswith(f"h.{layer}.")}
        if config.unet_skips and layer >= config.n_layer // 2 and waiting:
            x = x + weights["skips"][layer - config.n_layer // 2] * waiting.pop()  # the last of the first half first
        if config.x0_mixing:
            a, b = block["mix"]
            x = a * x + b * x0
        if layer != config.mlp_only_layer:
            x = x + attention(block, norm(block, "ln_1", x, config), value_rows(weights, config, layer, ids), config)
        x = x + feed_forward(block, norm(block, "ln_2", x, config), config)
        if layer < config.n_layer // 2:
            waiting.append(x)
    head = weights["lm_head.weight" if config.untied_head else "wte.weight"]
    y: Array = norm(weights, "ln_f", x, config) @ head.T
    return config.softcap * np.tanh(y / config.softcap) if config.softcap else y


def norm(weights: dict[str, Array], name: str, x: Array, config: Any) -> Array:
    """Each row to mean square 1, then scaled; without rms_norm to mean 0 and variance 1, then scaled and shifted."""
    if config.rms_norm:
        return unit_rms(x) if config.weightless_norms else unit_rms(x) * weights[f"{name}.weight"]
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    result: Array = (x - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return result


def unit_rms(x: Array) -> Array:
    result: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return result


def value_rows(weights: dict[str, Array], config: Any, layer: int, ids: list[int]) -> Array | None:
    """The rows (T, C) of the value embedding of this block: 0 1 2 in the first three, and in the last three again."""
    if not config.value_embeddings:
        return None
    n = min(3, config.n_layer // 2)
    pattern = [*range(n), *[None] * (config.n_layer - 2 * n), *range(n)]
    table = pattern[layer]
    return None if table is None else np.stack([weights[f"wve.{table}.weight"][token] for token in ids])


def rotation(place: int, D: int, half: bool) -> Array:
    """The matrix (D, D) that turns the plane of dimensions i and i + D/2, counterclockwise.

    By place * 10000^(-2i/D); or by place * 1024^(-k), k from 0 to 1 in D/4 values, and then D/4 planes do not turn.
    """
    turn = np.zeros((D, D))
    speeds = [10000 ** (-2 * i / D) for i in range(D // 2)]
    if half:
        speeds = [1024 ** -(i / max(1, D // 4 - 1)) for i in range(D // 4)] + [0.0] * (D // 4)
    for i in range(D // 2):
        angle, j = place * speeds[i], i + D // 2
        turn[i, i], turn[i, j] = np.cos(angle), -np.sin(angle)
        turn[j, i], turn[j, j] = np.sin(angle), np.cos(angle)
    return turn


def attention(block: dict[str, Array], x: Array, embedded: Array | None, config: Any) -> Array:
    """Each token looks at itself and the tokens before it, in its window, once per head."""
    T, C = x.shape
    D = C // config.n_head
    qkv = x @ block["attn.c_attn.weight"].T
    if config.value_embeddings:
        own = block["attn.value_mix"][0] * qkv[:, 2 * C :]
        mixed = own if embedded is None else own + block["attn.value_mix"][1] * embedded
        qkv = np.concatenate([qkv[:, : 2 * C], mixed], axis=1)
    y = np.zeros((T, C))
    for head in range(config.n_head):
        part = slice(head * D, (head + 1) * D)
        q, k, v = qkv[:, :C][:, part], qkv[:, C : 2 * C][:, part], qkv[:, 2 * C :][:, part]
        if config.qk_norm:
            q, k = unit_rms(q), unit_rms(k)
        if config.rotary:
            turns = [rotation(t, D, config.half_rotary) for t in range(T)]
            q, k = (np.stack([turns[t] @ z[t] for t in range(T)]) for z in (q, k))
        for t in range(T):
            first = max(0, t + 1 - config.window) if config.window else 0
            scores = k[first : t + 1] @ q[t] / np.sqrt(D)
            p = np.exp(scores - scores.max())
            y[t, part] = p / p.sum() @ v[first : t + 1]
    return y @ block["attn.c_proj.weight"].T


def feed_forward(block: dict[str, Array], x: Array, config: Any) -> Array:
    """Four times as wide in the middle, with the square of what is above zero there, or either form of GELU."""
    x = x @ block["mlp.c_fc.weight"].T
    if config.relu_squared:
        x = np.maximum(x, 0) ** 2
    elif config.activation == "gelu":
        x = x * np.vectorize(lambda a: 0.5 * (1 + math.erf(a / math.sqrt(2))))(x)
    else:
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x @ block["mlp.c_proj.weight"].T


def loss(weights: dict[str, Array], config: Any, ids: list[int], targets: list[int]) -> float:
    """Mean of minus the log of the probability that each target has, in nats."""
    total = 0.0
    for row, target in zip(logits(weights, config, ids), targets, strict=True):
        total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
    return float(total / len(ids))
