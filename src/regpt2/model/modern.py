"""A modern GPT on one page. In: token ids (B, T); out: logits (B, T, vocab_size), or the mean loss in nats.

Read it beside model/gpt.py: the names are GPT-2's, and each ingredient is a switch of `ModernConfig`. With all of them
off it is GPT-2 but for the biases of the linear layers, which it never has (PaLM, arXiv:2204.02311, section 2).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regpt2.base.errors import ConfigError
from regpt2.model.gpt import Embedding, LayerNorm, Linear
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.loss import linear_cross_entropy, softcapped
from regpt2.model.kernels.masks import Mask, document_numbers, visible_keys
from regpt2.model.kernels.norm import RMS_EPS, reciprocal_rms, rms_norm, widened
from regpt2.model.kernels.recompute import recomputed
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache, places_of

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H, S = T + tokens in the cache, V = padded_vocab_size

_ROTARY_BASE = 10_000.0  # RoFormer, arXiv:2104.09864, section 3.2.2

Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, D / 2), or (B, 1, 1, D / 2)


@dataclass(frozen=True, kw_only=True)
class ModernConfig(GPTConfig):
    """The shape of a modern GPT, and what is modern in it. The defaults are the 124M model, all switches on."""

    architecture: str = "modern"
    n_head: int = 6
    """Attention heads per block, here 128 wide: modded-nanogpt's choice, with which a GPU's attention is fastest."""
    rotary: bool = True
    """Queries and keys are rotated by their position (RoFormer, arXiv:2104.09864); off: learned positions `wpe`."""
    qk_norm: bool = True
    """Queries and keys have RMS 1, so that no attention score exceeds sqrt(D) (arXiv:2010.04245; arXiv:2302.05442)."""
    relu_squared: bool = True
    """The MLP's nonlinearity is relu(x)^2 (Primer, arXiv:2109.08668); off: GELU, in the form of `activation`."""
    zero_init: bool = True
    """What ends a branch starts at zero: c_proj, an untied head (Fixup, arXiv:1901.09321; muP, arXiv:2203.03466)."""
    untied_head: bool = True
    """The head has weights of its own, `lm_head` (modded-nanogpt, 2024-11-03); off: the embedding's, transposed."""
    rms_norm: bool = True
    """RMS norm (arXiv:1910.07467) instead of LayerNorm, and one more after the embedding (modded-nanogpt)."""
    softcap: float = 15.0
    """Logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118; 15 in nanochat); 0 = off."""
    document_mask: bool = False
    """A token attends to its own document only (Llama 3, arXiv:2407.21783, section 3.2)."""
    end_of_text: int = -1
    """The id that begins a document, for document_mask; -1 is the last one. Tokens may have been added after it."""

    weightless_norms: bool = False
    """RMS norms only divide by the root mean square: they have no weights to learn (modded-nanogpt)."""
    half_rotary: bool = False
    """Only half of each head's pairs turn, at frequencies from 1 down to 1/1024 (modded-nanogpt)."""
    value_embeddings: bool = False
    """Up to three more embedding tables, `wve`, mixed into the values of the first and last blocks (modded-nanogpt)."""
    unet_skips: bool = False
    """The second half of the blocks also reads what the first half wrote, mirrored, each times a learned scalar."""
    x0_mixing: bool = False
    """Each block reads a x + b x0, x0 the normed embedding; a and b are learned, 1 and 0 at the start."""
    mlp_only_layer: int = -1
    """The number of a block without attention, from 0; -1 = none. 7 of 12 in modded-nanogpt."""
    window: int = 0
    """Tokens that attention reaches back, the token itself included; 0 = all before. Training may begin with fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ConfigError(
                f"model.dropout = {self.dropout} must be 0: the modern model has none. Remove it, "
                "or use model.architecture = gpt2."
            )
        if self.relu_squared and self.activation != GPTConfig.activation:
            raise ConfigError(
                f"model.activation = {self.activation!r} has no effect beside model.relu_squared = true: "
                "then the MLP has no GELU. Remove it, or set relu_squared = false."
            )
        if not 0 <= self.softcap < math.inf:
            raise ConfigError(f"model.softcap = {self.softcap} must be 0 (off) or more; 15 is usual.")
        if not -1 <= self.end_of_text < self.vocab_size:
            raise ConfigError(
                f"model.end_of_text = {self.end_of_text} must be an id below model.vocab_size = {self.vocab_size:,}, "
                "or -1 for the last one."
            )
        if not -1 <= self.mlp_only_layer < self.n_layer:
            raise ConfigError(
                f"model.mlp_only_layer = {self.mlp_only_layer} must be a block below model.n_layer = {self.n_layer}, "
                "or -1 for none."
            )
        if self.window < 0:
            raise ConfigError(f"model.window = {self.window} must be at least 0 (0 = all tokens before).")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ConfigError(
                f"model.n_embd / model.n_head = {self.n_embd} / {self.n_head} = {self.n_embd // self.n_head} must be "
                "even: rotary positions turn a head's dimensions in pairs. Take another n_head, or rotary = false."
            )


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose weights are never rounded, as LayerNorm's are not."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return rms_norm(x, self.weight)


def rotation_of(position: int | Tensor, T: int, D: int, like: Tensor) -> Rotation:
    """For T tokens from `position` on, or one of each row: the pair i of D / 2 turns by position * base^(-2i / D)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    frequencies = _ROTARY_BASE ** (torch.arange(0, D, 2, device=like.device, dtype=wide) / -D)  # (D / 2,)
    if isinstance(position, Tensor):
        angles = position.to(wide).view(-1, 1, 1, 1) * frequencies  # (B, 1, 1, D / 2)
    else:
        angles = torch.arange(position, position + T, device=like.device, dtype=wide).outer(frequencies)  # (T, D / 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
    """Dimension i makes a pair with i + D / 2, so that each half stays in one piece (GPT-NeoX, arXiv:2204.06745)."""
    if rotation is None:
        return x
    cos, sin = rotation
    a, b = x.chunk(2, dim=3)  # two of (B, H, T, D / 2)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)], dim=3).to(x.dtype)


def qk_norm(x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
    """Queries or keys with RMS 1, rotated. Before or after the rotation is the same: it changes no length."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return rotated(F.rms_norm(widened(x), x.shape[3:], eps=RMS_EPS), rotation).to(x.dtype)
    y: Tensor = _QKNorm.apply(x, rotation)  # type: ignore[no-untyped-call]
    return y


class _QKNorm(torch.autograd.Function):
    """Keeps its output, as attention does anyway, and one number per row: enough for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation | None) -> Tensor:
        wide = widened(x)
        r = reciprocal_rms(wide)  # (B, H, T, 1)
        y = rotated(wide * r, rotation).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.back = rotation and (rotation[0], -rotation[1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        d_y, wide = widened(d_y), widened(y)
        along = (d_y * wide).mean(dim=3, keepdim=True)  # the part that only changes the length
        return rotated(d_y.addcmul(wide, along, value=-1).mul_(r), ctx.back).to(y.dtype), None


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it; the angle between two tells their distance."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.n_head, self.qk_norm = config.n_head, config.qk_norm

    def forward(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation | None, mask: Mask | None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        q, k = self.placed(q, rotation), self.placed(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask=mask)  # (B, H, T, D)
        x = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return x

    def placed(self, x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
        """Queries or keys as attention takes them."""
        return qk_norm(x, rotation) if self.qk_norm else rotated(x, rotation)


class MLP(nn.Module):
    """Each token by itself: four times wider, a nonlinearity, and back."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.relu_squared, self.gelu_form = config.relu_squared, config.gelu_form

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, 4C)
        return recomputed(self._nonlinearity_and_back, x)  # (B, T, C)

    def _nonlinearity_and_back(self, x: Tensor) -> Tensor:  # (B, T, 4C) -> (B, T, C)
        x = F.relu(x).square() if self.relu_squared else F.gelu(x, approximate=self.gelu_form)
        y: Tensor = self.c_proj(x)
        return y


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.ln_1 = norm_of(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm_of(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: LayerCache | None, rotation: Rotation | None, mask: Mask | None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), cache, rotation, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


def norm_of(config: ModernConfig) -> nn.Module:
    """The norm that a config asks for."""
    return RMSNorm(config.n_embd) if config.rms_norm else LayerNorm(config.n_embd)


class ModernGPT(LanguageModel):
    """GPT-2's blocks with the ingredients that `config` switches on."""

    def __init__(self, config: ModernConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config: ModernConfig = config
        self.set_window(config.window)
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = Embedding(config.block_size, config.n_embd)
        if config.rms_norm:
            self.ln_emb = RMSNorm(config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm_of(config)
        if config.untied_head:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if not self.wte.weight.is_meta:
            self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As GPT-2's, but for what `zero_init` lets start at zero: each block then begins as the identity.

        The embedding starts as in GPT-2, though others draw it from N(0, 1): with a norm behind it, AdamW does the
        same from 0.02 at 0.02 times their learning rate.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two additions per block
        for name, p in self.named_parameters():
            if self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                p.zero_()
            elif name.endswith("c_proj.weight"):
                p.normal_(std=residual_std, generator=generator)
            elif p.dim() == 2:
                p.normal_(std=0.02, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)  # norms
        for weight in (self.wte.weight, self.head_weight):
            weight[self.config.vocab_size :] = 0.0

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) of the head: its own, or the embedding's. Its rows past vocab_size are and stay zero."""
        return self.lm_head.weight if self.config.untied_head else self.wte.weight

    def hidden(
        self,
        ids: Tensor,
        caches: list[LayerCache] | None = None,
        position: int | Tensor = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Ids (B, T), the first of them at `position`, -> what the head reads (B, T, C), in `dtype`."""
        T, config = ids.shape[1], self.config
        places = places_of(position, T, config.block_size)
        x: Tensor = self.wte(ids)  # (B, T, C)
        rotation = rotation_of(position, T, config.n_embd // config.n_head, x) if config.rotary else None
        if not config.rotary:
            x = x + self.wpe.weight[places]
        if config.rms_norm:
            x = self.ln_emb(x)
        x = x.to(dtype or x.dtype)
        seen = None if caches is None else caches[0].mask  # (B, 1, 1, S) of rows at places of their own
        numbers = None
        if config.document_mask:
            all_ids = ids if caches is None else caches[0].append_ids(ids)  # (B, S)
            numbers = document_numbers(all_ids, config.end_of_text % config.vocab_size)  # (B, S); -1 is the last id
        S = T if caches is None else caches[0].n_keys(T)
        mask = visible_keys(T, S, device=x.device, documents=numbers, window=self.window, seen=seen)
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], rotation, mask)
        x = self.ln_f(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., vocab_size): the padding rows never leave this method."""
        logits = F.linear(x, self.head_weight.to(x.dtype))[..., : self.config.vocab_size]
        return softcapped(logits, self.config.softcap)

    def forward(self, ids: Tensor, targets: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean loss in nats per token, the logits never whole."""
        x = self.hidden(ids, dtype=dtype)
        if targets is None:
            return self.head(x)
        config = self.config
        x, targets = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T,)
        return linear_cross_entropy(x, self.head_weight, targets, config.vocab_size, softcap=config.softcap)
