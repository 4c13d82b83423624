"""Bad numbers, and evaluations that fail (13, 33). In: a bench; out: one update skipped and no more?"""

import errno
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import points
import torch
import trial
from suite import Bench, Fault, Outcome

from regpt2.run import loop

Spoil = Callable[[torch.Tensor], torch.Tensor]
NAN, INF = math.nan, math.inf


def bad_gradients(bench: Bench) -> Outcome:
    """NaN and infinity in gradients and losses: that update is skipped, the next is made, the guard forgets it."""
    outcome = Outcome()
    cases = [(f"{value} in the {where}, step {step}", where, value, step) for where, value, step in _CASES]
    for what, where, value, step in cases[: bench.planned]:
        run = bench.new("run")
        process = trial.start(bench, run, *_EVERY_STEP, before=partial(_spoil, where, value, {step}))
        if process.wait() == 0:
            wrong = _skipped(run, step) + _window_is_clean(run, step) + _weights_stood_still(run, step)
        else:
            wrong = [f"exit code {process.exit_code}: {process.said[-500:]}"]
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
    if bench.planned > len(cases):
        _three_in_a_row(bench, outcome)
        _two_apart(bench, outcome)
        _huge(bench, outcome)
        _spike(bench, outcome)
    return outcome


_CASES = [("gradient", NAN, 5), ("gradient", INF, 5), ("gradient", -INF, 15), ("loss", NAN, 15), ("loss", INF, 1)]
_EVERY_STEP = ("--save-every", 1, "--keep-checkpoints", 0, "--eval-every", 0, "--sample-every", 0)


def _spoil(where: str, value: float, steps: set[int]) -> None:
    """In the last micro-step of the given updates, multiply the loss, or one number of the gradient, by `value`."""
    clock = points.at_step()
    done: dict[int, int] = {}

    def wrap(step_function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(trainable: torch.nn.Module, optimizer: Any, batches: Any, **options: Any) -> Any:
            first = next(trainable.parameters())

            def spoil(module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
                done[clock["step"]] = done.get(clock["step"], 0) + 1
                if clock["step"] not in steps or done[clock["step"]] != len(batches):
                    return loss
                if where == "loss":
                    return loss * value
                handle = first.register_hook(lambda gradient: (handle.remove(), _with(gradient, value))[1])
                return loss

            hook = trainable.register_forward_hook(spoil)
            try:
                return step_function(trainable, optimizer, batches, **options)
            finally:
                hook.remove()

        return wrapped

    points.patch(f"{loop.__name__}:train_step", wrap)


def _with(gradient: torch.Tensor, value: float) -> torch.Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[3] = value
    return gradient


def _skipped(run: Path, *steps: int) -> list[str]:
    """These updates were skipped, and no other."""
    skipped = [event["step"] for event in trial.events(run, "train") if event["skipped"]]
    return [] if skipped == list(steps) else [f"skipped at {skipped}"]


def _window_is_clean(run: Path, *bad: int) -> list[str]:
    """The guard's window: the losses of all updates that were made, and of no other."""
    folder = run / "checkpoints" / f"step-{trial.STEPS:08d}"
    losses = json.loads((folder / "state.json").read_text())["guard"]["losses"]
    made = [event["loss"] for event in trial.events(run, "train") if event["step"] not in bad]
    return [] if losses == made[-len(losses) :] and len(losses) == 16 else [f"the guard remembers {losses}"]


def _weights_stood_still(run: Path, step: int) -> list[str]:
    """Equal before and after the skipped update, other after the next."""
    steps = [s for s in (step - 1, step, step + 1) if s > 0]
    weights = [trial.digest(run, s)["model.safetensors"] for s in steps]
    stood = weights[-3:-1].count(weights[-2]) == len(weights) - 1
    return [] if stood and weights[-1] != weights[-2] else ["the skipped update moved the weights, or the next did not"]


def _three_in_a_row(bench: Bench, outcome: Outcome) -> None:
    run = bench.new("run")
    process = trial.start(bench, run, before=lambda: _spoil("gradient", NAN, {9, 10, 11}))
    code, said = process.wait(), process.said
    ok = code == 1 and "3 updates in a row were skipped, the last at step 11" in said and "Traceback" not in said
    outcome.fired(ok, f"three in a row: exit code {code}: {said[-400:]}")
    outcome.same(trial.newest_step(run), 8, "three in a row, the newest checkpoint")


def _two_apart(bench: Bench, outcome: Outcome) -> None:
    run = bench.new("run")
    code = trial.start(bench, run, *_EVERY_STEP, before=lambda: _spoil("gradient", NAN, {5, 6, 15})).wait()
    wrong = [] if code else _skipped(run, 5, 6, 15) + _window_is_clean(run, 5, 6, 15)
    outcome.fired(code == 0 and not wrong, f"two in a row and one later: exit code {code}; {wrong}")


def _huge(bench: Bench, outcome: Outcome) -> None:
    """A gradient a million times too large is finite: it is clipped, and the run goes on."""
    run = bench.new("run")
    code = trial.start(bench, run, *_EVERY_STEP, before=lambda: _spoil("gradient", 1e6, {15})).wait()
    made = {event["step"]: event for event in trial.events(run, "train")}
    ok = code == 0 and not _skipped(run) and made[15]["grad_norm"] > 1e3 and made[24]["loss"] < made[1]["loss"]
    outcome.fired(ok, f"gradient of 1e6: exit code {code}, {made.get(15)}")


def _spike(bench: Bench, outcome: Outcome) -> None:
    """A loss ten times too large: skipped where that is asked for, and it never raises the limit."""
    run = bench.new("run")
    options = (*_EVERY_STEP, "--guard.spikes", "skip", "--guard.spike-z", 20)
    code = trial.start(bench, run, *options, before=lambda: _spoil("loss", 100.0, {15})).wait()
    wrong = [] if code else _skipped(run, 15) + _window_is_clean(run, 15)
    outcome.fired(code == 0 and not wrong, f"spike: exit code {code}; {wrong}")


def evaluations(bench: Bench) -> Outcome:
    """An evaluation that raises, is out of memory, finds no data, no network: recorded, and the model is the same."""
    outcome = Outcome()
    expected = trial.reference(bench)
    for error in EVALUATION_ERRORS[: bench.planned]:
        run, what = bench.new("run"), f"{type(error).__name__}: {error}"

        def break_it(error: Exception = error) -> None:
            def fail(*_: object) -> None:
                raise error

            points.patch("regpt2.evals.val_loss:open_tokens", lambda real: fail)
            points.patch("regpt2.run.intervals:generate", lambda real: fail)

        process = trial.start(bench, run, before=break_it)
        code = process.wait()
        notes = [event["text"] for event in trial.events(run, "note")]
        evals = sum("evaluation val_loss failed" in note and type(error).__name__ in note for note in notes)
        samples = sum("sampling failed" in note for note in notes)
        outcome.fired(code == 0 and (evals, samples) == (4, 2), f"{what}: exit code {code}, {notes}")
        got = trial.digest(run) | {"eval": expected["eval"], "sample": expected["sample"]}
        outcome.same(got, expected, what)
    return outcome


EVALUATION_ERRORS: list[Exception] = [
    RuntimeError("a bug in an entry"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "val.bin"),
    URLError("no network"),
    ZeroDivisionError("float division by zero"),
]

FAULTS = [
    Fault(13, "NaN, infinity, spikes", (len(_CASES) + 4, len(_CASES) + 4), bad_gradients),
    Fault(33, "evaluations that fail", (len(EVALUATION_ERRORS), len(EVALUATION_ERRORS)), evaluations),
]
