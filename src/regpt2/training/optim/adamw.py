"""AdamW as in GPT-3: decay for matrices, none for biases and norms; one fused kernel where the device has it."""

import torch

from regpt2.base.ranks.world import World
from regpt2.training.optimizer import AdamW, NamedParameters, OptimConfig, can_fuse, parameter_groups

IGNORES = ("muon",)
MEANS = (2, 2)


def build(
    named_parameters: NamedParameters, config: OptimConfig, world: World, compiled: bool
) -> torch.optim.Optimizer:
    """torch's own code; every rank makes the whole update, or that of its shards."""
    fused = can_fuse([p for _, p in named_parameters])
    groups = parameter_groups(named_parameters, config)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
