"""How long a training step takes here. In: a `StepWork`; out: its `StepTimes`, measured in a process of its own.

The step is training's own `train_step`, on random tokens. A fresh process for each, so that compiled code, cached
memory and threads of earlier work do not count, and the peak memory is the step's own.

    python -m regpt2.machine.speed.steps WORK      the measuring process; `measure` starts it with the work as JSON
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from regpt2.base.console import say
from regpt2.base.device import (
    Precision,
    choose_compute,
    compiles,
    device_name,
    is_out_of_memory,
    peak_bytes,
    pick_device,
    synchronize,
)
from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.base.shelves import extended, load, plugin_files, use_plugins
from regpt2.machine.speed.lecture_steps import LecturePart, lecture_model, unfused_adamw
from regpt2.machine.speed.rates import attention_kernel
from regpt2.model.architecture import config_class
from regpt2.model.flops import flops_per_token
from regpt2.model.language_model import GPTConfig
from regpt2.training.lora import LoraConfig, with_adapters
from regpt2.training.optimizer import MuonConfig, OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import LossScale, train_step


class DoesNotFit(Problem):
    """The step needs more memory than is available."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A training step on one device, and how many are timed."""

    model: GPTConfig = field(default_factory=GPTConfig)
    micro_batch: int = 4
    seq_len: int = 1024
    grad_accum_steps: int = 1
    device: str = "auto"
    precision: Precision = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    as_lecture: tuple[LecturePart, ...] = ()
    """Parts computed as the lecture did at first, for the ladder's lower rungs. Empty: as in `regpt2 train`."""
    warmup_steps: int = 2  # not timed: compilation and first allocations fall into them
    steps: int = 5  # timed at least; more until `seconds` have passed
    seconds: float = 0.0
    seed: int = 1337

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.micro_batch * self.seq_len * self.grad_accum_steps


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    step_s: list[float]  # of each timed step
    losses: list[float]  # of every step, warm-up included, in nats: they show that the work was done, and correct
    grad_norms: list[float]  # of every step, warm-up included
    tokens: int  # of one step
    flops_per_token: float
    setup_s: float  # from the start of the process to the first timed step: imports, weights, compiling, warm-up
    peak_bytes: int
    device: str
    precision: str
    compiled: bool
    attention: str  # the kernel that computed it (machine/speed/rates.py)
    torch: str

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.median_s


def measure(work: StepWork, *, timeout_s: float = 3600.0, on_step: Callable[[int], None] | None = None) -> StepTimes:
    """Time a step in a fresh process; `on_step` gets the number of finished steps.

    Raises:
        DoesNotFit: the step runs out of memory.
        Problem: it fails otherwise, or takes longer than `timeout_s`.
    """
    given = [json.dumps(dataclasses.asdict(work)), *plugin_files()]
    command = [sys.executable, "-m", "regpt2.machine.speed.steps", *given]
    answer: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as complaints,  # warnings of libraries, and the trace of a crash
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        assert process.stdout is not None
        alarm = threading.Timer(timeout_s, process.kill)
        alarm.daemon = True  # after Ctrl-C nothing waits for it
        try:
            alarm.start()
            for line in process.stdout:
                answer = json.loads(line)
                if on_step is not None and "done" in answer:
                    on_step(answer["done"])
            code = process.wait()
            late = not alarm.is_alive()
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
        complaints.seek(0)
        last_words = complaints.read().strip().rsplit("\n", 1)[-1][:300]
    if "step_s" in answer:
        return StepTimes(**answer)
    if late:
        raise Problem(f"the step was not timed within {timeout_s:.0f} s.")
    if answer.get("does_not_fit") or code == -9:  # the system kills a process that takes all memory
        raise DoesNotFit(str(answer.get("failed", "the system killed it, as it does when memory runs out")))
    raise Problem(str(answer.get("failed", f"the measuring process ended with exit code {code}. {last_words}")))


def read_work(table: dict[str, Any]) -> StepWork:
    """A `StepWork` from the JSON of its `dataclasses.asdict`."""
    muon = {**table["optim"]["muon"], "ns_coefficients": tuple(table["optim"]["muon"]["ns_coefficients"])}
    optim = {**table["optim"], "betas": tuple(table["optim"]["betas"]), "muon": MuonConfig(**muon)}
    kind = extended(OptimConfig, "training.optim", [optim["name"]])
    if kind is not OptimConfig:
        optim[optim["name"]] = load("training.optim", optim["name"]).Options(**optim[optim["name"]])
    model = config_class(table["model"]["architecture"])(**table["model"])
    parts = {"model": model, "optim": kind(**optim), "lora": LoraConfig(**table["lora"])}
    return StepWork(**{**table, **parts, "as_lecture": tuple(table["as_lecture"])})


def time_steps(work: StepWork, *, began_at: float, on_step: Callable[[int], None]) -> StepTimes:
    """Build model and optimizer, run the warm-up steps, then time steps, in this process."""
    device, parts = pick_device(work.device), work.as_lecture
    compute = choose_compute(work.precision, device, keep_freed_memory="default_malloc" not in parts)
    if "default_matmul" in parts:
        torch.set_float32_matmul_precision("highest")
    world = World(rank=0, local_rank=0, size=1, device=device)
    compiled = compiles(work.compile, device)
    model = with_adapters(
        lecture_model(work.model, parts, compute.dtype, work.seed).to(device), work.lora, seed=work.seed
    )
    dtype = torch.float32 if "autocast" in parts else compute.dtype
    trainable = make_trainable(model, dtype, world, compiled=compiled)
    unfused = "unfused_adamw" in parts
    optimizer = unfused_adamw(model, work.optim) if unfused else build_optimizer(model, work.optim, compiled=compiled)
    scale = LossScale(factor=2.0**16) if compute.needs_scaler else None
    batches = _random_batches(work, device)
    losses, grad_norms, step_s, setup_s = list[float](), list[float](), list[float](), 0.0
    while len(losses) < work.warmup_steps + work.steps or sum(step_s) < work.seconds:
        if len(losses) == work.warmup_steps:
            setup_s = time.time() - began_at
        synchronize(device)
        started_at = time.perf_counter()
        stats = train_step(
            trainable, optimizer, batches, lr=work.optim.lr, grad_clip=work.optim.grad_clip, world=world, scale=scale
        )
        synchronize(device)
        elapsed_s = time.perf_counter() - started_at
        losses.append(float(stats.loss))
        grad_norms.append(float(stats.grad_norm))
        if len(losses) > work.warmup_steps:
            step_s.append(elapsed_s)
        on_step(len(losses))
    return StepTimes(
        step_s=step_s,
        losses=losses,
        grad_norms=grad_norms,
        tokens=work.tokens,
        flops_per_token=flops_per_token(work.model, work.seq_len, lora_rank=work.lora.rank),
        setup_s=setup_s,
        peak_bytes=peak_bytes(device),
        device=device_name(device),
        precision=compute.precision,
        compiled=compiled,
        attention=attention_kernel(lambda: trainable(*batches[0])),
        torch=torch.__version__,
    )


def _random_batches(work: StepWork, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(B, T) inputs and targets for each micro-step: random ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(work.seed)
    size = (work.grad_accum_steps, work.micro_batch, work.seq_len + 1)
    ids = torch.randint(0, work.model.vocab_size, size, generator=generator).to(device)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


def main() -> int:
    """The measuring process: a line of JSON for each step, and the times on the last."""
    began_at = time.time()

    def tell(answer: dict[str, Any]) -> None:
        say(json.dumps(answer))

    try:
        use_plugins(sys.argv[2:])
        work = read_work(json.loads(sys.argv[1]))
        times = time_steps(work, began_at=began_at, on_step=lambda done: tell({"done": done}))
    except Problem as problem:
        tell({"failed": str(problem)})
        return problem.exit_code
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip().split("\n")[0] or type(error).__name__
        tell({"failed": said, "does_not_fit": is_out_of_memory(error)})
        return 1
    tell(dataclasses.asdict(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
