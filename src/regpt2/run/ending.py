"""The end of a run. In: a run after its newest update; out: the last checkpoint, the record closed, the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.console import duration, say
from regpt2.base.device import peak_bytes
from regpt2.base.errors import Problem
from regpt2.pages.report.write import write_report
from regpt2.run.intervals import note
from regpt2.run.saving import save
from regpt2.run.setup import RunState, TrainingRun
from regpt2.run.step_log import StepLog
from regpt2.training import checkpoint
from regpt2.training.saving.best_checkpoint import best_step_of


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    reason: str
    """finished, stopped early and why, or the signal that ended it."""
    exit_code: int
    run: Path
    """The run folder."""
    best_step: int | None = None
    """Updates made at the lowest validation loss; None if nothing was validated."""
    best_loss: float | None = None
    """The lowest validation loss, in nats per token."""


@contextmanager
def ending_recorded(run: TrainingRun, log: StepLog) -> Iterator[None]:
    """Record the problem that ends a run: its reader may not have the screen."""
    try:
        yield
    except Problem as problem:
        run.metrics.log("end", log.step, reason=f"failed: {problem}", peak_bytes=peak_bytes(run.world.device))
        raise


def finish(run: TrainingRun, state: RunState, step: int, stop_signal: int | None, early: str = "") -> Summary:
    """Wait for the last checkpoint, close the record, write the page.

    `early`: why the run ends before max_steps, by its own rule.

    Raises:
        Problem: the last checkpoint could not be written.
    """
    if stop_signal and run.config.save_every:
        save(run, state, step)
    failure = run.saver.wait()
    run.world.barrier()  # a rank that left earlier would end the others' exchanges, and this run, with an error
    reason = f"stopped by signal {stop_signal}" if stop_signal else early or "finished"
    best = {} if state.best.step is None else {"best_step": state.best.step, "best_loss": state.best.loss}
    if run.world.is_main:
        elapsed_s, peak = state.elapsed_s, peak_bytes(run.world.device)
        ended, _, why = reason.partition(": ")
        say(f"{ended} at step {step:,} after {duration(elapsed_s)}, peak {peak / 1e9:.2f} GB{why and f': {why}'}")
        _say_results(state)
        _say_best(run, state, step)
        run.metrics.log("end", step, reason=reason, elapsed_s=elapsed_s, peak_bytes=peak, **best)
        _write_page(run, step)
        if stop_signal and failure is None:
            saved = run.config.save_every
            say("run the same command again to resume." if saved else "nothing was saved: save_every = 0.")
        elif early:
            say("the same command trains no further; to go on, add --stop-after-worse 0.")
    if failure is not None:  # last: all that could be kept is kept
        raise failure
    return Summary(
        step, reason, 128 + stop_signal if stop_signal else 0, run.folder, state.best.step, best.get("best_loss")
    )


def _say_results(state: RunState) -> None:
    bits = state.results.get("val_loss", {}).get("bits_per_byte")
    if bits is not None:
        others = "".join(f"; {name} {value:.3f}" for name, value in state.baselines.items())
        say(f"bits per byte on the validation split: this model {bits:.3f}{others}")
    if state.verdict is not None and state.verdict.finished:
        say(f"verdict: {state.verdict.line()}")
        for check in state.verdict.checks[1:]:
            say(f"  then: {check}")


def _say_best(run: TrainingRun, state: RunState, step: int) -> None:
    """The best validation, and where its model is, if a later one is worse."""
    best = state.best
    if best.step is None:
        return
    line = f"best: step {best.step:,}, validation loss {best.loss:.4f}"
    folder = run.folder / "checkpoints" / checkpoint.BEST
    if run.config.keep_best and best_step_of(folder) == best.step:
        line += f"; regpt2 sample {folder} continues a text with it"
    elif best.step < step:
        line += ", and its model is not on the disk" + ("" if run.config.keep_best else " (--keep-best keeps it)")
    say(line)


def _write_page(run: TrainingRun, step: int) -> None:
    """A full disk here may not make a finished run a failed one."""
    try:
        say(f"the page of this run: {write_report(run.folder)}")
    except (OSError, ImportError, Problem) as error:  # matplotlib may be missing where a model is only trained
        note(run, step, f"the report could not be written ({error}); regpt2 report {run.folder} writes it again")
