"""GPT-2, the whole model on one page. In: token ids (B, T); out: logits (B, T, vocab_size), or the mean loss in nats.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", with GPT-2's own parameter names.
"""

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.loss import linear_cross_entropy
from regpt2.model.kernels.norm import layer_norm
from regpt2.model.kernels.recompute import recomputed
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache, places_of

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "Embedding", "GPTConfig", "LayerNorm", "Linear", "is_plain"]

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H, S = T + tokens in the cache, V = padded_vocab_size


class Linear(nn.Linear):
    """nn.Linear whose weights are rounded to the type of the activations where they are used.

    Here, and not for the whole model at once, so that each gradient is ready as soon as its layer's backward pass is.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding that draws no numbers: `init_weights` does, or a file has them. On "meta" that spares 3 s."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weights are never rounded: bf16 has steps of 1/128 above 1, an update moves them by 1/2000."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return layer_norm(x, self.weight, self.bias, self.eps)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it, with n_head different eyes."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        mask = None if cache is None else cache.mask
        y = causal_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, mask=mask)  # (B, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Each token by itself: four times wider, a nonlinearity, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.gelu_form, self.dropout = config.gelu_form, config.dropout

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, 4C)
        x = recomputed(lambda x: self.c_proj(F.gelu(x, approximate=self.gelu_form)), x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(LanguageModel):
    """GPT-2 with a tied head: `wte` is both the embedding and, transposed, the projection to logits."""

    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)
        if not self.wte.weight.is_meta:
            self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, 0.02), and less where a block adds to the residual stream (GPT-2 paper, section 2.3)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # two additions per block
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=residual_std, generator=generator)
            elif p.dim() == 2:
                p.normal_(std=0.02, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)  # LayerNorm weights
        self.wte.weight[self.config.vocab_size :] = 0.0

    def hidden(
        self,
        ids: Tensor,
        caches: list[LayerCache] | None = None,
        position: int | Tensor = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Ids (B, T), the first of them at `position`, -> what the head reads (B, T, C), in `dtype`."""
        places = places_of(position, ids.shape[1], self.config.block_size)
        x: Tensor = self.wte(ids) + self.wpe.weight[places]  # (B, T, C)
        x = F.dropout(x.to(dtype or x.dtype), self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i])
        x = self.ln_f(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., vocab_size): the padding rows never leave this method."""
        return F.linear(x, self.wte.weight.to(x.dtype))[..., : self.config.vocab_size]

    def forward(self, ids: Tensor, targets: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean loss in nats per token, the logits never whole."""
        x = self.hidden(ids, dtype=dtype)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size)


_PARTS: dict[str, type[nn.Module]] = {
    "": GPT,
    "h": nn.ModuleList,
    "attn": CausalSelfAttention,
    "mlp": MLP,
    **dict.fromkeys(("wte", "wpe"), Embedding),
    **dict.fromkeys(("c_attn", "c_proj", "c_fc"), Linear),
    **dict.fromkeys(("ln_1", "ln_2", "ln_f"), LayerNorm),
}


def is_plain(model: nn.Module) -> TypeGuard[GPT]:
    """Is it this page's GPT-2, no part replaced, patched or hooked? Else its weights do not define its logits."""
    for name, part in model.named_modules():
        last = name.rpartition(".")[2]
        changes = part._forward_hooks or part._forward_pre_hooks or vars(part).keys() & {"forward", "hidden", "head"}
        if type(part) is not (Block if last.isdigit() else _PARTS.get(last)) or changes:
            return False
    return True
