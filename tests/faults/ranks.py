"""Faults among ranks (4, 5, 14, 18, 34-36). In: a bench; out: noticed on all ranks, gone on from the same bits?

Ranks are forks that meet over loopback, as under torchrun; where torchrun has to act itself, it is the real one.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import points
import torch
import trial
import zygote
from suite import Bench, Fault, Outcome

from regpt2 import cli
from regpt2.base.files import folder_lock
from regpt2.run import ending, loop
from regpt2.run.setup import RunState, TrainingRun

LEAVE_S = 15.0  # a rank that others have left must not stay longer
TIMEOUT_S = 6.0  # of the watchdog, in these trials
Arm = Callable[[int], object]


def start_ranks(
    bench: Bench, run: Path, size: int, *more: object, recipe: str = trial.RECIPE, before: Arm | None = None
) -> list[zygote.Trial]:
    """The real `regpt2 train` on so many ranks. `before(rank)` arms what should happen in one of them."""
    argv, port = trial.arguments(bench, run, *more, recipe=recipe), free_port(bench)

    def rank_main(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ending.write_report = lambda run: run / "report.html"
        if before is not None:
            before(rank)
        return cli.main(argv)

    return [bench.fork(lambda rank=rank: rank_main(rank)) for rank in range(size)]


def free_port(bench: Bench) -> int:
    """One below those that the system gives out by itself, so that nobody takes it before the ranks do."""
    while True:
        port = bench.rng.randrange(12_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def finish_ranks(bench: Bench, run: Path, size: int, *more: object, recipe: str = trial.RECIPE) -> None:
    """Undisturbed, to the end."""
    ranks = start_ranks(bench, run, size, *more, recipe=recipe)
    codes = [rank.wait(120) for rank in ranks]
    assert codes == [0] * size, f"exit codes {codes}: {ranks[0].said[-1500:]}"


def reference(bench: Bench, size: int, strategy: str = "ddp", optimizer: str = "adamw") -> dict[str, object]:
    """The digest of an undisturbed run on so many ranks."""
    run = bench.shared / f"ranks-{optimizer}-{strategy}-{size}"
    trial.prepare_data(bench)
    with bench.alone():
        if not run.exists():
            finish_ranks(bench, run, size, "--parallel.strategy", strategy, recipe=trial.RECIPES[optimizer])
    return trial.digest(run)


STEPS_UNDER_TORCHRUN = 240  # long enough for a signal from outside to find the run at work
LONG = ("--eval-every", 0, "--sample-every", 0, "--max-steps", STEPS_UNDER_TORCHRUN, "--save-every", 40)


def torchrun(
    bench: Bench, run: Path, *more: object, launcher: tuple[str, ...] = ()
) -> tuple["subprocess.Popen[str]", Path]:
    """Two ranks under the real torchrun, which starts them again once if one dies. In a group of its own; its log."""
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    agent += ["--monitor-interval", "0.1", "-m", "regpt2", "--"]
    command = [*launcher, sys.executable, *agent, *trial.arguments(bench, run, *LONG, *more)]
    log = bench.new("torchrun.log")
    with open(log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, text=True, start_new_session=True), log


def workers_of(agent: int) -> dict[int, int]:
    """The processes of the ranks under one torchrun, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
            rank = next((int(v.removeprefix(b"RANK=")) for v in environment if v.startswith(b"RANK=")), None)
            if parent == agent and rank is not None:
                found[rank] = int(entry.name)
    return found


def wait_until(condition: Callable[[], bool], log: Path, what: str, timeout_s: float = 90.0) -> float:
    """Until something is seen; how long that took."""
    began_at = time.monotonic()
    while not condition():
        assert time.monotonic() - began_at < timeout_s, f"{what}: not in {timeout_s:.0f} s: {log.read_text()[-2000:]}"
        time.sleep(0.02)
    return time.monotonic() - began_at


def is_gone(pid: int) -> bool:
    """Has the process ended, though nobody may have collected it?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def undisturbed(bench: Bench) -> dict[str, object]:
    """The digest of the run that the faults under torchrun disturb."""
    run = bench.shared / "ranks-long"
    trial.prepare_data(bench)
    with bench.alone():
        if not run.exists():
            finish_ranks(bench, run, 2, *LONG)
    return trial.digest(run, STEPS_UNDER_TORCHRUN)


def starts_of(run: Path) -> int:
    """How often a run was started: by the first rank 0, and again after each restart."""
    return len(trial.events(run, "run")) if (run / "metrics.jsonl").exists() else 0


def killed_under_torchrun(bench: Bench) -> Outcome:
    """kill -9 of a rank: torchrun starts both again, and the end is bit-equal. Of torchrun itself: no orphan stays."""
    outcome, again_s, gone_s = Outcome(), 0.0, 0.0
    expected = undisturbed(bench)
    for victim in ("rank 1", "torchrun", "rank 0")[: bench.planned]:
        run = bench.new("run")
        agent, log = torchrun(bench, run)
        wait_until(lambda: trial.newest_step(run) >= 40 or agent.poll() is not None, log, "the first checkpoint")
        starts, workers = starts_of(run), workers_of(agent.pid)
        os.kill(agent.pid if victim == "torchrun" else workers[int(victim[-1])], signal.SIGKILL)
        if victim == "torchrun":
            agent.wait()
            gone_s = wait_until(lambda: all(map(is_gone, workers.values())), log, "the end of ranks without torchrun")
            outcome.remark = f"; without torchrun the ranks left in {gone_s:.1f} s"
            agent, log = torchrun(bench, run)
        else:
            again_s = max(again_s, wait_until(lambda: starts_of(run) > starts, log, "training again"))
        code = agent.wait(120)
        outcome.fired(
            code == 0 and again_s <= 15.0, f"{victim}: exit code {code}, {again_s:.1f} s, {log.read_text()[-900:]}"
        )
        outcome.same(trial.digest(run, STEPS_UNDER_TORCHRUN), expected, victim)
    outcome.remark = f"training again in {again_s:.1f} s{outcome.remark}"
    return outcome


def hangs_under_torchrun(bench: Bench) -> Outcome:
    """A stopped rank: named, stacks dumped, all ended in the timeout + 5 s, and torchrun goes on to the same bits."""
    outcome, slowest_s = Outcome(), 0.0
    expected = undisturbed(bench)
    for victim in (1, 0)[: bench.planned]:
        run = bench.new("run")
        agent, log = torchrun(bench, run, "--parallel.timeout-s", TIMEOUT_S)
        wait_until(lambda: trial.newest_step(run) >= 40 or agent.poll() is not None, log, "the first checkpoint")
        workers, starts = workers_of(agent.pid), starts_of(run)
        os.kill(workers[victim], signal.SIGSTOP)
        ended_s = wait_until(
            lambda: not set(workers.values()) & set(workers_of(agent.pid).values()), log, "the end of the ranks"
        )
        stacks = (run / "ranks" / f"rank-{victim:05d}.stacks.txt").read_text()
        wait_until(lambda: starts_of(run) > starts, log, "training again")
        code, said = agent.wait(120), log.read_text()
        wrong = [] if code == 0 else [f"exit code {code}"]
        if ended_s > TIMEOUT_S + 5:
            wrong.append(f"it took {ended_s:.1f} s")
        if not re.search(rf"no progress .*\n?.*rank {victim}\b", said):
            wrong.append("the rank was not named")
        if "train.py" not in stacks:
            wrong.append("its stacks were not dumped")
        outcome.fired(not wrong, f"rank {victim}: {wrong}: {said[-2000:]}")
        outcome.same(trial.digest(run, STEPS_UNDER_TORCHRUN), expected, f"rank {victim}")
        slowest_s = max(slowest_s, ended_s)
    outcome.remark = f"ended {slowest_s:.1f} s after the stop, timeout {TIMEOUT_S:.0f} s"
    return outcome


def flipped_weights(bench: Bench) -> Outcome:
    """One bit of one weight flips on one rank: both ranks end within `check_every` updates, and name it."""
    outcome, every = Outcome(), 4
    for _ in range(bench.planned):
        step, victim = bench.rng.randrange(2, trial.STEPS - every), bench.rng.randrange(2)
        # Of the mantissa, so that no loss shows it; of its upper half, so that the next update does not round it away.
        bit, place = bench.rng.randrange(12, 23), bench.rng.random()

        def flip(rank: int, step: int = step, victim: int = victim, bit: int = bit, place: float = place) -> None:
            if rank == victim:
                points.patch(f"{loop.__name__}:update", lambda real: _flipping(real, step, bit, place))

        run = bench.new("run")
        more = ("--parallel.check-every", every, "--save-every", 100, "--eval-every", 0, "--sample-every", 0)
        ranks = start_ranks(bench, run, 2, *more, before=flip)
        codes, said = [rank.wait() for rank in ranks], ranks[0].said + ranks[1].said
        named = re.search(r"step (\d+): the weights of rank\(s\) 1 differ from the other", said)
        wrong = [] if codes == [1, 1] else [f"exit codes {codes}"]
        if not named or not step <= int(named[1]) <= step + every:
            wrong.append(f"flipped in update {step}, found: {named and named[0]}")
        if trial.newest_step(run):
            wrong.append("a checkpoint was written")
        outcome.fired(not wrong, f"bit {bit} on rank {victim}: {wrong}: {said[-500:]}")
    return outcome


def _flipping(real: Callable[..., object], at: int, bit: int, place: float) -> Callable[..., object]:
    def update(run: TrainingRun, state: RunState, step: int, batch: object) -> object:
        if step == at:
            weights = run.model.h[0].mlp.c_fc.weight.data.view(torch.int32).view(-1)
            weights[int(place * len(weights))] ^= 1 << bit
        return real(run, state, step, batch)

    return update


CHAINS = [
    ("ordered", (2, 1, 2, 4, 1), "adamw"),
    ("ddp", (2, 1, 4), "adamw"),
    ("fsdp", (2, 1, 2), "adamw"),
    ("ordered", (2, 1), "muon"),
    ("ddp", (2, 1, 2), "muon"),
    ("ordered", (1, 4, 2), "adamw"),
    ("ddp", (4, 2, 1, 2), "adamw"),
    ("fsdp then ddp", (2, 2, 1), "adamw"),
    ("ordered", (4, 1, 2), "muon"),
]


def elastic(bench: Bench) -> Outcome:
    """A run gone on with other numbers of ranks: the same tokens; losses to 1e-4; ordered: the same bits."""
    outcome, worst = Outcome(), 0.0
    for strategy, sizes, optimizer in CHAINS[: bench.planned]:
        run, what = bench.new("run"), f"{optimizer}, {strategy} over {sizes}"
        wrong = _run_in_turns(bench, run, strategy.split(), sizes, trial.RECIPES[optimizer])
        outcome.fired(not wrong, f"{what}: {wrong}")
        if wrong:
            continue
        got, alone = trial.digest(run), reference(bench, 1, strategy.split()[0], optimizer)
        for key in ("data", "step", "tokens", "lr"):
            outcome.same([e[key] for e in got["train"]], [e[key] for e in alone["train"]], f"{key}, {what}")
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(got["train"], alone["train"], strict=True))
        worst = max(worst, apart)
        if apart > 1e-4:
            outcome.failures.append(f"{what}: losses differ by {apart:.1e}")
        if strategy == "ordered":
            for key in ("model.safetensors", "optimizer.safetensors", "train"):
                outcome.same(got[key], alone[key], f"{key}, {what}")
        shutil.rmtree(run)
    outcome.remark = f"losses within {worst:.0e}; ordered: 0 bits differ"
    return outcome


def _run_in_turns(bench: Bench, run: Path, strategies: list[str], sizes: tuple[int, ...], recipe: str) -> list[str]:
    """One run on so many ranks after each other, SIGTERM to rank 0 between; what went wrong."""
    wrong = []
    for n, size in enumerate(sizes):
        last, stop_at = n == len(sizes) - 1, (n + 1) * (trial.STEPS // len(sizes))
        strategy = strategies[0 if n == 0 else -1]
        before = None if last else lambda rank, stop_at=stop_at: rank or _stop_in(stop_at)
        ranks = start_ranks(bench, run, size, "--parallel.strategy", strategy, recipe=recipe, before=before)
        codes = [rank.wait(120) for rank in ranks]
        if codes != [0 if last else 128 + signal.SIGTERM] * size:
            wrong.append(f"{size} ranks: exit codes {codes}: {ranks[0].said[-500:]}")
    return wrong


def _stop_in(step: int) -> None:
    """SIGTERM to this process in the update of that number."""
    points.arm(points.Point("update", "regpt2.run.loop:update"), step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def signals_to_one_rank(bench: Bench) -> Outcome:
    """Any stop signal to either of two ranks: both leave after the same update, with a checkpoint, and go on later."""
    outcome, step = Outcome(), 10
    cases = [(n, rank) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) for rank in (1, 0)]
    for number, victim in cases[: bench.planned]:
        run, what = bench.new("run"), f"{number.name} to rank {victim}"

        def send(rank: int, number: int = number, victim: int = victim) -> None:
            if rank == victim:
                point = points.Point("backward", "torch:Tensor.backward", nth=2)
                points.arm(point, step, lambda: os.kill(os.getpid(), number))

        ranks = start_ranks(bench, run, 2, before=send)
        codes = [rank.wait() for rank in ranks]
        wrong = [] if codes == [128 + number] * 2 else [f"exit codes {codes}"]
        if trial.newest_step(run) != step:
            wrong.append(f"it came in update {step}, the checkpoint is of {trial.newest_step(run)}")
        outcome.fired(not wrong, f"{what}: {wrong}: {ranks[victim].said[-500:]}")
        finish_ranks(bench, run, 2)
        outcome.same(trial.digest(run), reference(bench, 2), what)
    return outcome


def bad_gradient_on_one_rank(bench: Bench) -> Outcome:
    """NaN on one rank: exactly that update is skipped, on both; the ranks' weights stay equal."""
    outcome, step = Outcome(), 6
    cases = [(value, victim) for value in (float("nan"), float("inf")) for victim in (1, 0)]
    for value, victim in cases[: bench.planned]:
        run = bench.new("run")

        def spoil(rank: int, value: float = value, victim: int = victim) -> None:
            if rank == victim:
                clock = points.at_step()
                points.patch("regpt2.model.gpt:GPT.forward", lambda real: _spoiled(real, clock, step, value))

        ranks = start_ranks(bench, run, 2, "--parallel.check-every", 1, before=spoil)
        codes = [rank.wait() for rank in ranks]
        skipped = [event["step"] for event in trial.events(run, "train") if event["skipped"]]
        ok = codes == [0, 0] and skipped == [step]
        outcome.fired(ok, f"{value} on rank {victim}: exit codes {codes}, skipped {skipped}: {ranks[0].said[-500:]}")
    return outcome


def _spoiled(real: Callable[..., torch.Tensor], clock: dict[str, int], at: int, value: float) -> Callable[..., object]:
    def forward(*args: object, **options: object) -> torch.Tensor:
        return real(*args, **options) * (value if clock["step"] == at else 1.0)

    return forward


def refusals_of_one_rank(bench: Bench) -> Outcome:
    """What one rank alone refuses ends all: quickly, with one message, without a traceback."""
    outcome = Outcome()
    for what, prepare, expected in REFUSALS[: bench.planned]:
        run = bench.new("run")
        before = prepare(bench, run)
        started_at = time.monotonic()
        ranks = start_ranks(bench, run, 2, before=before)
        codes, said = [rank.wait() for rank in ranks], "".join(rank.said for rank in ranks)
        wrong = [] if 0 not in codes and codes[0] == codes[1] else [f"exit codes {codes}"]
        if said.count(expected) != 1 or "Traceback" in said:
            wrong.append("not one clear message")
        if (elapsed_s := time.monotonic() - started_at) > LEAVE_S:
            wrong.append(f"it took {elapsed_s:.1f} s")
        outcome.fired(not wrong, f"{what}: {wrong}: {said[-800:]}")
    return outcome


def _all_damaged(bench: Bench, run: Path) -> Arm | None:
    finish_ranks(bench, run, 2, "--max-steps", 4)
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    return None


def _in_use(bench: Bench, run: Path) -> Arm | None:
    """Another process holds the folder for a while."""

    def hold() -> int:
        with folder_lock(run):
            (run / "held").touch()
            time.sleep(LEAVE_S)
        return 0

    holder = bench.fork(hold)
    holder.until((run / "held").exists)
    return None


def _blind(bench: Bench, run: Path) -> Arm | None:
    """Rank 1 cannot read the data, for a reason of its own machine."""

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "shard.bin")

    return lambda rank: rank and points.patch("regpt2.run.loop:open_data", lambda real: fail)


REFUSALS: list[tuple[str, Callable[[Bench, Path], Arm | None], str]] = [
    ("all checkpoints damaged", _all_damaged, "checkpoints were damaged"),
    ("another process in the folder", _in_use, "is in use by"),
    ("rank 1 cannot read the data", _blind, "Permission denied"),
]

FAULTS = [
    Fault(4, "kill -9 under torchrun, 2 ranks", (1, 3), killed_under_torchrun),
    Fault(5, "a rank that hangs, under torchrun", (1, 2), hangs_under_torchrun),
    Fault(14, "a flipped weight on one rank", (3, 50), flipped_weights),
    Fault(18, "stopped, gone on with other ranks", (5, len(CHAINS)), elastic),
    Fault(34, "signals to one of two ranks", (2, 6), signals_to_one_rank),
    Fault(35, "a bad gradient on one of two ranks", (2, 4), bad_gradient_on_one_rank),
    Fault(36, "what one rank refuses ends all", (len(REFUSALS), len(REFUSALS)), refusals_of_one_rank),
]
