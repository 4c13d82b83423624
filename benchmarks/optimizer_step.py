"""The cost of an update, and how orthogonal Muon's is. In: a device; out: two tables, and a JSON file.

    python benchmarks/optimizer_step.py [--device cuda] [--calls 20] [--out JSON]

It times an update of GPT-2 (124M) from given gradients by AdamW, by our Muon, eager and compiled, and by
torch.optim.Muon with AdamW for the rest. It also runs the iteration by steps, coefficients and type, on a matrix of a
block's shape with singular values 1, 1/2, 1/3, ..., and shows the root mean square distance from the orthogonal matrix
of the SVD, in singular values, and the smallest and largest of these.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpu_timing import call_times, spread
from regpt2.base.device import choose_compute, device_name, pick_device
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optim.muon import newton_schulz
from regpt2.training.optimizer import MuonConfig, OptimConfig, build_optimizer

QUICK = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257)
KELLER_JORDANS, CONVERGENT = MuonConfig.ns_coefficients, (2.0, -1.5, 0.5)
ITERATIONS = [*((steps, KELLER_JORDANS) for steps in (3, 4, 5, 6, 8)), (8, CONVERGENT), (12, CONVERGENT)]


def updates(config: GPTConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each makes one whole update of a model of its own."""
    ours, theirs = OptimConfig(name="muon"), with_gradients(config, device)
    matrices = [p for name, p in theirs.named_parameters() if name.startswith("h.") and p.dim() == 2]
    rest = [p for name, p in theirs.named_parameters() if not (name.startswith("h.") and p.dim() == 2)]
    torchs = torch.optim.Muon(matrices, lr=0.025), torch.optim.AdamW(rest, fused=True)
    ways: dict[str, Callable[[], object]] = {
        "AdamW": build_optimizer(with_gradients(config, device), OptimConfig()).step,
        "Muon": build_optimizer(with_gradients(config, device), ours).step,
    }
    if device.type == "cuda":
        ways["Muon, compiled"] = build_optimizer(with_gradients(config, device), ours, compiled=True).step
    return {**ways, "torch.optim.Muon and AdamW": lambda: [optimizer.step() for optimizer in torchs]}


def with_gradients(config: GPTConfig, device: torch.device) -> GPT:
    """A model with gradients, as after a backward pass."""
    model = GPT(config).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def errors(rows: int, columns: int, device: torch.device) -> list[dict[str, object]]:
    """A row for each iteration and type."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    values = 1 / torch.arange(1.0, rows + 1)
    matrix, polar = u * values @ vh, u @ vh
    found = []
    for steps, coefficients in ITERATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            got = newton_schulz(matrix.to(device, dtype)[None], steps, coefficients)[0].float().cpu()
            left: Tensor = torch.linalg.svdvals(got)
            found.append(
                {
                    "matrix": f"{rows} x {columns}",
                    "steps": steps,
                    "a, b, c": ", ".join(map(str, coefficients)),
                    "type": str(dtype).removeprefix("torch."),
                    "off": round(float((got - polar).norm() / rows**0.5), 4),
                    "smallest": round(float(left.min()), 3),
                    "largest": round(float(left.max()), 3),
                }
            )
    return found


def table(rows: list[dict[str, object]]) -> str:
    """As Markdown."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny model: that everything runs, not how fast")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, config = pick_device(options.device), QUICK if options.quick else GPTConfig()
    choose_compute("auto", device)
    times = [
        {
            "update": name,
            **{key: round(ms, 2) for key, ms in spread(call_times(way, device, calls=options.calls)).items()},
        }
        for name, way in updates(config, device).items()
    ]
    C = config.n_embd
    off = errors(C, C, device) + errors(C, 4 * C, device)
    print(f"{device_name(device)}, torch {torch.__version__}\n\n{table(times)}\n\n{table(off)}")
    if options.out:
        found = {"device": device_name(device), "torch": torch.__version__, "updates": times, "iterations": off}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
