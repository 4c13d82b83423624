"""Causal attention. In: queries, keys, values (B, H, T, D); out: what each token gathers from itself and those before.

The mathematics is softmax(q k^T / sqrt(D)) v with the future masked; which kernel does it depends on the device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# B sequences, H heads, T queries, S keys, D = head width

_BLOCK = 256  # queries at a time: of 128, 256 and 512 the fastest at T=1024 that keeps memory well below T x T


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """(B, H, T, D) from q (B, H, T, D), k and v (B, H, S, D): the queries are the last T of S tokens."""
    T, S = q.shape[2], k.shape[2]
    if torch.compiler.is_exporting():  # one graph for every T: its value must decide nothing
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cpu" and T > 1 and (T <= _BLOCK or q.dtype == torch.bfloat16):
        return _in_blocks(q, k, v, dropout_p)
    if T in (1, S):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout_p)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # is_causal would count from the first key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout_p)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Matrix products of blocks of queries with the keys that they may see.

    On a CPU torch's flash attention spends its time in the backward pass: forward and backward together this is 5 to 8
    times faster at T = 64 and 128, and 1.7 times in bf16 at T = 1024. In fp32 at T = 1024 it is slower, and not used.
    """
    B, H, T, D = q.shape
    past = k.shape[2] - T  # tokens before the first query
    q, k, v = (z.reshape(B * H, -1, D) for z in (q, k, v))  # (B H, T, D), two of (B H, S, D)
    gathered = []
    for start in range(0, T, _BLOCK):
        end = min(T, start + _BLOCK)
        future = torch.full((end - start, past + end), float("-inf"), dtype=q.dtype).triu(past + start + 1)
        scores = torch.baddbmm(future, q[:, start:end], k[:, : past + end].transpose(1, 2), alpha=D**-0.5)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p)  # (B H, end - start, past + end)
        gathered.append(torch.bmm(weights, v[:, : past + end]))
    return torch.cat(gathered, dim=1).view(B, H, T, D)
