"""Heartbeats of the ranks. In: the small files that each rank keeps in one folder; out: which ranks hang."""

import contextlib
import json
import os
import socket
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

SHOWN = 8  # at most this many ranks are named in a message


@dataclass(frozen=True)
class Beat:
    """The content of a rank's file. `beats` counts the rank's work, `ticks` the rounds of its watching thread."""

    rank: int
    host: str
    pid: int
    parent: int
    started: int
    beats: int
    ticks: int
    doing: str
    idle_s: float
    stacks_bytes: int
    at: str


@dataclass(frozen=True)
class Diagnosis:
    """Which ranks hang; `ends` maps each frozen rank to the one that kills it: {"1": 0} if rank 0 kills rank 1."""

    text: str
    suspects: list[int]
    ends: dict[str, int]


def beat_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stacks.txt"


def verdict_file(folder: Path) -> Path:
    """Written by the first rank that judges; the others follow it."""
    return folder / "verdict.json"


def write_beat(folder: Path, rank: int, **progress: Any) -> None:
    """Renew this process's file; `progress` has the other fields of a `Beat`. Atomic, but without fsync: no later
    process needs it.

    Raises:
        OSError: the file cannot be written.
    """
    host, pid, started = socket.gethostname(), os.getpid(), parent_and_start(os.getpid())[1]
    beat = Beat(rank=rank, host=host, pid=pid, parent=os.getppid(), started=started, at=timestamp(), **progress)
    path = beat_file(folder, rank)
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    os.replace(part, path)


def read_beats(folder: Path, size: int) -> dict[int, Beat]:
    """The files of all ranks, by rank, without those that are missing or damaged."""
    beats = {}
    for rank in range(size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats[rank] = Beat(**json.loads(beat_file(folder, rank).read_text(encoding="utf-8")))
    return beats


def publish(folder: Path, rank: int, verdict: Diagnosis) -> bool:
    """Publish one verdict for all ranks, atomically. False if another rank was faster.

    Raises:
        OSError: the file cannot be written.
    """
    part = folder / f"verdict-{rank:05d}.tmp"
    try:
        part.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
        os.link(part, verdict_file(folder))  # unlike a rename it replaces nothing
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def read_verdict(folder: Path) -> Diagnosis | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Diagnosis(**json.loads(verdict_file(folder).read_text(encoding="utf-8")))
    return None


def judge(before: dict[int, Beat], now: dict[int, Beat], judging: int, size: int) -> Diagnosis:
    """Blame the ranks whose threads have not ticked between two looks at all files, else those with the fewest beats.

    No clocks are compared: those of two hosts may differ. With all ranks at the same place no rank is blamed.
    """
    frozen = [r for r in now if r in before and (now[r].pid, now[r].ticks) == (before[r].pid, before[r].ticks)]
    fewest = min(beat.beats for beat in now.values())
    behind = [r for r in now if now[r].beats == fewest] if len({beat.doing for beat in now.values()}) > 1 else []
    suspects = frozen or (behind if len(behind) < len(now) else [])
    ends: dict[str, int] = {}
    for rank in frozen:  # killed by the judging rank if near, else by the first working rank of its agent and machine
        home = (now[rank].host, now[rank].parent)
        near = [r for r in now if r not in frozen and (now[r].host, now[r].parent) == home]
        if near:
            ends[str(rank)] = judging if judging in near else near[0]
    return Diagnosis(_describe(now, suspects, "hangs" if frozen else "behind", size), suspects, ends)


def _describe(now: dict[int, Beat], suspects: list[int], blame: str, size: int) -> str:
    lines = []
    for beat in (now[rank] for rank in suspects[:SHOWN]):
        who = f"rank {beat.rank} (process {beat.pid} on {beat.host}, last seen {beat.at})"
        lines.append(f"  {blame}: {who} at {beat.doing!r}")
    if len(suspects) > SHOWN:
        lines.append(f"  {blame}: {len(suspects) - SHOWN} more ranks")
    places = Counter(beat.doing for rank, beat in now.items() if rank not in suspects)
    for doing, number in places.most_common(SHOWN):
        lines.append(f"  {'waiting' if suspects else 'nobody is behind'}: {number} of {size} ranks at {doing!r}")
    if absent := [str(rank) for rank in range(size) if rank not in now]:
        lines.append(f"  no sign of: rank {', '.join(absent[:SHOWN])}{', ...' if absent[SHOWN:] else ''}")
    return "".join(f"{line}\n" for line in lines)


def innermost_calls(stacks: Path, start: int, most: int = 4) -> str:
    """The last calls of the main thread in a dump of `faulthandler`, which names the oldest thread last."""
    try:
        dump = stacks.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""
    main_thread = dump.rpartition("(most recent call first):\n")[2]
    calls = [line for line in main_thread.splitlines() if line.startswith("  File ")]
    return "".join(f"  {line}\n" for line in calls[:most])


def parent_and_start(pid: int) -> tuple[int, int]:
    """A process's parent and start (in ticks since boot), which tell a reused pid apart. Zeros where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no such process, or not Linux
        return 0, 0
    return int(fields[1]), int(fields[19])


def timestamp() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
