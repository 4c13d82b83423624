"""A modern GPT on one page. In: token ids (B, T); out: logits (B, T, vocab_size), or the mean loss in nats.

Read it beside model/gpt.py: the names are GPT-2's, and each ingredient is a switch of `ModernConfig`, in
modern_config.py. With all of them off it is GPT-2 but for the biases of the linear layers, which it never has (PaLM,
arXiv:2204.02311, section 2).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.model.gpt import Embedding, LayerNorm, Linear
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.loss import linear_cross_entropy, softcapped
from regpt2.model.kernels.masks import Mask, document_numbers, visible_keys
from regpt2.model.kernels.mixing import mixed
from regpt2.model.kernels.norm import rms_norm
from regpt2.model.kernels.recompute import recomputed
from regpt2.model.kernels.rotary import Rotation, qk_norm, rotated, rotation_of
from regpt2.model.language_model import LanguageModel, LayerCache, has_token_rows, places_of
from regpt2.model.modern_config import ModernConfig

__all__ = ["MLP", "Block", "CausalSelfAttention", "ModernConfig", "ModernGPT", "RMSNorm"]

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H, S = T + tokens in the cache, V = padded_vocab_size


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose weights, if it has any, are never rounded, as LayerNorm's are not."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return rms_norm(x, self.weight)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it; the angle between two tells their distance."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=False)
        self.value_mix: nn.Parameter | None = None
        if config.value_embeddings:
            self.value_mix = nn.Parameter(torch.empty(1 if config.table_of(layer) is None else 2))
        self.n_head, self.qk_norm, self.dropout = config.n_head, config.qk_norm, config.dropout

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None,
        rotation: Rotation | None,
        mask: Mask | None,
        values: Tensor | None,
    ) -> Tensor:  # (B, T, C), and value embeddings (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        if self.value_mix is not None:
            v = mixed(self.value_mix, v) if values is None else mixed(self.value_mix, v, values)  # (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        q, k = self.placed(q, rotation), self.placed(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask=mask)  # (B, H, T, D)
        x = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)

    def placed(self, x: Tensor, rotation: Rotation | None) -> Tensor:  # (B, H, T, D) -> (B, H, T, D)
        """Queries or keys as attention takes them."""
        return qk_norm(x, rotation) if self.qk_norm else rotated(x, rotation)


class MLP(nn.Module):
    """Each token by itself: four times wider, a nonlinearity, and back."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.relu_squared, self.gelu_form, self.dropout = config.relu_squared, config.gelu_form, config.dropout

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, 4C)
        x = recomputed(self._nonlinearity_and_back, x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)

    def _nonlinearity_and_back(self, x: Tensor) -> Tensor:  # (B, T, 4C) -> (B, T, C)
        x = F.relu(x).square() if self.relu_squared else F.gelu(x, approximate=self.gelu_form)
        y: Tensor = self.c_proj(x)
        return y


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; one block may lack attention."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.has_attention = config.has_attention(layer)
        self.mix = nn.Parameter(torch.empty(2)) if config.x0_mixing else None  # a, b
        if self.has_attention:
            self.ln_1 = norm_of(config)
            self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm_of(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None,
        rotation: Rotation | None,
        mask: Mask | None,
        x0: Tensor,
        values: Tensor | None,
    ) -> Tensor:  # (B, T, C), what the first block reads, and value embeddings, two of (B, T, C) -> (B, T, C)
        if self.mix is not None:
            x = mixed(self.mix, x, x0)
        if self.has_attention:
            x = x + self.attn(self.ln_1(x), cache, rotation, mask, values)
        x = x + self.mlp(self.ln_2(x))
        return x


def norm_of(config: ModernConfig) -> nn.Module:
    """The norm that a config asks for."""
    if not config.rms_norm:
        return LayerNorm(config.n_embd)
    return RMSNorm(config.n_embd, elementwise_affine=not config.weightless_norms)


class ModernGPT(LanguageModel):
    """GPT-2's blocks with the ingredients that `config` switches on."""

    _window: Tensor | None = None  # (), on the device of the weights; None: there has never been one

    def __init__(self, config: ModernConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config: ModernConfig = config
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = Embedding(config.block_size, config.n_embd)
        if config.rms_norm:
            self.ln_emb = norm_of(config)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.unet_skips:
            self.skips = nn.Parameter(torch.empty(config.n_layer // 2))
        self.ln_f = norm_of(config)
        if config.untied_head:
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.value_embeddings:  # last, so that with and without them the others start from the same numbers
            self.wve = nn.ModuleList(
                Embedding(config.padded_vocab_size, config.n_embd) for _ in range(config.n_value_tables)
            )
        self.set_window(config.window)
        if not self.wte.weight.is_meta:
            self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As GPT-2's, but for what `zero_init` lets start at zero: each block then begins as the identity.

        The embedding starts as in GPT-2, though others draw it from N(0, 1): with a norm behind it, AdamW does the
        same from 0.02 at 0.02 times their learning rate. No norm is behind value embeddings: they start from N(0, 1),
        about as large as the values that they are mixed with, which come from a normed stream.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two additions per block
        for name, p in self.named_parameters():
            if self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                p.zero_()
            elif name.endswith("c_proj.weight"):
                p.normal_(std=residual_std, generator=generator)
            elif p.dim() == 2:
                p.normal_(std=1.0 if name.startswith("wve.") else 0.02, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
            elif name.endswith(".mix"):
                p.copy_(torch.tensor([1.0, 0.0]))  # the stream alone
            else:
                p.fill_(0.5 if name.endswith("value_mix") else 1.0)  # norms and skips: 1
            if has_token_rows(name):
                p[self.config.vocab_size :] = 0.0

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) of the head: its own, or the embedding's. Its rows past vocab_size are and stay zero."""
        return self.lm_head.weight if self.config.untied_head else self.wte.weight

    def set_window(self, tokens: int) -> None:
        """As LanguageModel.set_window. A compiled pass reads a tensor, for a new number would compile it again."""
        super().set_window(tokens)
        device = self.wte.weight.device
        if self._window is not None and self._window.device == device:
            self._window.fill_(tokens)
        elif tokens or self._window is not None:
            self._window = torch.tensor(tokens, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ModernGPT":
        """Whatever moves the weights: the window's tensor, which is no buffer, moves too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.set_window(self.window)
        return self

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
        head_width = config.n_embd // config.n_head
        rotation = rotation_of(position, T, head_width, x, half=config.half_rotary) if config.rotary else None
        if not config.rotary:
            x = x + self.wpe.weight[places]
        if config.rms_norm:
            x = self.ln_emb(x)
        x = x0 = F.dropout(x.to(dtype or x.dtype), config.dropout, self.training)
        tables = [table(ids).to(x.dtype) for table in self.wve] if config.value_embeddings else []  # of (B, T, C)
        mask = self._visible_keys(ids, caches)
        outputs: list[Tensor] = []  # of the first half
        for i, block in enumerate(self.h):
            mirrored = i - config.n_layer // 2
            if config.unet_skips and 0 <= mirrored < len(outputs):
                x = x + mixed(self.skips[mirrored : mirrored + 1], outputs[-1 - mirrored])
            table = config.table_of(i)
            values = None if table is None else tables[table]
            x = block(x, None if caches is None else caches[i], rotation, mask, x0, values)
            if config.unet_skips and mirrored < 0:
                outputs.append(x)
        x = self.ln_f(x)
        return x

    def _visible_keys(self, ids: Tensor, caches: list[LayerCache] | None) -> Mask | None:
        """The mask of all blocks, made once in a pass."""
        config, T = self.config, ids.shape[1]
        seen = None if caches is None else caches[0].mask  # (B, 1, 1, S) of rows at places of their own
        S = T if caches is None else caches[0].n_keys(T)
        documents = None
        if config.document_mask:
            documents = document_numbers(ids, config.end_of_text % config.vocab_size)  # (B, T); -1 is the last id
            if caches is not None:
                documents = caches[0].append_documents(documents)  # (B, S)
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        window = self._window if compiling and self._window is not None else self.window
        return visible_keys(T, S, device=ids.device, documents=documents, window=window, seen=seen)

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
