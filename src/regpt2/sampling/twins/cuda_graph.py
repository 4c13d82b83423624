"""One token at a time on a GPU. In: a GPT-2 and its cache; out: a step of fixed shapes, recorded and replayed.

A small model's step is about two hundred kernels of a few microseconds, and starting one from Python takes longer than
that. A CUDA graph starts all at once. Recording takes as long as a few steps; torch.compile would take a minute.
"""

import torch
from torch import Tensor

from regpt2.base.console import warn
from regpt2.model.gpt import GPT
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.twins.twin import may_have_twin

# B sequences, C = n_embd, H = n_head, D = C / H, S places in the cache

_WORTH_RECORDING = 16  # tokens


class _StaticLayer:
    """One block's part of a cache: a new key goes to the place in `position`, and `mask` hides later ones."""

    def __init__(self, k: Tensor, v: Tensor, position: Tensor, mask: Tensor) -> None:
        self.k, self.v, self.position = k, v, position  # two of (B, H, S, D), (1,)
        self.mask: Tensor | None = mask  # (1, 1, 1, S)

    def n_keys(self, T: int) -> int:
        return self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, H, 1, D) -> (B, H, S, D)
        return self.k.index_copy_(2, self.position, k), self.v.index_copy_(2, self.position, v)

    def append_documents(self, numbers: Tensor) -> Tensor:
        raise NotImplementedError("GPT-2's attention does not depend on documents")


class StaticStep:
    """A pass over one token of each sequence: the position is a tensor, so the kernels are the same at every position.

    `k` and `v` belong to a KVCache, which holds the tokens before.
    """

    def __init__(self, model: GPT, k: Tensor, v: Tensor) -> None:  # k, v: (n_layer, B, H, S, D)
        self.model, self.k, self.v = model, k, v
        self.ids = torch.zeros(k.shape[1], 1, dtype=torch.int64, device=k.device)  # (B, 1)
        self.position = torch.zeros(1, dtype=torch.int64, device=k.device)
        self.places = torch.arange(k.shape[3], device=k.device).view(1, 1, 1, -1)  # (1, 1, 1, S)
        self.seen = self.places < 0  # (1, 1, 1, S)
        self.layers = [_StaticLayer(*both, self.position, self.seen) for both in zip(k, v, strict=True)]

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Ids (B,), the tokens at `position`, -> logits (B, V) after them."""
        self.ids.copy_(ids.view(-1, 1))
        self.position.fill_(position)
        return self.run()

    def run(self) -> Tensor:
        """Logits (B, V) after `ids` at `position`, whose keys and values are overwritten."""
        torch.le(self.places, self.position, out=self.seen)
        x = self.model.wte(self.ids) + self.model.wpe(self.position)  # (B, 1, C)
        for block, cache in zip(self.model.h, self.layers, strict=True):
            x = block(x, cache)
        return self.model.head(self.model.ln_f(x)[:, -1])


class RecordedStep(StaticStep):
    """A step recorded once and replayed: the next step overwrites the logits."""

    def __init__(self, model: GPT, k: Tensor, v: Tensor, position: int) -> None:
        super().__init__(model, k, v)
        self.position.fill_(position)  # the first token overwrites what recording leaves in the cache
        with torch.cuda.device(k.device):
            self._record()

    def _record(self) -> None:
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries initialize in the first runs, which cannot be recorded
            for _ in range(2):
                super().run()
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use CUDA meanwhile
            self.logits = super().run()

    def run(self) -> Tensor:
        self.graph.replay()
        return self.logits


def recorded_if_faster(model: LanguageModel, k: Tensor, v: Tensor, position: int, n_tokens: int) -> StaticStep | None:
    """A recorded step if it is faster for `n_tokens` from `position` on: for GPT-2, on a GPU."""
    if k.device.type != "cuda" or n_tokens < _WORTH_RECORDING or not may_have_twin(model):
        return None
    try:
        return RecordedStep(model, k, v, position)
    except RuntimeError as error:
        warn(f"generation is slower than it could be: no CUDA graph here ({str(error).splitlines()[0]}).")
        return None
