"""Run every check. In: a configuration, the ranks; out: each result on the screen, all of them as rows, JSON.

Every rank checks its own device, one rank of each machine its disks; rank 0 prints for all.
"""

import dataclasses
import json
import math
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regpt2 import __version__
from regpt2.base.console import count, duration, say
from regpt2.base.errors import Problem
from regpt2.base.files import describe_os_error, write_atomic
from regpt2.base.ranks.world import World
from regpt2.config.run import RunConfig
from regpt2.machine.health.machine_checks import machine_checks
from regpt2.machine.health.patient import Check, CheckResult, Patient
from regpt2.machine.health.run_checks import recipe, run_checks


def examine(config: RunConfig, world: World, *, of_recipe: bool, quick: bool) -> list[dict[str, Any]]:
    """Run each check on every rank that it concerns, and print its result. All ranks get all results."""
    ranks_here = world.everyones(socket.gethostname()).count(socket.gethostname())
    patient = Patient(world, config, of_recipe, ranks_here, quick)
    of_rank = machine_checks(patient) | ({"recipe": recipe} if of_recipe else {})
    found = []
    for name, check in of_rank.items():
        found += _gather(name, _guarded(check, patient), world)
    for name, check in run_checks(patient).items():
        found += _gather(name, _guarded(check, patient) if world.local_rank == 0 else None, world)
    return found


def _guarded(check: Check, patient: Patient) -> CheckResult:
    """The result of a check; FAIL with the message if it raises."""
    try:
        return check(patient)
    except Problem as problem:
        return CheckResult("FAIL", str(problem))
    except OSError as error:
        return CheckResult("FAIL", describe_os_error(error))
    except Exception as error:  # whatever a driver, a compiler or a kernel raises
        first_line = str(error).strip().split("\n")[0]
        return CheckResult("FAIL", f"the check crashed: {type(error).__name__}: {first_line}")


def _gather(name: str, result: CheckResult | None, world: World) -> list[dict[str, Any]]:
    """The results of all ranks. Rank 0 prints its own, those of others that are not ok, and which ranks are slow."""
    everyones = world.everyones(result and dataclasses.asdict(result))
    rows = [{"check": name, "rank": rank, **one} for rank, one in enumerate(everyones) if one is not None]
    if world.device.type == "cuda":  # on a CPU the ranks share the cores
        rows += _slower(name, rows)
    shown = set()
    for row in rows if world.is_main else []:
        if row["rank"] == 0 or (row["status"] != "ok" and row["found"] not in shown):
            shown.add(row["found"])
            where = f" (rank {row['rank']})" if row["rank"] else ""
            show(name + where, CheckResult(row["status"], row["found"], row["advice"]))
    return rows


def _slower(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A warning for each rate that some ranks reach less than 80 % of: the fastest rank waits for them."""
    found = []
    for figure in [key for key in rows[0]["figures"] if key.endswith("_per_s")]:
        rates = {row["rank"]: row["figures"][figure] for row in rows if figure in row["figures"]}
        best = max(rates.values())
        if slow := [f"{rank} ({count(rate)})" for rank, rate in rates.items() if rate < 0.8 * best]:
            text = f"{figure} of rank {', '.join(slow)} is below 80 % of the fastest ({count(best)})"
            advice = "all ranks wait for the slowest: check its power limit, its slot, and other work on it"
            found.append({"check": name, "rank": 0, **dataclasses.asdict(CheckResult("warn", text, advice))})
    return found


def show(name: str, result: CheckResult) -> None:
    say(f"{result.status:<5} {name:<13} {result.found}" + (f"; {result.advice}" if result.advice else ""))


def conclude(found: list[dict[str, Any]], elapsed_s: float, out: Path | None) -> None:
    """Print the summary, and write all results to `out` as JSON."""
    names = {status: {row["check"] for row in found if row["status"] == status} for status in ("ok", "warn", "FAIL")}
    n_failed, n_all = len(names["FAIL"]), len(set.union(*names.values()))
    counts = f"{n_all} checks in {duration(elapsed_s)}, {len(names['warn'])} warnings, {n_failed} failed"
    say(f"{counts}: {'not ready' if n_failed else 'ready to start'}.")
    if out is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"time": now, "version": __version__, "ready": not n_failed, "elapsed_s": elapsed_s}
        for row in found:  # JSON has no NaN
            row["figures"] = {key: figure if math.isfinite(figure) else None for key, figure in row["figures"].items()}
        write_atomic(out, json.dumps({**about, "findings": found}, indent=1) + "\n")
