"""What a weight format reads and writes. In: what files hold; out: a model's configuration, tensors and tokenizer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regpt2.model.language_model import GPTConfig

SHELF = "model.weights"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
GPT2_TOKENS, GPT2_ROWS = 50257, 50304  # many pad the matrix to the second number, and call that the vocabulary's size
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = "quantized weights, whose scales only the program that wrote them knows; get it in fp32, fp16 or bf16."


@dataclass(frozen=True)
class TokenizerRef:
    """Which tokenizer a model was trained with: its name, and the fingerprint of its vocabulary."""

    name: str
    fingerprint: str
    added: tuple[str | None, ...] = field(default=(), kw_only=True)
    """Texts of the rows beyond that vocabulary, in fine-tuned and padded models; None: the row has no text."""
    characters: str | None = field(default=None, kw_only=True)
    """If each id is a character: all characters, in the order of ids."""
    objection: str | None = field(default=None, kw_only=True, compare=False)
    """Why it is not supported, as a sentence, where files beside the weights show that."""


@dataclass(frozen=True)
class Vocabulary(TokenizerRef):
    """What is known of the tokenizer beyond its name: for an export, or from files beside the weights."""

    eot: int | None = None
    """The id of <|endoftext|>."""
    merges: bytes | None = None
    """The bytes of its `vocab.bpe`, if the tokenizer is GPT-2's or a byte-pair encoding of one's own ("bpe")."""
    chat_template: str | None = None
    """How a chat model's conversations are rendered, in Jinja."""
    end_of_turn: int | None = None
    """The id that ends an answer, if the model is a chat model."""


@dataclass(frozen=True)
class ModelFiles:
    """What a weight format reads: a model in our own parameter names and (out, in) orientation, without padding."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: TokenizerRef | None = None
    trained_seq_len: int | None = None
    """As `LanguageModel.trained_seq_len`."""
    trained_window: int | None = field(default=None, kw_only=True)
    """Attention's window in the newest update, where training had not reached `model.window` yet."""
    doubt: str | None = None
    """If the file does not state its GELU: which one is taken and why, as a sentence to follow the model's name."""
