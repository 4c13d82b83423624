"""The lecture's first versions of a step. In: parts by name; out: a GPT and an optimizer with these parts as there.

Each part changes how something is computed and never what: on the same weights, loss and gradients are those of
`model/gpt.py` within rounding. They are the lower rungs of the ladder. All PLAIN parts together, in fp64, are what
`regpt2 doctor` compares a device with (agreement.py).
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.model.architecture import build_model
from regpt2.model.files.fill_model import load_into, tensors_of
from regpt2.model.gpt import GPT, MLP, Block, CausalSelfAttention
from regpt2.model.kernels.loss import reference_cross_entropy
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache
from regpt2.training.optimizer import AdamW, OptimConfig, build_optimizer

LecturePart = Literal[
    "default_matmul",  # fp32 matmuls by torch's default: on a CPU by MKL
    "default_malloc",  # freed memory goes back to the system, and each step allocates it again
    "plain_attention",  # softmax over a whole (T, T) matrix, with a mask
    "torch_attention",  # the kernel that torch chooses: on a GPU ours uses it too
    "kept_gelu",  # GELU's output is kept for the backward pass
    "autocast",  # an fp32 residual stream, rounded before each matmul
    "whole_logits",  # all (B T, V) logits, then F.cross_entropy
    "unfused_adamw",  # torch's default: on a GPU a few kernels for all tensors, on a CPU a loop over them
]

PLAIN: tuple[LecturePart, ...] = ("plain_attention", "kept_gelu", "whole_logits")
"""The parts that leave no kernel of ours."""

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H


class LectureAttention(nn.Module):
    """Our attention's own weights, another way from queries, keys and values to what is gathered."""

    def __init__(self, ours: CausalSelfAttention, *, plain: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.plain = ours.c_attn, ours.c_proj, ours.n_head, plain

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        y = self._plain(q, k, v) if self.plain else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gathered: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return gathered

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # three of (B, H, T, D) -> (B, H, T, D)
        T, D = q.shape[2:]
        scores = q @ k.transpose(2, 3) * D**-0.5  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        return torch.softmax(scores, dim=3) @ v


class LectureMLP(nn.Module):
    """Our MLP's own weights, every step of it kept for the backward pass."""

    def __init__(self, ours: MLP) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.gelu_form = ours.c_fc, ours.c_proj, ours.gelu_form

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        projected: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu_form))
        return projected


class LectureGPT(GPT):
    def __init__(self, config: GPTConfig, parts: Collection[LecturePart], dtype: torch.dtype, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.autocast_dtype = dtype if "autocast" in parts else None
        self.whole_logits = "whole_logits" in parts
        for block in self.h:
            assert isinstance(block, Block), f"a {type(block).__name__} among GPT's blocks"
            if "plain_attention" in parts or "torch_attention" in parts:
                block.add_module("attn", LectureAttention(block.attn, plain="plain_attention" in parts))
            if "kept_gelu" in parts:
                block.add_module("mlp", LectureMLP(block.mlp))

    def forward(self, ids: Tensor, targets: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        with torch.autocast(ids.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if targets is None or not self.whole_logits:
                return super().forward(ids, targets, dtype)
            x = self.hidden(ids, dtype=dtype).flatten(0, 1)  # (B T, C)
            weight = self.wte.weight.to(x.dtype)
            return reference_cross_entropy(x, weight, targets.flatten(), self.config.vocab_size)


def lecture_model(config: GPTConfig, parts: Collection[LecturePart], dtype: torch.dtype, seed: int) -> LanguageModel:
    """A model that computes in `dtype`, with the same weights for any parts and any padding of the vocabulary."""
    model = LectureGPT(config, parts, dtype, seed=seed) if parts else build_model(config, seed=seed)
    usual = replace(config, vocab_multiple=GPTConfig.vocab_multiple)
    if usual != config:  # rows of padding use up random numbers
        load_into(model, tensors_of(build_model(usual, seed=seed)))
    return model


def unfused_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Our AdamW with its groups, without fusing, as torch runs it by default."""
    fused = build_optimizer(model, config)
    groups = [{name: group[name] for name in ("params", "weight_decay")} for group in fused.param_groups]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
