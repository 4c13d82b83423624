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


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    step: int
    reason: str
    """finished, or the signal that ended it."""
    exit_code: int
    run: Path
    """The run folder."""


@contextmanager
def ending_recorded(run: TrainingRun, log: StepLog) -> Iterator[None]:
    """Record the problem that ends a run: its reader may not have the screen."""
    try:
        yield
    except Problem as problem:
        run.metrics.log("end", log.step, reason=f"failed: {problem}", peak_bytes=peak_bytes(run.world.device))
        raise


def finish(run: TrainingRun, state: RunState, step: int, stop_signal: int | None) -> Summary:
    """Wait for the last checkpoint, close the record, write the page.

    Raises:
        Problem: the last checkpoint could not be written.
    """
    if stop_signal and run.config.save_every:
        save(run, state, step)
    failure = run.saver.wait()
    run.world.barrier()  # a rank that left earlier would end the others' exchanges, and this run, with an error
    reason = f"stopped by signal {stop_signal}" if stop_signal else "finished"
    if run.world.is_main:
        elapsed_s, peak = state.elapsed_s, peak_bytes(run.world.device)
        say(f"{reason} at step {step:,} after {duration(elapsed_s)}, peak {peak / 1e9:.2f} GB")
        _say_results(state)
        run.metrics.log("end", step, reason=reason, elapsed_s=elapsed_s, peak_bytes=peak)
        _write_page(run, step)
        if stop_signal and failure is None:
            saved = run.config.save_every
            say("run the same command again to resume." if saved else "nothing was saved: save_every = 0.")
    if failure is not None:  # last: all that could be kept is kept
        raise failure
    return Summary(step, reason, 128 + stop_signal if stop_signal else 0, run.folder)


def _say_results(state: RunState) -> None:
    bits = state.results.get("val_loss", {}).get("bits_per_byte")
    if bits is not None:
        others = "".join(f"; {name} {value:.3f}" for name, value in state.baselines.items())
        say(f"bits per byte on the validation split: this model {bits:.3f}{others}")
    if state.verdict is not None and state.verdict.finished:
        say(f"verdict: {state.verdict.line()}")
        for check in state.verdict.checks[1:]:
            say(f"  then: {check}")


def _write_page(run: TrainingRun, step: int) -> None:
    """A full disk here may not make a finished run a failed one."""
    try:
        say(f"the page of this run: {write_report(run.folder)}")
    except (OSError, ImportError, Problem) as error:  # matplotlib may be missing where a model is only trained
        note(run, step, f"the report could not be written ({error}); regpt2 report {run.folder} writes it again")
