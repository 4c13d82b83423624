"""One token at a time on a GPU. In: a GPT-2 and its cache; out: a step of fixed shapes, recorded and replayed.

A small model's step is some two hundred kernels of a few microseconds, and starting one from Python takes longer than
that. A CUDA graph starts all at once. Recording takes a few steps' time, where torch.compile takes a minute.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.console import warn
from regpt2.model.gpt import GPT, Block
from regpt2.model.kernels.attention import without_plans
from regpt2.model.language_model import LanguageModel

# B sequences, C = n_embd, H = n_head, D = C / H, S places in the cache

_WORTH_RECORDING = 16  # tokens


class StaticStep:
    """The pass over one token of each sequence at a position that is a tensor: the same kernels at every position.

    `k` and `v` are those of a KVCache, which holds the tokens before.
    """

    def __init__(self, model: GPT, k: Tensor, v: Tensor) -> None:  # k, v: (n_layer, B, H, S, D)
        self.model, self.k, self.v = model, k, v
        self.ids = torch.zeros(k.shape[1], 1, dtype=torch.int64, device=k.device)  # (B, 1)
        self.position = torch.zeros(1, dtype=torch.int64, device=k.device)
        self.places = torch.arange(k.shape[3], device=k.device)  # (S,)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Ids (B,), the tokens at `position`, -> logits (B, V) after them."""
        self.ids.copy_(ids.view(-1, 1))
        self.position.fill_(position)
        return self.run()

    def run(self) -> Tensor:
        """Logits (B, V) after `ids` at `position`, in place of what the cache has there."""
        x = self.model.wte(self.ids) + self.model.wpe(self.position)  # (B, 1, C)
        seen = (self.places <= self.position).view(1, 1, 1, -1)  # (1, 1, 1, S)
        for layer, block in enumerate(self.model.h):
            assert isinstance(block, Block)
            x = x + self._attend(block, layer, block.ln_1(x), seen)
            x = x + block.mlp(block.ln_2(x))
        return self.model.head(self.model.ln_f(x)[:, -1])

    def _attend(self, block: Block, layer: int, x: Tensor, seen: Tensor) -> Tensor:  # (B, 1, C) -> (B, 1, C)
        B, T, C = x.shape
        qkv = block.attn.c_attn(x).view(B, T, 3, block.attn.n_head, -1)  # (B, 1, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # three of (B, H, 1, D)
        self.k[layer].index_copy_(2, self.position, k)
        self.v[layer].index_copy_(2, self.position, v)
        with without_plans():  # S is another one for each prompt
            y = F.scaled_dot_product_attention(q, self.k[layer], self.v[layer], attn_mask=seen)  # (B, H, 1, D)
        out: Tensor = block.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class RecordedStep(StaticStep):
    """The same, recorded once: the logits are overwritten by the next step."""

    def __init__(self, model: GPT, k: Tensor, v: Tensor, position: int) -> None:
        super().__init__(model, k, v)
        self.position.fill_(position)  # what the cache gets here is written over by the first token
        with torch.cuda.device(k.device):
            self._record()

    def _record(self) -> None:
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries set themselves up in the first runs, which cannot be recorded
            for _ in range(2):
                super().run()
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may go on
            self.logits = super().run()

    def run(self) -> Tensor:
        self.graph.replay()
        return self.logits


def recorded_if_faster(model: LanguageModel, k: Tensor, v: Tensor, position: int, n_tokens: int) -> StaticStep | None:
    """A recorded step where it is faster for `n_tokens` from `position` on: of a GPT-2, on a GPU."""
    if not isinstance(model, GPT) or k.device.type != "cuda" or n_tokens < _WORTH_RECORDING:
        return None
    try:
        return RecordedStep(model, k, v, position)
    except RuntimeError as error:
        warn(f"generation is slower than it could be: no CUDA graph here ({str(error).splitlines()[0]}).")
        return None
