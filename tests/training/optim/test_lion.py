"""Lion against a scalar loop."""

import math

import pytest
import torch

from regpt2.base.ranks.world import World
from regpt2.training.optim import lion
from regpt2.training.optimizer import OptimConfig

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def test_updates_are_those_of_a_scalar_loop() -> None:
    weight, norm = torch.tensor([[0.5, -0.25], [0.0, 2.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    config = OptimConfig(name="lion", lr=0.01, weight_decay=0.5, betas=(0.95, 0.98))
    optimizer = lion.build([("h.0.weight", weight), ("ln_f.weight", norm)], config, ALONE, False)
    w, m = [*weight.flatten().tolist(), 1.0], [0.0] * 5
    for step in range(20):
        gradient = [math.sin(7 * step + i + 0.3) for i in range(5)]
        weight.grad = torch.tensor(gradient[:4], dtype=torch.float64).view(2, 2)
        norm.grad = torch.tensor(gradient[4:], dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            decay = 0.5 if i < 4 else 0.0
            direction = math.copysign(1.0, 0.95 * m[i] + 0.05 * g)
            w[i] -= 0.01 * (direction + decay * w[i])
            m[i] = 0.98 * m[i] + 0.02 * g
    assert [*weight.flatten().tolist(), norm.item()] == pytest.approx(w, abs=1e-14)
