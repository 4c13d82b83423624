"""THE LOOP. In: a recipe; out: a run folder with a trained model, its checkpoints, its record and its report."""

import math
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from regpt2.base import plugins
from regpt2.base.console import count, duration, safe_text, say, warn
from regpt2.base.device import peak_bytes, pick_device, synchronize
from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import folder_lock
from regpt2.base.signals import StopSignals
from regpt2.base.world import start_world
from regpt2.config import RunConfig, find_recipe, load_recipe, recipe_head, recipe_names
from regpt2.data.baselines import is_near_uniform
from regpt2.data.loader import MicroBatch
from regpt2.evals import EvalContext
from regpt2.job import Job, build, open_data, open_records, restore, save
from regpt2.model.flops import flops_per_token, mfu
from regpt2.model.generate import generate
from regpt2.report import write_report
from regpt2.training.schedule import learning_rate
from regpt2.training.step import StepStats, train_step


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    reason: str
    """finished, or the signal that ended it."""
    exit_code: int


def train(config: RunConfig) -> Summary:
    """Train one model by one configuration. Every rank runs this same function."""
    with start_world(pick_device(config.device)) as world, open_data(config) as tokens, StopSignals() as stop:
        job = build(config, world, tokens)  # checks everything; nothing is written before this is done
        with folder_lock(job.run) if world.is_main else nullcontext():
            return run(job, stop)


def run(job: Job, stop: StopSignals) -> Summary:
    """From where the run folder stands to the last update."""
    first, last = restore(job), job.config.max_steps  # updates already made: 0, or a checkpoint's
    if first > last:
        raise UsageError(
            f"{job.run} stands at step {first:,} already, max_steps = {last:,}; give --max-steps {first + 1}."
        )
    open_records(job, first)
    if not job.world.from_main(job.metrics.has("eval", first) or job.metrics.has("sample", first)):
        observe(job, first, saving=False)
    meter, step = Meter(job, first), first
    with closing(job.saver), closing(job.loader.batches(first + 1, last)) as batches:
        for step, batch in enumerate(batches, start=first + 1):
            meter.add(step, update(job, step, batch))
            # A checkpoint holds what the guard knows, so the guard has to have seen every update before it.
            alone_and_stopped = stop.received and job.world.size == 1
            if due(step, job.config.log_every, last) or due(step, job.config.save_every, last) or alone_and_stopped:
                meter.log(stop)
            if meter.stop_signal:
                break
            if anything_due(job.config, step):
                meter.pause()
                observe(job, step)
                meter.go_on()
    return finish(job, step, meter.stop_signal)


def update(job: Job, step: int, batch: list[MicroBatch]) -> StepStats:
    """Make update `step`: its data, its learning rate and its random numbers are functions of the step alone."""
    config, world = job.config, job.world
    device = world.device

    def seed_dropout(micro_step: int) -> None:
        torch.manual_seed(random_seed(config.seed, step, micro_step * world.size + world.rank))

    return train_step(
        job.trainable,
        job.optimizer,
        [(on_device(x, device), on_device(y, device)) for x, y in batch],
        lr=learning_rate(config.schedule, config.optim.lr, step, config.max_steps),
        grad_clip=config.optim.grad_clip,
        world=world,
        scale=job.scale,
        loss_limit=job.guard.loss_limit(),
        before_micro_step=seed_dropout if config.model.dropout else None,
    )


def on_device(ids: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes while it computes: from pinned memory, or each copy would wait for the update before."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def observe(job: Job, step: int, *, saving: bool = True) -> None:
    """All that happens between updates, each at its own rhythm. Never changes a weight or the order of the data."""
    config = job.config
    if saving and due(step, config.save_every, config.max_steps):
        save(job, step)  # first: nothing optional comes before the model is safe
    if config.eval_every and (step == 0 or due(step, config.eval_every, config.max_steps)):
        for name in config.evals.names:
            evaluate(job, step, name)
    if step and due(step, config.sample_every, config.max_steps) and job.world.is_main:
        sample(job, step)


def due(step: int, every: int, last: int) -> bool:
    """Is it this step's turn? Every `every` steps and at the last; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


def anything_due(config: RunConfig, step: int) -> bool:
    """Is there something to observe at this step?"""
    rhythms = (config.save_every, config.eval_every, config.sample_every)
    return any(due(step, every, config.max_steps) for every in rhythms)


def random_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of dropout for one micro-batch of one update, counted over all ranks."""
    return (seed * 1_000_003 + step) * 65_537 + micro_batch & 0x7FFF_FFFF_FFFF_FFFF


def evaluate(job: Job, step: int, name: str) -> None:
    """One evaluation. Whatever goes wrong in it is recorded, and training goes on."""
    started_at = time.perf_counter()
    config = job.config
    context = EvalContext(
        model=job.plain,
        world=job.world,
        data=job.data,
        seq_len=config.batch.seq_len,
        batch=config.batch.micro_batch,
        val_tokens=config.evals.val_tokens,
    )
    try:
        figures = plugins.load("evals", name).evaluate(context)
    except Exception as error:  # out of memory, no network, a bug in an entry: none may cost the run
        note(job, step, f"evaluation {name} failed at step {step} ({type(error).__name__}: {error}); training goes on")
        return
    job.results[name] = figures
    job.metrics.log("eval", step, eval=name, **figures, elapsed_s=time.perf_counter() - started_at)
    if job.world.is_main:
        shown = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items() if value is not None)
        say(f"step {step:>6,} | {name}: {shown}")


def sample(job: Job, step: int) -> None:
    """Let the model write. Its random numbers are its own."""
    options, tokenizer, device = job.config.sample, job.tokenizer, job.world.device
    ids = tokenizer.encode(options.prompt) or [tokenizer.eot]
    room = job.config.model.block_size - len(ids)
    try:
        rows = generate(
            job.model,
            torch.tensor([ids] * options.n, device=device),
            min(options.max_new_tokens, room),
            temperature=options.temperature,
            top_k=options.top_k,
            generator=torch.Generator(device).manual_seed(random_seed(job.config.seed, step, 0)),
        )
    except Exception as error:
        note(job, step, f"sampling failed at step {step} ({type(error).__name__}: {error}); training goes on")
        return
    texts = [tokenizer.decode(row) for row in rows.tolist()]
    job.metrics.log("sample", step, prompt=options.prompt, texts=texts)
    for text in texts[:1]:
        say(f"step {step:>6,} | sample: {safe_text(text)}")


def note(job: Job, step: int, text: str) -> None:
    """Something that a reader of the record should know."""
    job.metrics.log("note", step, text=text)
    if job.world.is_main:
        warn(text)


class Meter:
    """Loss, speed and time left. Reads the device only when a line is due; the clock stands still while observing."""

    def __init__(self, job: Job, first: int) -> None:
        self.job, self.first = job, first
        self.stop_signal: int | None = None
        self._pending: list[tuple[int, StepStats]] = []
        self._began_at = time.perf_counter()
        self._busy_s = 0.0
        self._training_s = 0.0
        self._spoke_at = 0.0
        self._flops = flops_per_token(job.config.model, job.config.batch.seq_len)

    def add(self, step: int, stats: StepStats) -> None:
        """Remember an update without reading it."""
        self._pending.append((step, stats))

    def pause(self) -> None:
        """Stop the clock, once the device has done what it was asked."""
        synchronize(self.job.world.device)
        self._busy_s += time.perf_counter() - self._began_at

    def go_on(self) -> None:
        """Start it again."""
        self._began_at = time.perf_counter()

    def log(self, stop: StopSignals) -> None:
        """Read all pending updates, record them, and learn whether any rank was asked to stop."""
        job, world = self.job, self.job.world
        rows = torch.stack([torch.stack([s.loss, s.grad_norm, s.accepted]) for _, s in self._pending]).tolist()
        self.stop_signal = int(world.max(torch.tensor(float(stop.received or 0), device=world.device))) or None
        self.pause()
        step_s = self._busy_s / len(rows)
        self._training_s += self._busy_s
        tokens_per_s = job.config.batch.batch_tokens / step_s
        used = mfu(tokens_per_s, self._flops, job.peak_flops, world.size)
        for (step, _), (loss, grad_norm, accepted) in zip(self._pending, rows, strict=True):
            job.metrics.log(
                "train",
                step,
                loss=loss,
                grad_norm=grad_norm,
                lr=learning_rate(job.config.schedule, job.config.optim.lr, step, job.config.max_steps),
                step_ms=1e3 * step_s,
                tokens_per_s=tokens_per_s,
                mfu=used,
                tokens=step * job.config.batch.batch_tokens,
                skipped=not accepted,
            )
            if step == 1 and not is_near_uniform(loss, job.config.model.vocab_size):
                expected = math.log(job.config.model.vocab_size)
                note(job, step, f"the first loss is {loss:.3f}; an untrained model should have ln(V) = {expected:.3f}")
            searching = job.scale is not None and job.scale.factor > 1.0  # fp16 overflows until its scale is found
            for remark in job.guard.observe(step, loss, grad_norm, accepted=bool(accepted), counted=not searching):
                note(job, step, remark)
        self._say(self._pending[-1][0], rows[-1][0], rows[-1][1], step_s, tokens_per_s, used)
        self._pending.clear()
        self._busy_s = 0.0
        self.go_on()

    def _say(
        self, step: int, loss: float, grad_norm: float, step_s: float, tokens_per_s: float, used: float | None
    ) -> None:
        """A line for the first steps, the last, and at most one in two seconds between."""
        config, now = self.job.config, time.perf_counter()
        if not self.job.world.is_main or (self.first + 3 < step < config.max_steps and now - self._spoke_at < 2.0):
            return
        self._spoke_at = now
        left_s = (config.max_steps - step) * self._training_s / (step - self.first)
        lr = learning_rate(config.schedule, config.optim.lr, step, config.max_steps)
        busy = "unknown" if used is None else f"{100 * used:.1f}%"
        say(
            f"step {step:>6,}/{config.max_steps:,} | loss {loss:.4f} | norm {grad_norm:.3f} | lr {lr:.2e} | "
            f"{1e3 * step_s:,.1f} ms | {count(tokens_per_s)} tok/s | mfu {busy} | {duration(left_s)} left"
        )


def finish(job: Job, step: int, stop_signal: int | None) -> Summary:
    """The last checkpoint on disk, the record closed, the report written."""
    if stop_signal and job.config.save_every:
        save(job, step)
    failure = job.saver.wait()
    job.world.barrier()
    reason = f"stopped by signal {stop_signal}" if stop_signal else "finished"
    elapsed_s = job.elapsed_s + time.monotonic() - job.started_at
    job.metrics.log("end", step, reason=reason, elapsed_s=elapsed_s, peak_bytes=peak_bytes(job.world.device))
    if job.world.is_main:
        say(f"{reason} at step {step:,} after {duration(elapsed_s)}, peak {peak_bytes(job.world.device) / 1e9:.2f} GB")
        bits = job.results.get("val_loss", {}).get("bits_per_byte")
        if bits is not None:
            others = "".join(f"; {name} {value:.3f}" for name, value in job.baselines.items())
            say(f"bits per byte on the validation split: this model {bits:.3f}{others}")
        report(job, step)
        if stop_signal and failure is None:
            saved = (
                "the same command goes on from here." if job.config.save_every else "nothing was saved: save_every = 0."
            )
            say(saved)
    if failure is not None:
        raise failure
    return Summary(step, reason, 128 + stop_signal if stop_signal else 0)


def report(job: Job, step: int) -> None:
    """The page of the run. A full disk here may not make a finished run a failed one."""
    try:
        say(f"the page of this run: {write_report(job.run)}")
    except (OSError, Problem) as error:
        note(job, step, f"the report could not be written ({error}); regpt2 report {job.run} makes it again")


def main(arguments: list[str]) -> int:
    """`regpt2 train RECIPE [options]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else UsageError.exit_code
    spec, options = arguments[0], arguments[1:]
    if spec.startswith("-"):
        raise UsageError(f"the recipe comes first: regpt2 train RECIPE {' '.join(arguments)}. {usage()}")
    defaults = load_recipe(spec)
    # `--data DIR` and the like are fields of RunConfig: one parser, and help that shows the recipe's own values.
    config = tyro.cli(
        RunConfig,
        prog=f"regpt2 train {spec}",
        description="\n\n".join(filter(None, recipe_head(find_recipe(spec)).split("\n"))),  # or lines would be joined
        default=defaults,
        args=options,
    )
    try:
        return train(config).exit_code
    except torch.OutOfMemoryError as error:
        raise Problem(
            f"out of memory with micro_batch = {config.batch.micro_batch} x seq_len = {config.batch.seq_len} "
            f"({str(error).splitlines()[0]}); lower --batch.micro-batch: the update stays the same."
        ) from error


def usage() -> str:
    """What `regpt2 train --help` prints: the recipes."""
    rows = [f"  {name:<18} {recipe_head(find_recipe(name)).splitlines()[0]}" for name in recipe_names()]
    return "\n".join(
        [
            "usage: regpt2 train RECIPE [--run DIR] [--data DIR] [--max-steps N] [--seed N] [--resume auto|never|must]",
            "                           [--save-every N] [--eval-every N] [--sample-every N] [--section.key VALUE ...]",
            "       regpt2 train RECIPE --help    every option, with the recipe's values",
            "       torchrun --standalone --nproc-per-node 8 -m regpt2 -- train RECIPE    on eight GPUs",
            "",
            "RECIPE is a TOML file of your own, or one of:",
            *rows,
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
