"""The interface of every language model here, and the shape that all have. In: token ids; out: logits, or a mean loss.

GPT-2 (gpt.py) and the modern one (modern.py) have a page each. All other code knows them by this interface alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from regpt2.base.errors import ConfigError
from regpt2.model.kernels.activation import GELU_FORMS, Activation

# B sequences, T tokens, S = T + tokens in the cache, C = n_embd, H = n_head, D = C / H

GPT2_CONTEXT = 1024  # tokens
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def has_token_rows(name: str) -> bool:
    """Is this parameter a matrix with a row for each token, and behind them rows of padding, which are zero?"""
    return name in ("wte.weight", "lm_head.weight") or name.startswith("wve.")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are the 124M model."""

    architecture: str = "gpt2"
    """gpt2, or modern, which has switches of its own."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of n_head."""
    block_size: int = 1024
    """The longest context that the model can take, in tokens."""
    vocab_size: int = 50257
    """Real tokens: 50,000 merges + 256 bytes + <|endoftext|>."""
    vocab_multiple: int = 64
    """Pad the rows of the embedding matrix to a multiple of this, for faster matmuls: 50257 -> 50304."""
    activation: Activation = "gelu_tanh"
    """gelu_tanh, GPT-2's approximation, or gelu, the exact one (erf), which nanoGPT has used since May 2023."""
    dropout: float = 0.0
    """Dropout of embeddings, residuals and GPT-2's attention; 0 for pre-training on more data than parameters."""

    def __post_init__(self) -> None:
        if self.architecture != type(self).architecture:
            raise ConfigError(
                f"model.architecture = {self.architecture!r:.80} must be {type(self).architecture!r} here."
            )
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ConfigError(
                f"model.n_embd = {self.n_embd} must be a multiple of model.n_head = {self.n_head}; "
                f"the nearest is {nearest}."
            )
        if self.activation not in GELU_FORMS:
            raise ConfigError(f"model.activation = {self.activation!r:.80} must be {' or '.join(GELU_FORMS)}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout = {self.dropout} must be at least 0 and below 1.")

    @property
    def gelu_form(self) -> Literal["tanh", "none"]:
        """What F.gelu takes as `approximate`."""
        return GELU_FORMS[self.activation]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix. The rows past vocab_size are zero and stay zero."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class LayerCache(Protocol):
    """Keys and values of the tokens before, for one block (see sampling/generate.py)."""

    mask: Tensor | None
    """Which of all keys the new queries see (B or 1, 1, T, S); None: as in causal attention."""

    def n_keys(self, T: int) -> int:
        """S: how many keys the next T tokens get, their own among them."""
        ...

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new (B, H, T, D) and return all that they may see (B, H, S, D).

        In the order of the sequence, but for one query, for which the order is free.
        """
        ...

    def append_documents(self, numbers: Tensor) -> Tensor:
        """Keep the numbers of documents (B, T), counted from the last token before, and return all (B, S).

        For a model whose attention depends on them. They come in the order of the keys.
        """
        ...


class LanguageModel(nn.Module, ABC):
    """Ids in, logits out. It holds nothing but parameters, so it can be made on the device "meta" and then filled."""

    config: GPTConfig
    h: nn.ModuleList
    """The blocks, which only their own page calls."""
    trained_seq_len: int | None = None
    """Tokens of the sequences that its weights were trained on; None: unknown, so block_size."""

    window: int = 0
    """Tokens that attention reaches back now, the token itself included; 0: all before."""

    def set_window(self, tokens: int) -> None:
        """Let attention reach back this far from now on: while training it may grow (schedule.window_from)."""
        self.window = tokens

    @property
    def context_size(self) -> int:
        """The longest context that training has seen; evaluation and sampling exceed it only on request."""
        return self.trained_seq_len or self.config.block_size

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights."""

    def n_params(self) -> int:
        """Parameters, without the padding rows of the vocabulary: 124,439,808 for GPT-2's 124M model."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        padded = [p for name, p in self.named_parameters() if has_token_rows(name)]
        return sum(p.numel() for p in self.parameters()) - sum(padding * p.shape[1] for p in padded)

    @abstractmethod
    def hidden(
        self,
        ids: Tensor,
        caches: list[LayerCache] | None = None,
        position: int | Tensor = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Ids (B, T) -> what the head reads (B, T, C).

        `position` is the place of the first id in its sequence, or the places (B,) of one id of each row, whose mask
        the caches then have. `dtype` is the compute type, by default the weights'.
        """

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., vocab_size): the padding rows never leave this method."""

    @abstractmethod
    def forward(self, ids: Tensor, targets: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean loss in nats per token, the logits never whole."""


def places_of(position: int | Tensor, T: int, block_size: int) -> slice | Tensor:
    """Which of the learned positions T ids take: a slice (T), or for one id of each row (B, 1)."""
    if isinstance(position, Tensor):
        return position[:, None]
    if position + T > block_size:
        raise ValueError(f"{position + T} tokens do not fit into block_size = {block_size}")
    return slice(position, position + T)
