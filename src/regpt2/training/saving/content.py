"""Do the parts of a checkpoint fit together? In: a folder whose hashes are right; out: a line about what it holds."""

from pathlib import Path

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.model.files.load import load_model
from regpt2.training import lora
from regpt2.training.checkpoint import MODEL, OPTIMIZER, read
from regpt2.training.saving.best_checkpoint import figures_of


def check_content(folder: Path) -> str:
    """Do the parts of a verified checkpoint fit together? A SHA-256 cannot tell. Returns a summary line.

    Raises:
        CheckpointError: a weight or a moment is missing, of another shape than config.json says, or not finite.
    """
    model, found = load_model(folder).model, read(folder)
    _require_finite(folder / MODEL, found.model)
    _require_finite(folder / OPTIMIZER, found.optimizer)
    learning = lora.read_adapters(folder) or dict(model.named_parameters())
    shapes = {name: p.shape for name, p in learning.items()}
    kinds: dict[str, set[str]] = {name: set() for name in shapes}
    for key, tensor in found.optimizer.items():
        name, _, kind = key.rpartition("/")
        if name not in shapes or (tensor.dim() and tensor.shape != shapes[name]):
            raise CheckpointError(
                f"{folder / OPTIMIZER}: {key} {list(tensor.shape)} belongs to no weight of the model."
            )
        kinds[name].add(kind)
    for name, got in kinds.items():  # two optimizers may share a model, each with kinds of its own
        if fuller := next((other for other in kinds.values() if got < other), None):
            raise CheckpointError(f"{folder / OPTIMIZER} lacks {', '.join(sorted(fuller - got))} of {name}.")
    return f"step {found.step:,}, {len(found.model)} weights and {len(found.optimizer)} optimizer tensors, all finite"


def _require_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} has values that are not finite.")


def check_best(folder: Path) -> str:
    """The same of a best checkpoint, which has no optimizer.

    Raises:
        CheckpointError: it does not load, or a weight is not finite.
    """
    tensors = dict(load_model(folder).model.named_parameters())
    _require_finite(folder / MODEL, {name: p.detach() for name, p in tensors.items()})
    step, loss = figures_of(folder)
    return f"step {step:,}, validation loss {loss:.4f}, {len(tensors)} weights, all finite"
