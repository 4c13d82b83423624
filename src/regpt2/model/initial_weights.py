"""Weights to begin training from. In: a loaded model, and the shape to train; out: tensors of that shape, a hash."""

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpt2.base.errors import ConfigError
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.language_model import GPTConfig, LanguageModel, has_token_rows

# No weight has another meaning or shape with them.
FREE = ("dropout", "vocab_multiple", "document_mask", "end_of_text", "window")


def require_fit(source: GPTConfig, wanted: Mapping[str, Any], name: str) -> None:
    """Refuse settings that weights of the shape `source` cannot have.

    A smaller `block_size` fits, because positions can be cut off, and a larger `vocab_size`, because rows can be added.

    Args:
        wanted: settings of `model`, all or some.
        name: of the model that has the weights, for the message.

    Raises:
        ConfigError: one of them disagrees; it names both values.
    """
    for key in sorted(wanted, key=lambda key: key != "architecture"):  # the others follow from it
        if key in FREE or not hasattr(source, key):
            continue
        value, got = wanted[key], getattr(source, key)
        smaller, larger = (type(value) is int and value < got, type(value) is int and value > got)
        if value == got or (key == "block_size" and smaller) or (key == "vocab_size" and larger):
            continue
        mend = f"leave it out, or give at most {got:,}" if key == "block_size" else "leave it out"
        raise ConfigError(
            f"model.{key} = {value!r:.80}, but {name} has {got!r}. Training that begins from a model has its shape: "
            f"{mend}."
        )


def fitted(
    model: LanguageModel, config: GPTConfig, *, new_ids: Collection[int] = (), textless: Collection[int] = ()
) -> dict[str, Tensor]:
    """The weights of `model` for a model of the shape `config`, which `require_fit` has accepted.

    The first `block_size` positions are kept, and all rows of the vocabulary. A new row is the mean of the rows of
    tokens: it is as likely as an average token, and no random number is drawn, so that ranks agree.

    Args:
        new_ids: ids that text has now and had not before; each row from the old `vocab_size` on is one of them.
        textless: ids of the old rows that no text has, which the mean leaves out.

    Returns:
        Tensors for `load_into`, fp32.
    """
    tensors = tensors_of(model)
    if "wpe.weight" in tensors:
        tensors["wpe.weight"] = tensors["wpe.weight"][: config.block_size]
    for name in filter(has_token_rows, list(tensors)) if new_ids else ():
        old = tensors[name]  # (old vocab_size, C)
        is_token = torch.ones(len(old), dtype=torch.bool).index_fill(
            0, torch.tensor([*textless], dtype=torch.long), False
        )
        mean = old[is_token].mean(dim=0, dtype=torch.float64)  # (C,)
        rows = torch.cat([old, old.new_zeros(config.vocab_size - len(old), old.shape[1])])  # (vocab_size, C)
        rows[[*new_ids]] = mean.to(rows.dtype)
        tensors[name] = rows
    return tensors


def weights_sha256(model: LanguageModel) -> str:
    """The SHA-256 of a model's weights, the same from every format that holds the same fp32 numbers.

    It is over all parameters in the order of their names, under the names and in the (out, in) orientation of
    model/gpt.py, without rows of padding: for each the line "NAME [SHAPE]" and its values as little-endian fp32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(model).items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy(), dtype="<f4").data)
    return digest.hexdigest()
