"""An update of all weights of GPT-2 (124M) from given gradients: AdamW, clipping, Muon, each several ways."""

from collections.abc import Callable

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpu_items import Check
from gpu_timing import TINY, call_times, spread
from regpt2.base.device import can_compile, pick_device
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer


def run(check: Check) -> None:
    device = pick_device(check.device)
    model = GPT(TINY if check.smoke else GPTConfig()).to(device)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    few = {"calls": 2, "warmup": 1} if check.smoke else {}
    ways: dict[str, Callable[[], object]] = {
        "AdamW, fused": torch.optim.AdamW(parameters, fused=True).step,
        "AdamW, foreach": torch.optim.AdamW(parameters, foreach=True).step,
        "AdamW, one tensor after another": torch.optim.AdamW(parameters, foreach=False, fused=False).step,
        "norm and clipping": lambda: clip_grads_with_norm_(
            parameters, 1.0, get_total_norm([p.grad for p in parameters])
        ),
    }
    muon = OptimConfig(name="muon")
    ways["Muon and AdamW, ours"] = build_optimizer(model, muon).step
    if hasattr(torch.optim, "Muon"):
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("h.")]
        ways["torch.optim.Muon, the matrices of the blocks"] = torch.optim.Muon(matrices).step
    if can_compile(device):
        ways["Muon and AdamW, ours, compiled"] = build_optimizer(model, muon, compiled=True).step
    for name, way in ways.items():  # compiled ones come last
        check.keep(name, **spread(call_times(way, device, **few)))
