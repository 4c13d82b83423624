"""The same bits again? Loss and gradient of two blocks at the real width, twice; and what deterministic kernels cost.

A figure, not a verdict: training promises equal bits on one device only where its kernels give them.
"""

import os

import torch

from gpu_items import Check
from gpu_timing import TINY, call_times, spread
from regpt2.base.device import choose_compute, pick_device
from regpt2.base.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.parallel import make_trainable


def run(check: Check) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for its deterministic algorithms
    device = pick_device(check.device)
    dtype = choose_compute("auto", device).dtype
    for compiled in (False,) if check.smoke else (False, True):
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            torch.compiler.reset()
            name = f"{'compiled' if compiled else 'eager'}, {'deterministic' if deterministic else 'default'} kernels"
            check.keep(name, **twice(check, device, dtype, compiled=compiled))


def twice(check: Check, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> dict[str, object]:
    world = World(rank=0, local_rank=0, size=1, device=device)
    model = GPT(TINY if check.smoke else GPTConfig(n_layer=2), seed=1).to(device)
    trainable = make_trainable(model, dtype, world, compiled=compiled)
    shape = (2, 33) if check.smoke else (32, 1025)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = trainable(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    gradients()  # compiling, choosing kernels
    tries = [{name: g.clone() for name, g in gradients().items()} for _ in range(2 if check.smoke else 5)]
    differing = sorted({n for one in tries[1:] for n, g in one.items() if not torch.equal(g, tries[0][n])})
    few = {"calls": 2, "warmup": 1} if check.smoke else {}
    times = spread(call_times(gradients, device, **few))
    return {"same_bits": not differing, **times, "differing": ", ".join(differing[:3]), "all_differing": differing}
