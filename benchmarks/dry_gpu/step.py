"""One training step on the dry GPU. In: a model and its training; out: JSON: graphs, launches, waits, memory.

    run.sh DIR step.py --model gpt2 --mode compiled --layers 12 --micro-batch 64

It runs steps of one and of four micro-steps; the difference is the cost of a further micro-step.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import counts
import torch

from regpt2.base.device import choose_compute
from regpt2.base.ranks.world import World
from regpt2.config.recipe_files import load_recipe
from regpt2.machine.speed.rates import attention_kernel
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.training.memory import Setup, step_memory
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step

LONG = load_recipe("modern_124m_long").model
MODELS: dict[str, tuple[type[GPTConfig], dict[str, Any]]] = {
    "gpt2": (GPTConfig, {}),
    "gpt2_350m": (GPTConfig, {"n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "dropout": (GPTConfig, {"dropout": 0.1}),
    "modern": (ModernConfig, {}),
    "document": (ModernConfig, {"document_mask": True}),
    "long": (type(LONG), {field.name: getattr(LONG, field.name) for field in dataclasses.fields(LONG)}),
}
SEQ_LEN = 1024
SEQ_LENS = {"long": LONG.block_size}  # of the others SEQ_LEN
MICRO_STEPS = 4
WARMUP_STEPS = 2  # the first makes the optimizer's state; all later steps are alike


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--mode", choices=["compiled", "eager"], default="compiled")
    parser.add_argument("--layers", type=int, default=0, help="0 = as many as the model has")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--precision", default="auto")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> GPTConfig:
    """The model's shape, with as many layers as asked for; a block without attention is then the last but one."""
    kind, shape = MODELS[options.model]
    if options.layers:
        shape = shape | {"n_layer": options.layers}
        if shape.get("mlp_only_layer", -1) >= options.layers:
            shape["mlp_only_layer"] = options.layers - 2
    return kind(**shape)


class Training:
    """A model, its optimizer and a micro-batch on the dry GPU."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config = config_of(options)
        self.compiled = options.mode == "compiled"
        self.micro_batch, self.seq_len = options.micro_batch, SEQ_LENS.get(options.model, SEQ_LEN)
        self.optim = OptimConfig(name=options.optimizer)
        device = torch.device("cuda")
        compute = choose_compute(options.precision, device)
        self.precision = compute.precision
        self.world = World(rank=0, local_rank=0, size=1, device=device)
        self.model = build_model(self.config, seed=1).to(device)
        self.trainable = make_trainable(self.model, compute.dtype, self.world, compiled=self.compiled)
        self.optimizer = build_optimizer(self.model, self.optim, self.world, compiled=self.compiled)
        ids = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.int64, device=device)
        self.batch = ids, ids.clone()

    def micro_step(self) -> None:
        """Forward and backward."""
        self.trainable(*self.batch).backward()

    def step(self, micro_steps: int) -> None:
        """A whole update."""
        batches = [self.batch] * micro_steps
        train_step(self.trainable, self.optimizer, batches, lr=1e-3, grad_clip=1.0, world=self.world)

    def planned(self) -> dict[str, int]:
        """Bytes by part, as `regpt2 plan` counts them."""
        setup = Setup(
            model=self.config,
            micro_batch=self.micro_batch,
            seq_len=self.seq_len,
            grad_accum_steps=MICRO_STEPS,
            precision=self.precision,
            compiled=self.compiled,
            optim=self.optim,
        )
        return step_memory(setup)


def compiler_counts() -> dict[str, Any]:
    """What torch.compile has made so far: graphs, and its breaks with their reasons."""
    found = torch._dynamo.utils.counters
    breaks = {str(reason).splitlines()[0]: n for reason, n in found["graph_break"].items()}
    return {"graphs": found["stats"]["unique_graphs"], "breaks": sum(breaks.values()), "break_reasons": breaks}


def sync_error(training: Training) -> str:
    """The first operation of a step that torch knows to wait for the device; "" if there is none."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(MICRO_STEPS)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def with_other_windows(training: Training) -> dict[str, Any]:
    """As a run lets its window grow: the graphs and waits that this adds, which should be none of either."""
    before, taken = compiler_counts(), counts.now()
    for window in (128, 256, training.model.window):
        training.model.set_window(window)
        training.step(1)
    added = {name: value - before[name] for name, value in compiler_counts().items() if name != "break_reasons"}
    return {"windows_added": added | {"waits": counts.waits(counts.now()) - counts.waits(taken)}}


def measure(training: Training) -> dict[str, Any]:
    started_at = time.time()
    training.micro_step()
    training.optimizer.zero_grad()
    found = {"first_pass_s": round(time.time() - started_at, 1), "of_model": compiler_counts()}
    for _ in range(WARMUP_STEPS):
        training.step(MICRO_STEPS)
    training.step(1)
    one = counts.during(lambda: training.step(1))
    torch.cuda.reset_peak_memory_stats()
    four = counts.during(lambda: training.step(MICRO_STEPS))
    peak_bytes = torch.cuda.max_memory_allocated()
    first = counts.during(training.micro_step)
    training.optimizer.zero_grad()
    further = {name: (four[name] - one[name]) // (MICRO_STEPS - 1) for name in four}
    planned = training.planned()
    found |= with_other_windows(training) if training.model.window else {}
    return found | {
        "of_all": compiler_counts(),
        "first_micro_step": first,
        "further_micro_step": further,
        "update": {name: one[name] - first[name] for name in one},
        "waits_in_step": counts.waits(four),
        "sync_error": sync_error(training),
        "attention": attention_kernel(training.micro_step),
        "peak_bytes": peak_bytes,
        "planned_bytes": sum(planned.values()),
        "planned_parts": planned,
    }


def main() -> None:
    options = read_options()
    counts.now()
    training = Training(options)
    shape = {"layers": training.config.n_layer, "precision": training.precision}
    print(json.dumps(vars(options) | shape | measure(training)))


if __name__ == "__main__":
    main()
