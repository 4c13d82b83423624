"""The headline: GPT-2 (124M), T=1024, 524,288 tokens an update in micro-batches of 64: ours beside others, in turns.

Each side is a process of its own. All compile at the same time, on the CPU. Then they take
turns: ours, a rival, ours, the next rival. With --peers the rivals are build-nanogpt as shipped and compiled, then,
if time is left, nanoGPT, transformers and llm.c. Without --peers the lecture's way of a step replaces build-nanogpt.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import run as turn_by_turn
from gpu_items import Check
from gpu_timing import TINY, figures_of, side_command, spread, step_work
from regpt2.base.device import peak_flops, pick_device
from regpt2.base.errors import Problem
from regpt2.machine.speed.steps import StepTimes, StepWork
from regpt2.model.flops import mfu
from sides import Side, SideFailed, ratios
from works import GPT2, Comparison, Shape, SideSpec, TrainingWork

OURS = "ours, compiled"
ROUNDS, LEAST_ROUNDS = 10, 3  # with two rivals ours has twice as many turns
SAME_WORK = turn_by_turn.SAME_WORK
LATER = (SideSpec("nanoGPT", "bf16", True), SideSpec("transformers", "bf16", True), SideSpec("llm.c", "bf16"))
EAGER_S, COMPILED_S = 25, 60  # for a rival alone: to start, to warm up, and its turns
PATIENCE_S = 30  # with a rival that warms up longer than ours
LECTURE = {"the lecture's way, compiled": "on", "the lecture's way, eager": "off"}
SAID = ("flops_per_token", "peak_bytes", "device", "precision", "compiled", "attention", "torch")

Pairs = list[dict[str, dict[str, Any]]]
"""The answers of ours and a rival in two neighboring turns, by name."""


@dataclass
class Entrant:
    """A running side."""

    name: str
    side: Side
    began_at: float = field(default_factory=time.time)
    setup_s: float = 0.0
    first: dict[str, Any] = field(default_factory=dict)
    """The answer to its first turn."""

    def warm_up(self) -> None:
        self.first = self.side.turn(1)
        self.side.turn(1)
        self.setup_s = time.time() - self.began_at


def run(check: Check) -> None:
    work = step_work(check, micro_batch=64, grad_accum_steps=8, compile="off" if check.smoke else "on")
    with ExitStack() as held, tempfile.TemporaryDirectory(dir=check.folder) as folder:

        def start(name: str, command: list[str]) -> Entrant:
            entrant = Entrant(name, Side(command))
            held.callback(entrant.side.end)
            return entrant

        together, later = rivals(check, work, Path(folder))
        later = {} if check.smoke else later
        compiling = {name: command for name, command in together.items() if "compiled" in name}
        entrants = [start(OURS, side_command(work)), *(start(*rival) for rival in compiling.items())]
        ours, *ready = warm_up(check, entrants)
        alone = [start(*rival) for rival in together.items() if rival[0] not in compiling]  # its memory is in addition
        ready += warm_up(check, alone)
        take_turns(check, work, ours, ready)
        for entrant in ready:
            entrant.side.end()  # the next one needs its memory
        for name, command in later.items():
            if check.left_s > (COMPILED_S if "compiled" in name or name == "llm.c" else EAGER_S):
                rival = warm_up(check, [start(name, command)])
                take_turns(check, work, ours, rival)
                for entrant in rival:
                    entrant.side.end()


def rivals(check: Check, work: StepWork, folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Commands by name: of the sides that take turns together, and of those that run if time is left."""
    eager = {"ours, eager": side_command(step_work(check, micro_batch=64, grad_accum_steps=8, compile="off"))}
    device = pick_device(check.device).type
    shape = Shape("tiny", TINY.n_layer, TINY.n_head, TINY.n_embd, TINY.block_size, TINY.vocab_size)
    their_work = TrainingWork(
        model=shape if check.smoke else GPT2,
        micro_batch=work.micro_batch,
        seq_len=work.seq_len,
        grad_accum_steps=work.grad_accum_steps,
        device=device,
    )

    def command(spec: SideSpec) -> list[str]:
        return turn_by_turn.command(Comparison(their_work, (spec,)), spec, check.peers, folder)

    later = [spec for spec in LATER if turn_by_turn.version(spec.runtime, check.peers)]
    others = eager | {str(spec): command(spec) for spec in later}
    if turn_by_turn.version("build-nanogpt", check.peers):
        shipped, compiled = SideSpec("build-nanogpt", "bf16"), SideSpec("build-nanogpt", "bf16", True)
        return {str(spec): command(spec) for spec in ([shipped] if check.smoke else [compiled, shipped])}, others
    parts = ("whole_logits",) if check.smoke else ("autocast", "whole_logits")  # a CPU may have no bf16
    ways = list(LECTURE.items())[1 if check.smoke else 0 :]
    works = {
        name: step_work(check, micro_batch=64, grad_accum_steps=8, as_lecture=parts, compile=way) for name, way in ways
    }
    return {name: side_command(work) for name, work in works.items()}, others


def warm_up(check: Check, entrants: list[Entrant]) -> list[Entrant]:
    """Starts all at once; returns those that are ready. Waits for the first, and a while longer for the others."""
    if not entrants:
        return []
    pool = ThreadPoolExecutor(len(entrants))
    try:
        at_work = {entrant.name: pool.submit(entrant.warm_up) for entrant in entrants}
        wait_for([at_work[entrants[0].name]], timeout=check.left_s)
        wait_for(at_work.values(), timeout=check.left_s if check.dry else min(PATIENCE_S, check.left_s / 3))
        return [entrant for entrant in entrants if is_ready(check, entrant, at_work[entrant.name])]
    finally:
        pool.shutdown(wait=False)


def is_ready(check: Check, entrant: Entrant, at_work: Future[None]) -> bool:
    """Ours must be ready; for another one the reason becomes a row."""
    why = ""
    if not at_work.done():
        entrant.side.process.kill()  # otherwise it would keep compiling during the turns of the others
        why = f"it was not ready after {time.time() - entrant.began_at:.0f} s"
    elif failure := at_work.exception():
        why = str(failure)[:300]
    if why and entrant.name == OURS:
        raise Problem(f"{OURS}: {why}")
    if why:
        check.keep(entrant.name, not_measured=why)
    return not why


def take_turns(check: Check, work: StepWork, ours: Entrant, others: list[Entrant]) -> None:
    """Ours, a rival, ours, the next one; the rows are written again after each round."""
    own: list[dict[str, Any]] = []
    pairs: dict[str, Pairs] = defaultdict(list)
    for n in range(2 if check.smoke else ROUNDS):
        began_at = time.time()
        for entrant in list(others):
            own.append(ours.side.turn(1))
            try:
                pairs[entrant.name].append({OURS: own[-1], entrant.name: entrant.side.turn(1)})
            except SideFailed as failed:
                check.keep(entrant.name, not_measured=str(failed)[:300])
                others.remove(entrant)
        if not others:
            own.append(ours.side.turn(1))
        if n + 1 >= LEAST_ROUNDS or check.smoke:
            keep_ours(check, work, ours, own)
            for entrant in others:
                keep_rival(check, work, ours, entrant, pairs[entrant.name])
        if check.left_s < 1.5 * (time.time() - began_at):
            return


def keep_ours(check: Check, work: StepWork, ours: Entrant, turns: list[dict[str, Any]]) -> None:
    former = {row["name"]: row for row in check.read()["rows"]}.get(OURS, {"turns": 0})
    if former["turns"] > len(turns):  # a later rival has fewer turns
        return
    times = StepTimes(
        step_s=[turn["wall_s"] for turn in turns],
        losses=[ours.first["loss"], *(turn["loss"] for turn in turns)],
        grad_norms=[ours.first["grad_norm"]],
        tokens=work.tokens,
        setup_s=ours.setup_s,
        **{name: turns[-1][name] for name in SAID},
    )
    check.keep(OURS, **figures_of(check, work, times), turns=len(turns))


def keep_rival(check: Check, work: StepWork, ours: Entrant, entrant: Entrant, pairs: Pairs) -> None:
    """Its speed, and how many times as fast ours is, by neighboring turns."""
    step_s = [pair[entrant.name]["wall_s"] for pair in pairs]
    tokens_per_s = work.tokens / statistics.median(step_s)
    faster = ratios(pairs, OURS, entrant.name, "wall_s")
    apart = abs(entrant.first["loss"] - ours.first["loss"])
    last = pairs[-1][OURS]
    peak = peak_flops(pick_device(check.device), last["precision"])
    check.judge(
        entrant.name,
        tokens_per_s=tokens_per_s,
        ours_faster_by=statistics.median(faster),
        ours_faster_by_least=min(faster),
        ours_faster_by_most=max(faster),
        **spread([1000 * s for s in step_s], "step_ms"),
        mfu=mfu(tokens_per_s, last["flops_per_token"], peak, 1),
        peak_bytes=pairs[-1][entrant.name]["peak_bytes"],
        setup_s=entrant.setup_s,
        first_loss=entrant.first["loss"],
        each_step_s=step_s,
        turns=len(pairs),
        ok=apart <= SAME_WORK,
        why="" if apart <= SAME_WORK else f"its first loss is {apart:.2f} from ours: not the same work",
    )
