"""Head and loss on the dry GPU. In: tokens and a method; out: a line of JSON with peak memory and bytes moved.

    run.sh DIR loss_bytes.py --tokens 65536 --mode compiled --loss ours

traffic.py counts three kinds of bytes: of Inductor's kernels, of torch's operators, and of this project's Triton
kernels. Our own operator is opaque to the compiler, so it is called once more, uncompiled, to count its inside.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import counts
import torch
import traffic
from torch import Tensor
from torch.nn import functional as F

from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels.loss import linear_cross_entropy


def lecture_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, softcap: float) -> Tensor:
    """The lecture's way: all logits, padding included, widened for the loss."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets)


LOSSES = {"ours": linear_cross_entropy, "lecture": lecture_loss}
COPY_BYTES_PER_S = 3.9e12  # assumed rate of a copy on an H200: 81 % of the 4.8e12 on its data sheet
UPDATE_TOKENS = 524_288


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--width", type=int, default=GPTConfig().n_embd)
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--mode", choices=["compiled", "eager"], default="compiled")
    parser.add_argument("--loss", choices=list(LOSSES), default="ours")
    return parser.parse_args()


class Work:
    """Head and loss, forward and backward."""

    def __init__(self, options: argparse.Namespace) -> None:
        device, model = torch.device("cuda"), GPTConfig()
        self.hidden = torch.zeros(options.tokens, options.width, dtype=torch.bfloat16, device=device)
        self.weight = torch.zeros(model.padded_vocab_size, options.width, device=device)
        self.targets = torch.zeros(options.tokens, dtype=torch.int64, device=device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        loss = LOSSES[options.loss]

        def forward() -> Tensor:
            return loss(self.hidden, self.weight, self.targets, model.vocab_size, softcap=options.softcap)

        self.eager = forward
        compiled = options.mode == "compiled"
        self.forward: Callable[[], Tensor] = torch.compile(forward, dynamic=False) if compiled else forward

    def both(self, forward: Callable[[], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        forward().backward()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    work = Work(options)
    held_bytes = torch.cuda.memory_allocated()
    generated = traffic.Generated()
    if options.mode == "compiled":
        import torch._inductor.config as inductor

        inductor.force_disable_caches = True  # only new compilations are counted
        inductor._post_fusion_custom_pass = generated.see
    work.both(work.forward)
    first_peak_bytes = torch.cuda.max_memory_allocated() - held_bytes
    work.hidden.grad = work.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    launched = counts.during(lambda: work.both(work.forward))
    peak_bytes = torch.cuda.max_memory_allocated() - held_bytes
    with traffic.OwnKernels() as own, traffic.Operators() as seen:
        work.both(work.eager)
    operators = seen.inside + (0 if options.mode == "compiled" else seen.outside)
    moved = generated.bytes + operators + own.bytes
    return {
        "peak_bytes": peak_bytes,
        "first_peak_bytes": first_peak_bytes,  # while Inductor tries variants of its kernels
        "generated_bytes": generated.bytes,
        "operator_bytes": operators,
        "own_kernel_bytes": own.bytes,
        "moved_bytes": moved,
        "ms_per_update": 1e3 * moved / options.tokens * UPDATE_TOKENS / COPY_BYTES_PER_S,
        "launched": launched,
    }


def main() -> None:
    options = read_options()
    counts.now()
    print(json.dumps(vars(options) | measure(options)))


if __name__ == "__main__":
    main()
