"""Memory (19, 20, 21, 22). In: a bench; out: snapshots that stand still, nothing leaked, no memory met cleanly?"""

import ctypes
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import points
import torch
import trial
from suite import Bench, Fault, Outcome

from regpt2.model.files.tensors import read_tensors
from regpt2.run import intervals
from regpt2.run.ending import Summary
from regpt2.run.saving import save
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training import checkpoint


def mutation_during_save(bench: Bench) -> Outcome:
    """The weights change while the file is being written: it must hold what was there at the call."""
    outcome = Outcome()
    for n, (got, expected) in enumerate(bench.ask(lambda: _mutate(bench.folder / "saved", bench.planned))):
        outcome.fired(got == expected, f"save {n}: the file is not the snapshot")
    return outcome


def _mutate(folder: Path, n: int) -> list[tuple[str, str]]:
    saver = checkpoint.Saver(folder, keep=0)
    weights = {"w": torch.zeros(500_000), "v": torch.zeros(1000, 30)}
    expected = []
    for step in range(1, n + 1):
        for tensor in weights.values():
            tensor.normal_(generator=torch.Generator().manual_seed(step))
        expected.append(_hash(weights))
        saver.save(lambda step=step: checkpoint.snapshot(step, "{}", weights, weights, {"step": step}))
        for tensor in weights.values():
            tensor.fill_(float("nan"))
    assert saver.wait() is None
    found = []
    for folder_ in checkpoint.folders(folder):
        model, optimizer = (read_tensors(folder_ / name) for name in (checkpoint.MODEL, checkpoint.OPTIMIZER))
        found.append(_hash(model) if _hash(model) == _hash(optimizer) else "two different states")
    return list(zip(found, expected, strict=True))


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def retention(bench: Bench) -> Outcome:
    """Any order of saves, prunes, kills and damage leaves a good checkpoint: the tests' own state machine."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    outcome = Outcome()
    counts = bench.ask(lambda: importlib.import_module("test_retention").machine(bench.planned), timeout_s=400)
    for _ in range(bench.planned):
        outcome.fired(True)  # a sequence that fails ends the trial with its traceback
    outcome.remark = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return outcome


def no_memory(bench: Bench) -> Outcome:
    """The system gives no more memory: the run ends by itself, leaves no child, and no checkpoint is harmed."""
    outcome, aborted = Outcome(), 0
    unchecked = "check_memory = false\n" + trial.BIG_RECIPE  # or the first would be refused before it can happen
    for what, step, room_bytes in NO_MEMORY[: bench.planned]:
        run = bench.new("run")
        process = trial.start(
            bench,
            run,
            recipe=unchecked,
            before=lambda step=step, room=room_bytes: _limit_memory(step, room),
        )
        code, said = process.wait(), process.said
        aborted += code in LIBRARY_ENDS
        wrong = [] if code in LIBRARY_ENDS or (code == 1 and "Traceback" not in said) else [f"exit code {code}"]
        wrong += ["a child is left"] if process.orphans() else []
        wrong += trial.unloadable(run)
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}: {said[-300:]}")
        trial.finish(bench, run, recipe=trial.BIG_RECIPE)
        outcome.same(trial.digest(run), trial.reference(bench, trial.BIG_RECIPE), what)
    outcome.remark = f"{aborted} ended inside a library of others" if aborted else "a message each"
    return outcome


# What libraries of others do without memory: safetensors aborts; one of ten runs met a null pointer.
LIBRARY_ENDS = (128 + signal.SIGABRT, 128 + signal.SIGSEGV)

NO_MEMORY = (
    ("while the model is built", 0, 4 << 20),
    ("in the first update", 1, 4 << 20),
    ("in a save", 16, 1 << 20),
)


def _limit_memory(step: int, room_bytes: int) -> None:
    """From the given update on this process may have so much more memory than it has then; at 0, than it has now."""

    def limit() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or there would be room in it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room_bytes, resource.RLIM_INFINITY))

    if step == 0:
        points.patch("regpt2.run.loop:build", lambda build: lambda *args, **more: (limit(), build(*args, **more))[1])
    elif step == 16:
        points.arm(points.Point("before the copy", "regpt2.training.checkpoint:snapshot"), step, limit)
    else:
        points.arm(points.Point("in the forward pass", "regpt2.model.gpt:GPT.forward"), step, limit)


MB = 1 << 20


def leaks(bench: Bench) -> Outcome:
    """So many saves and evaluations: as many open files and threads as before, and memory that does not grow."""
    outcome, answer, n = Outcome(), bench.new("answer"), bench.planned // 2
    process = trial.start(bench, bench.new("run"), before=lambda: _instead_of_training(n, answer))
    assert process.wait(300) == 0, process.said[-1500:]
    for what, (early, late) in json.loads(answer.read_text()).items():
        growth = (late["rss"] - early["rss"]) / MB / (0.8 * n / 100)
        wrong = [f"{key} {early[key]} -> {late[key]}" for key in ("files", "threads") if late[key] > early[key]]
        wrong += [f"{growth:.2f} MB more per hundred"] if growth > 1.0 else []
        for _ in range(n - 1):
            outcome.fired(True)
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
        outcome.remark += f"{what} {growth:+.2f} MB per 100, "
    outcome.remark = outcome.remark.removesuffix(", ")
    return outcome


def _instead_of_training(n: int, answer: Path) -> None:
    """Save and evaluate `n` times; note what the process holds after a fifth of the calls and after all."""

    def measure(run: TrainingRun, state: RunState) -> Summary:
        work = {
            "save": lambda call: save(run, state, call),
            "evaluate": lambda call: intervals.evaluate(run, state, run.model, call, "val_loss"),
        }
        found: dict[str, list[dict[str, int]]] = {what: [] for what in work}
        for what, do in work.items():
            for call in range(1, n + 1):
                do(call)
                if call in (n // 5, n):
                    run.saver.wait()
                    found[what].append(_held())
        answer.write_text(json.dumps(found))
        return Summary(0, "measured", 0, run.folder)

    points.patch("regpt2.run.loop:run_updates", lambda run_updates: measure)


def _held() -> dict[str, int]:
    time.sleep(0.1)  # a thread that was waited for is still there for a moment
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
    }


FAULTS = [
    Fault(19, "weights changed during a save", (100, 100), mutation_during_save),
    Fault(20, "retention state machine", (200, 1000), retention),
    Fault(21, "no memory", (len(NO_MEMORY), len(NO_MEMORY)), no_memory),
    Fault(22, "leaks over saves and evaluations", (300, 1000), leaks),
]
