"""Checkpoints of nanoGPT and build-nanogpt. In: a `.pt` file; out: a model's files, and back, without running it.

nanoGPT says the model's shape in `model_args`, build-nanogpt in a pickled `GPTConfig`. Their names have the prefix
`transformer.`, and `_orig_mod.` where a compiled model was saved; the head is there a second time.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.base.files import atomic_file
from regpt2.model.foreign import SIZES, begins_with, config_of, drop_equal_head
from regpt2.model.gpt import GPT
from regpt2.model.load import ModelFiles, TokenizerRef, Vocabulary, tensors_of
from regpt2.model.pickled import read_training_checkpoint

FILES: tuple[str, ...] = ()
DTYPES = ("fp32",)
PREFIXES = ("_orig_mod.", "module.", "transformer.")
GPT2_TOKENS, GPT2_ROWS = 50257, 50304  # they give the padded size as the vocabulary's
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks


def matches(path: Path) -> bool:
    """Is the file an archive, as `torch.save` writes it?"""
    return begins_with(path, b"PK\x03\x04")


def read(path: Path) -> ModelFiles:
    """The model in the file, 16-bit weights as fp32, missing biases as zeros. Of 50304 tokens GPT-2's 50257 are taken.

    Raises:
        CheckpointError: it is damaged, holds code, or is no GPT-2.
    """
    raw, settings = read_training_checkpoint(path)
    rows, dropout = settings.get("vocab_size"), settings.get("dropout")
    sizes = settings | {"vocab_size": GPT2_TOKENS if rows == GPT2_ROWS else rows}
    config = config_of(path, sizes, dropout if isinstance(dropout, float) else 0.0)
    tensors = _our_tensors(raw)
    drop_equal_head(path, tensors)
    if "wte.weight" in tensors and tensors["wte.weight"].shape != (rows, config.n_embd):
        got = list(tensors["wte.weight"].shape)
        raise CheckpointError(f"{path}: tensor wte.weight has shape {got}, expected {[rows, config.n_embd]}.")
    if settings.get("bias") is False:  # biases of zero are the same model
        weights = [name for name in tensors if name not in ("wte.weight", "wpe.weight")]
        tensors |= {name.removesuffix("weight") + "bias": torch.zeros(len(tensors[name])) for name in weights}
    if "wte.weight" in tensors:
        tensors["wte.weight"] = tensors["wte.weight"][: config.vocab_size]
    name, fingerprint = settings.get("tokenizer"), settings.get("tokenizer_fingerprint")
    known = isinstance(name, str) and isinstance(fingerprint, str)
    return ModelFiles(config, tensors, TokenizerRef(str(name), str(fingerprint)) if known else None)


def write(model: GPT, path: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write what nanoGPT's `sample.py` takes: the weights and `model_args`."""
    tensors = tensors_of(model)
    wte = tensors["wte.weight"].clone()  # a view would be saved with the padding rows behind it
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    checkpoint: dict[str, Any] = {
        "model": state | {"transformer.wte.weight": wte, "lm_head.weight": wte},
        "model_args": {name: getattr(model.config, name) for name in (*SIZES, "dropout")} | {"bias": True},
    }
    if vocabulary is not None:
        checkpoint |= {"tokenizer": vocabulary.name, "tokenizer_fingerprint": vocabulary.fingerprint}
    with atomic_file(path) as file:
        torch.save(checkpoint, file)


def _our_tensors(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """By GPT's names, in fp32, without masks."""
    tensors = {}
    for name, tensor in raw.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if not name.endswith(_BUFFERS):
            tensors[name] = tensor.to(torch.float32)
    return tensors
