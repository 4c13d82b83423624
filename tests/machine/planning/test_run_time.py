"""The time of a run: what a measured step says of an update on other ranks."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from regpt2.config.run import RunConfig
from regpt2.data.loader import BatchConfig
from regpt2.machine.planning import run_time
from regpt2.machine.planning.formulas import update_flops
from regpt2.machine.planning.target import Target, setup_at
from regpt2.model.modern import ModernConfig
from regpt2.training.optimizer import OptimConfig


def test_what_is_measured_of_muons_iterations_is_once_an_update_and_shared_by_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A micro-step took 1 s, 0.3 s of it the iterations: 16 micro-steps on each of 4 ranks take 16 x 0.7 + 0.3 / 4."""
    model = ModernConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=257)
    batch = BatchConfig(batch_tokens=4 * 16 * 4096, micro_batch=32, seq_len=128)
    config = RunConfig(model=model, batch=batch, optim=OptimConfig(name="muon"))
    target = Target("", torch.device("cpu"), True, None, "fp32", False, None, ranks=4)
    setup = setup_at(config, target)
    rate = update_flops(dataclasses.replace(setup, ranks=1)) / 0.3
    monkeypatch.setattr(run_time, "copy_rate", lambda *where, **how: math.inf)
    monkeypatch.setattr(run_time, "matmul_rate", lambda *what, **how: rate)
    times = SimpleNamespace(median_s=1.0, tokens=4096, step_s=[1.0])
    monkeypatch.setattr(run_time, "measure", lambda work, **how: times)
    parts = run_time.measured_time(config, setup, target)[0].parts
    assert parts == pytest.approx({"forward and backward": 16 * 0.7, "update": 0.0, "orthogonalization": 0.3 / 4})
