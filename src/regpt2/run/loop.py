"""THE LOOP. In: a recipe; out: a run folder with a trained model, its checkpoints, its record and its report."""

import gc
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from regpt2.base.console import say
from regpt2.base.device import pick_device, seed_dropout
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock
from regpt2.base.ranks.signals import StopSignals
from regpt2.base.ranks.watchdog import Watchdog
from regpt2.base.ranks.world import World, start_world
from regpt2.config.passes import settle, settled_line
from regpt2.config.run import RunConfig
from regpt2.data.loader import Batch
from regpt2.run.ending import Summary, ending_recorded, finish
from regpt2.run.intervals import anything_due, due, observe, observe_early_end, random_seed, why_stop_early
from regpt2.run.opening import open_records
from regpt2.run.resume import restore, restore_best
from regpt2.run.saving import keep_base, require_room
from regpt2.run.setup import RunState, TrainingRun, build, compiler_cache, open_data
from regpt2.run.step_log import StepLog
from regpt2.training.schedule import learning_rate
from regpt2.training.step import StepStats, accumulate_as_they_come, accumulate_in_order, train_step


def train(config: RunConfig) -> Summary:
    """Train one model by one configuration. Every rank runs this same function.

    Raises:
        Problem: something does not fit, before anything is written; or an update, a rank or the disk fails.
    """
    folder, hang_s = Path(config.run), config.parallel.timeout_s
    exchange_s = hang_s + 60 if hang_s else 86_400.0  # so that the watchdog, which knows more, speaks first
    with (
        start_world(pick_device(config.device), timeout_s=exchange_s) as world,
        StopSignals() as stop,
        ExitStack() as held,
    ):
        with world.together():  # a problem of one rank ends all: the others would wait for it in their next exchange
            data = held.enter_context(open_data(config))
        asked, config = config, settle(config, data)
        if world.is_main and (line := settled_line(asked, config, data)):
            say(line)
        held.callback(gc.unfreeze)
        watchdog = Watchdog(folder / "ranks", world.rank, world.size, hang_s)
        run, state = build(config, world, data, watchdog, stop)
        with world.together():
            if world.is_main:  # after the checks: the lock is the first file written
                held.enter_context(folder_lock(folder))
        with watchdog:
            return run_updates(run, state)


def run_updates(run: TrainingRun, state: RunState) -> Summary:
    """From the newest checkpoint, or from nothing, to the last update."""
    config, world = run.config, run.world
    first, last = restore(run, state), config.max_steps  # updates already made: 0, or a checkpoint's
    if first > last:
        raise UsageError(
            f"{run.folder} is already at step {first:,}, but max_steps = {last:,}; give --max-steps {first + 1}."
        )
    require_room(run, first)  # hours later the disk would be full in the middle of a run
    compiled = compiler_cache(run)  # before the rehearsal, which is the first to compile
    rehearse(run, first + 1)
    gc.freeze()  # the 0.3M objects of the imports stay: each full collection would look at them all, for up to 2.4 s
    run.check_replicas(first)  # ranks that begin apart would average gradients of different models
    keep_base(run, state, first)
    run.set_window(config.window_at(first))
    open_records(run, state, first)  # after all that may fail: a start that failed leaves the record as it was
    restore_best(run, state, first)
    observe(run, state, first, done=world.from_main(run.metrics.observed(first)))
    early = why_stop_early(config, state.best) if first < last else ""  # resumed, but not to be trained further
    log, step, stop_signal = StepLog(run, state.guard, first), first, None
    batches_left = run.loader.batches(first + 1, first if early else last)
    # They close from right to left: reading ahead stops, a problem is recorded, the save under way is awaited.
    with closing(run.saver), ending_recorded(run, log), closing(batches_left) as batches:
        for step, batch in enumerate(batches, start=first + 1):
            log.add(step, update(run, state, step, batch), batch.digest)
            if compiled and step == first + 1:
                compiled.save()  # not after the rehearsal: the optimizer is compiled in the first update
            if due(step, config.parallel.check_every, last):
                run.check_replicas(step)  # the loss does not show a bit that flipped on one rank
            # Reading the losses waits for the device, so not at every step. But a checkpoint holds how many updates in
            # a row were skipped: the guard has to have counted them before it. And ranks agree to stop by an exchange,
            # so they do it only where they wait anyway; one alone can stop at once.
            alone_and_stopped = run.stop.received and world.size == 1
            if due(step, config.log_every, last) or due(step, config.save_every, last) or alone_and_stopped:
                log.read()
                stop_signal = agree_to_stop(run.stop, world)
            if anything_due(config, step) and not stop_signal:
                log.pause()  # step_ms and tokens_per_s are those of training
                observe(run, state, step)
                log.resume()
                stop_signal = agree_to_stop(run.stop, world)  # a signal cuts an evaluation short
            if stop_signal:
                log.read()  # the guard counts here too, before the checkpoint that `finish` saves
                break
            if step < last and (early := why_stop_early(config, state.best)):
                log.read()
                observe_early_end(run, state, step)
                break
        return finish(run, state, step, stop_signal, early)  # within: a checkpoint that fails here is recorded as well


def update(run: TrainingRun, state: RunState, step: int, batch: Batch) -> StepStats:
    """Make update `step`: its data, its rates, its window and its random numbers are functions of the step alone.

    So a resume needs no state of a generator or of a loader, and there is none that could be restored wrongly.
    """
    config = run.config
    run.set_window(config.window_at(step))
    stats = train_step(
        run.trainable,
        run.optimizer,
        [(on_device(x, run.world.device), on_device(y, run.world.device)) for x, y in batch.micro_batches],
        lr=learning_rate(config.schedule, config.optim.lr, step, config.max_steps),
        momentum=config.optim.muon.momentum_at(step),
        grad_clip=config.optim.grad_clip,
        world=run.world,
        ordered=run.ordered,
        weights=batch.weights,
        scale=state.scale,
        spike_limit=state.guard.spike_limit,
        skip_spikes=state.guard.skips_spikes,
        before_micro_step=lambda micro_step: before_micro_step(run, step, micro_step),
    )
    if run.average is not None:
        run.average.take_in(step, stats.accepted)
    # At every update, unread: the next limit may not depend on when a line is logged. But a loss of 0, because no
    # target counted, says nothing about the next: all after it would be spikes.
    if batch.teaches:
        state.guard.take_in(stats)
    return stats


def before_micro_step(run: TrainingRun, step: int, micro_step: int) -> None:
    """Tell the watchdog; set the random numbers of dropout for this micro-batch, wherever it is computed."""
    run.watchdog.beat(f"update {step}, micro-step {micro_step}")
    if run.config.model.dropout:
        # Counted over all ranks, as the loader deals them out: another number of ranks draws the same masks.
        micro_batch = run.world.rank * run.loader.grad_accum_steps(step) + micro_step
        seed_dropout(run.world.device, random_seed(run.config.seed, step, micro_batch))


def rehearse(run: TrainingRun, step: int) -> None:
    """One micro-batch of `step` forward, backward and over the ranks, thrown away.

    So what cannot run (too little memory, a kernel, an exchange) fails here, with nothing written. It also brings
    DistributedDataParallel to its final order of buckets, so that a resumed run adds up as an uninterrupted one does.
    """
    run.watchdog.beat("rehearsal")
    run.set_window(run.config.window_at(run.config.max_steps))  # the widest, which takes the most memory
    batch = run.loader.batch(step).micro_batches[:1]
    accumulate = accumulate_in_order if run.ordered else accumulate_as_they_come
    accumulate(
        run.trainable,
        [(on_device(x, run.world.device), on_device(y, run.world.device)) for x, y in batch],
        run.world,
        before_micro_step=lambda micro_step: before_micro_step(run, step, micro_step),
    )
    run.optimizer.zero_grad(set_to_none=True)  # or the first update would add to these


def agree_to_stop(stop: StopSignals, world: World) -> int | None:
    """The signal that any rank was sent, on every rank: one that left alone would leave the others waiting."""
    if world.size == 1:
        return stop.received  # without asking the device, which would wait for it
    return int(world.max(torch.tensor(float(stop.received or 0), device=world.device))) or None


def on_device(ids: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes while it computes: from pinned memory, or each copy would wait for the update before."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
