"""AdamW as in GPT-3: decay for matrices, none for biases and norms; one fused kernel where the device has it."""

import torch
from torch import Tensor

from regpt2.training.optimizer import OptimConfig

_FUSED_ON = ("cpu", "cuda")  # not "mps": its kernel does not look at found_inf, so a bad update would be made


def build(named_parameters: list[tuple[str, Tensor]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with two groups: tensors of two dimensions and more decay, the rest do not."""
    parameters = [p for _, p in named_parameters]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED_ON and p.dtype.is_floating_point for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
