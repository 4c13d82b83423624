"""The switches of the modern GPT. In: settings of `model`; out: a shape, checked, and which block has what.

Read it beside modern.py, the page of the model.
"""

import math
from dataclasses import dataclass

from regpt2.base.errors import ConfigError
from regpt2.model.language_model import GPTConfig


@dataclass(frozen=True, kw_only=True)
class ModernConfig(GPTConfig):
    """The shape of a modern GPT, and what is modern in it. By default what long windows use is off."""

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
        self._check_ingredients()

    def _check_ingredients(self) -> None:
        if self.weightless_norms and not self.rms_norm:
            raise ConfigError("model.weightless_norms = true needs model.rms_norm = true: LayerNorm has weights here.")
        for name in ("value_embeddings", "unet_skips"):
            if getattr(self, name) and self.n_layer < 2:
                raise ConfigError(f"model.{name} = true needs model.n_layer of at least 2: it pairs blocks.")
        if self.half_rotary and not self.rotary:
            raise ConfigError("model.half_rotary = true needs model.rotary = true: without it no pair turns.")
        if self.half_rotary and self.n_embd // self.n_head % 4:
            raise ConfigError(
                f"model.n_embd / model.n_head = {self.n_embd} / {self.n_head} = {self.n_embd // self.n_head} must be "
                "a multiple of 4: half_rotary turns half of the pairs. Take another n_head, or half_rotary = false."
            )
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ConfigError(
                f"model.n_embd / model.n_head = {self.n_embd} / {self.n_head} = {self.n_embd // self.n_head} must be "
                "even: rotary positions turn a head's dimensions in pairs. Take another n_head, or rotary = false."
            )

    def has_attention(self, layer: int) -> bool:
        """Has this block attention? All have, but for `mlp_only_layer`."""
        return layer != self.mlp_only_layer

    @property
    def n_value_tables(self) -> int:
        """Value embeddings: one for each of the first blocks, at most 3, which as many of the last blocks share."""
        return min(3, self.n_layer // 2) if self.value_embeddings else 0

    def table_of(self, layer: int) -> int | None:
        """The value embedding that this block mixes in: 0, 1, 2 in the first blocks and again in the last."""
        n, left = self.n_value_tables, self.n_layer - layer
        return layer if layer < n else n - left if left <= n else None
