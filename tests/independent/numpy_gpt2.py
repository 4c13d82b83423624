"""GPT-2's forward pass in NumPy, from the papers alone. In: weights by name, ids (T,); out: logits (T, V), fp64.

Written from Radford et al. 2019 (pre-norm blocks, a final norm, tied embeddings), Vaswani et al. 2017 (attention),
Hendrycks & Gimpel 2016 (GELU, exact and in its tanh form), Ba et al. 2016 (layer norm). It shares no code with the
package, loops where a loop is clearer, and is slow.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(
    weights: dict[str, Array], n_layer: int, n_head: int, ids: list[int], activation: str = "gelu_tanh"
) -> Array:
    """Logits (T, V) for one sequence. Matrices are (out, in), as nn.Linear keeps them."""
    x = np.stack([weights["wte.weight"][token] + weights["wpe.weight"][place] for place, token in enumerate(ids)])
    for layer in range(n_layer):
        block = {name.removeprefix(f"h.{layer}."): w for name, w in weights.items() if name.startswith(f"h.{layer}.")}
        x = x + attention(block, layer_norm(x, block["ln_1.weight"], block["ln_1.bias"]), n_head)
        x = x + feed_forward(block, layer_norm(x, block["ln_2.weight"], block["ln_2.bias"]), activation)
    return layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"]) @ weights["wte.weight"].T


def layer_norm(x: Array, gain: Array, bias: Array) -> Array:
    """Each row to mean 0 and variance 1, then scaled and shifted."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    result: Array = (x - mean) / np.sqrt(variance + 1e-5) * gain + bias
    return result


def attention(block: dict[str, Array], x: Array, n_head: int) -> Array:
    """Each token looks at itself and the tokens before it, once per head."""
    T, C = x.shape
    D = C // n_head
    qkv = x @ block["attn.c_attn.weight"].T + block["attn.c_attn.bias"]
    q, k, v = qkv[:, :C], qkv[:, C : 2 * C], qkv[:, 2 * C :]
    y = np.zeros((T, C))
    for head in range(n_head):
        part = slice(head * D, (head + 1) * D)
        for t in range(T):
            scores = k[: t + 1, part] @ q[t, part] / np.sqrt(D)
            p = np.exp(scores - scores.max())
            y[t, part] = p / p.sum() @ v[: t + 1, part]
    return y @ block["attn.c_proj.weight"].T + block["attn.c_proj.bias"]


def feed_forward(block: dict[str, Array], x: Array, activation: str) -> Array:
    """Four times as wide in the middle, with GELU: x times the normal distribution up to x, or its tanh form."""
    x = x @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"]
    if activation == "gelu":
        x = x * np.vectorize(lambda a: 0.5 * (1 + math.erf(a / math.sqrt(2))))(x)
    else:
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]


def sampling_probabilities(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """The distribution (V,) that one token is drawn from: temperature, then top-k, then top-p of what is left."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[:top_k] if top_k else order
    total, before = p[kept].sum(), 0.0
    chosen: list[int] = []
    for token in kept:
        if chosen and before >= top_p * total:
            break
        chosen.append(int(token))
        before += p[token]
    result: Array = np.zeros_like(p)
    result[chosen] = p[chosen] / p[chosen].sum()
    return result
