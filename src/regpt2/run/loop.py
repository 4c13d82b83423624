"""THE LOOP. In: a recipe; out: a run folder with a trained model, its checkpoints, its record and its report."""

import dataclasses
import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from regpt2.base.console import duration, say
from regpt2.base.device import (
    compiles,
    device_name,
    peak_bytes,
    pick_device,
    seed_dropout,
)
from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import folder_lock
from regpt2.base.ranks.signals import StopSignals
from regpt2.base.ranks.watchdog import Watchdog
from regpt2.base.ranks.world import start_world
from regpt2.config.run import RunConfig
from regpt2.data.loader import MicroBatch
from regpt2.pages.report.write import write_report
from regpt2.run.intervals import anything_due, due, note, observe, random_seed
from regpt2.run.opening import open_records
from regpt2.run.setup import Job, build, open_data, require_room, restore, save
from regpt2.run.step_log import Meter
from regpt2.training.compiler_cache import CompilerCache
from regpt2.training.ranks.replicas import check_replicas
from regpt2.training.schedule import learning_rate
from regpt2.training.step import StepStats, accumulate, train_step


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    reason: str
    """finished, or the signal that ended it."""
    exit_code: int
    run: Path
    """The run folder."""


def train(config: RunConfig) -> Summary:
    """Train one model by one configuration. Every rank runs this same function."""
    run_folder, hang_s = Path(config.run), config.parallel.timeout_s
    exchange_s = hang_s + 60 if hang_s else 86_400.0  # so that the watchdog, which knows more, speaks first
    with (
        start_world(pick_device(config.device), timeout_s=exchange_s) as world,
        StopSignals() as stop,
        ExitStack() as held,
    ):
        with world.together():
            data = held.enter_context(open_data(config))
        held.callback(gc.unfreeze)
        watchdog = Watchdog(run_folder / "ranks", world.rank, world.size, hang_s)
        job = build(config, world, data, watchdog, stop)  # checks everything; nothing is written before this is done
        with world.together():
            if world.is_main:
                held.enter_context(folder_lock(run_folder))
        with watchdog:
            return run(job)


def run(job: Job) -> Summary:
    """From where the run folder stands to the last update."""
    config = job.config
    first, last = restore(job), config.max_steps  # updates already made: 0, or a checkpoint's
    if first > last:
        raise UsageError(
            f"{job.run} is already at step {first:,}, but max_steps = {last:,}; give at least --max-steps {first + 1}."
        )
    require_room(job, first)
    compiled = compiled_before(job)
    rehearse(job, first + 1)
    gc.freeze()  # all that is there by now stays: a collection in the middle of the run would look at 0.3M objects
    check_replicas(job.model, job.world, first)
    open_records(job, first)
    observe(job, first, done=job.world.from_main(job.metrics.observed(first)))
    meter, step, stop_signal = Meter(job, first), first, None
    with closing(job.saver), ending_recorded(job, meter), closing(job.loader.batches(first + 1, last)) as batches:
        for step, batch in enumerate(batches, start=first + 1):
            meter.add(step, update(job, step, batch.micro_batches), batch.digest)
            if compiled and step == first + 1:
                compiled.save()
            if due(step, config.parallel.check_every, last):
                check_replicas(job.model, job.world, step)
            # A checkpoint holds how many updates in a row were skipped: the guard has to have counted them before it.
            alone_and_stopped = job.stop.received and job.world.size == 1
            if due(step, config.log_every, last) or due(step, config.save_every, last) or alone_and_stopped:
                meter.log()
                stop_signal = agree_to_stop(job)
            if anything_due(config, step) and not stop_signal:
                meter.pause()
                observe(job, step)
                meter.go_on()
                stop_signal = agree_to_stop(job)  # an evaluation gives way to a signal
            if stop_signal:
                meter.log()  # what a checkpoint of this step has to know
                break
        return finish(job, step, stop_signal)


@contextmanager
def ending_recorded(job: Job, meter: Meter) -> Iterator[None]:
    """A run that ends by a problem says so in its record too."""
    try:
        yield
    except Problem as problem:
        job.metrics.log("end", meter.step, reason=f"failed: {problem}", peak_bytes=peak_bytes(job.world.device))
        raise


def update(job: Job, step: int, batch: list[MicroBatch]) -> StepStats:
    """Make update `step`: its data, its learning rate and its random numbers are functions of the step alone."""
    config = job.config
    stats = train_step(
        job.trainable,
        job.optimizer,
        [(on_device(x, job.world.device), on_device(y, job.world.device)) for x, y in batch],
        lr=learning_rate(config.schedule, config.optim.lr, step, config.max_steps),
        grad_clip=config.optim.grad_clip,
        world=job.world,
        ordered=config.parallel.strategy == "ordered",
        scale=job.scale,
        spike_limit=job.guard.spike_limit,
        skip_spikes=job.guard.skips_spikes,
        before_micro_step=lambda micro_step: before_micro_step(job, step, micro_step),
    )
    job.guard.take_in(stats)
    return stats


def before_micro_step(job: Job, step: int, micro_step: int) -> None:
    """Tell the watchdog; set the random numbers of dropout for this micro-batch, wherever it is computed."""
    job.watchdog.beat(f"update {step}, micro-step {micro_step}")
    if job.config.model.dropout:
        micro_batch = job.world.rank * job.loader.grad_accum_steps(step) + micro_step
        seed_dropout(job.world.device, random_seed(job.config.seed, step, micro_batch))


def compiled_before(job: Job) -> CompilerCache | None:
    """Where the compiled step is kept for the next start, loaded if it is there; None if no GPU code is compiled."""
    config, device = job.config, job.world.device
    if device.type != "cuda" or not compiles(config.compile, device):
        return None
    cache = CompilerCache(
        {
            "device": f"{device_name(device)} {device}",
            "model": dataclasses.asdict(config.model),
            "batch": [config.batch.micro_batch, config.batch.seq_len],
            "optim": config.optim.name,
            "precision": job.compute.precision,
            "ranks": [config.parallel.strategy, job.world.size],
            "deterministic": config.deterministic,
        }
    )
    if cache.load() and job.world.is_main:
        say(f"the compiled step of an earlier start is used: {cache.path}")
    return cache


def rehearse(job: Job, step: int) -> None:
    """One micro-batch of `step` forward, backward and over the ranks, thrown away.

    So what cannot run (too little memory, a kernel, an exchange) fails here, with nothing written. It also brings
    DistributedDataParallel to its final order of buckets, so that a resumed run adds up as an uninterrupted one does.
    """
    job.watchdog.beat("rehearsal")
    batch = job.loader.batch(step).micro_batches[:1]
    accumulate(
        job.trainable,
        [(on_device(x, job.world.device), on_device(y, job.world.device)) for x, y in batch],
        world=job.world,
        ordered=job.config.parallel.strategy == "ordered",
        before_micro_step=lambda micro_step: before_micro_step(job, step, micro_step),
    )
    job.optimizer.zero_grad(set_to_none=True)


def agree_to_stop(job: Job) -> int | None:
    """The signal that any rank was sent, on every rank. One alone need not ask its device."""
    if job.world.size == 1:
        return job.stop.received
    return int(job.world.max(torch.tensor(float(job.stop.received or 0), device=job.world.device))) or None


def on_device(ids: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes while it computes: from pinned memory, or each copy would wait for the update before."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def finish(job: Job, step: int, stop_signal: int | None) -> Summary:
    """The last checkpoint on disk, the record closed, the report written."""
    if stop_signal and job.config.save_every:
        save(job, step)
    failure = job.saver.wait()
    job.world.barrier()
    reason = f"stopped by signal {stop_signal}" if stop_signal else "finished"
    elapsed_s = job.elapsed_s + time.monotonic() - job.started_at
    if job.world.is_main:
        say(f"{reason} at step {step:,} after {duration(elapsed_s)}, peak {peak_bytes(job.world.device) / 1e9:.2f} GB")
        bits = job.results.get("val_loss", {}).get("bits_per_byte")
        if bits is not None:
            others = "".join(f"; {name} {value:.3f}" for name, value in job.baselines.items())
            say(f"bits per byte on the validation split: this model {bits:.3f}{others}")
        if job.verdict is not None and job.verdict.finished:
            say(f"verdict: {job.verdict.line()}")
            for check in job.verdict.checks[1:]:
                say(f"  then: {check}")
        job.metrics.log("end", step, reason=reason, elapsed_s=elapsed_s, peak_bytes=peak_bytes(job.world.device))
        report(job, step)
        if stop_signal and failure is None:
            saved = (
                "run the same command again to resume."
                if job.config.save_every
                else "nothing was saved: save_every = 0."
            )
            say(saved)
    if failure is not None:
        raise failure
    return Summary(step, reason, 128 + stop_signal if stop_signal else 0, job.run)


def report(job: Job, step: int) -> None:
    """The page of the run. A full disk here may not make a finished run a failed one."""
    try:
        say(f"the page of this run: {write_report(job.run)}")
    except (OSError, ImportError, Problem) as error:  # matplotlib may be missing where a model is only trained
        note(job, step, f"the report could not be written ({error}); regpt2 report {job.run} makes it again")
