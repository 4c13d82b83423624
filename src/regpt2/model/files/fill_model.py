"""Tensors into a model and out of it. In: a model, tensors by its own names; out: the model filled, or its tensors."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.model.files.contract import QUANTIZED
from regpt2.model.language_model import SIZES, LanguageModel, has_token_rows


def give_memory(model: LanguageModel, device: str | torch.device) -> None:
    """Memory on `device` for every weight of a model that was built on "meta"; what is in it is random.

    As `model.to_empty`, which computes strides by sympy, and to import that takes 0.3 s of every start.
    """
    model._apply(lambda each: torch.empty(each.shape, dtype=each.dtype, device=device))  # type: ignore[no-untyped-call]


@torch.no_grad()
def load_into(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Copy weights into `model`, strictly; they are cast to its type, and the rows of padding set to zero.

    Args:
        tensors: as `ModelFiles.tensors`: every parameter by its name, `wte.weight` of (vocab_size, n_embd).

    Raises:
        CheckpointError: a tensor is missing, does not belong to the model, or has another shape; nothing was copied.
    """
    check_tensors(model, tensors)
    for name, place in _unpadded(model):
        place.copy_(tensors[name])
    for name, p in model.named_parameters():
        if has_token_rows(name):
            p[model.config.vocab_size :] = 0.0


def check_tensors(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Compare names and shapes with the model's, which may be on "meta"; raises as `load_into` does."""
    expected = dict(_unpadded(model))
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"tensor {name} is missing: got {len(tensors)} tensors, expected {len(expected)}.")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"tensor {name} {list(tensors[name].shape)} belongs to no GPT of this shape.")
    for name, place in expected.items():
        if tensors[name].shape != place.shape:
            sizes = ", ".join(f"{size} = {getattr(model.config, size)}" for size in SIZES)
            got, wanted = list(tensors[name].shape), list(place.shape)
            raise CheckpointError(f"tensor {name} has shape {got}, expected {wanted} by the configuration: {sizes}.")
        if not tensors[name].is_floating_point() and tensors[name].dtype != torch.bool:
            raise CheckpointError(f"tensor {name} is of type {str(tensors[name].dtype)[6:]}: {QUANTIZED}")


def tensors_of(model: LanguageModel, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every parameter by name, without padding rows: contiguous fp32, a view of the model where it can be.

    `parameters`: a copy of the model's own by name, where those are sharded.
    """
    return {name: p.detach().to(torch.float32).contiguous() for name, p in _unpadded(model, parameters)}


def _unpadded(model: LanguageModel, parameters: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    for name, p in (parameters or dict(model.named_parameters())).items():
        yield name, p[: model.config.vocab_size] if has_token_rows(name) else p
