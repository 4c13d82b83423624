"""Malicious files, each fed to the public reader it is meant for. In: an empty folder; out: a verdict for each file.

From a Python that has this folder on its path: `from corpus import try_all`. As a command, one line of JSON each:
python tests/security/corpus.py FOLDER
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bad_archives import archive_cases
from bad_data import data_cases
from bad_pickles import pickle_cases
from bad_tensors import tensor_cases
from bad_texts import text_cases
from cases import Case

from regpt2.base.errors import Problem
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native

MOST_S = 5.0
WAIT_S = 60
AT_ONCE = 12  # files for each fork, which costs more than reading one
MOST_BYTES = 512 << 20
ROOM_BYTES = (
    1 << 30
)  # of addresses, beyond what the parent has: what tries to take more gets a MemoryError, and is seen


@dataclass(frozen=True)
class Verdict:
    """How a reader took one file."""

    case: str
    ok: bool
    ended: str
    """refused, read, or how it failed."""
    message: str
    executed: bool
    """The canary: code in the file was run."""
    seconds: float
    grown_bytes: int


def all_cases(canary: Path) -> list[Case]:
    """The corpus. Code in its files, if it is ever run, makes the file `canary`."""
    kinds: list[Callable[[Path], list[Case]]] = [pickle_cases, archive_cases, tensor_cases, data_cases, text_cases]
    return [case for kind in kinds for case in kind(canary)]


def try_all(folder: Path) -> list[Verdict]:
    """Feed every file of the corpus to its reader, a few in each of many forked processes with little memory."""
    folder = folder.absolute()
    _warm_up(folder / "warm")
    cases = [(folder / f"{n:03d}", case) for n, case in enumerate(all_cases(folder / "canary"))]
    verdicts: list[Verdict] = []
    while len(verdicts) < len(cases):
        verdicts += _try_some(cases[len(verdicts) :][:AT_ONCE], folder / "canary")
    return verdicts


def _warm_up(folder: Path) -> None:
    """What a reader imports on its first use is imported before the forks, not in each of them."""
    folder.mkdir()
    native.write(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5)), folder, None)
    load_model(folder)
    shutil.rmtree(folder)


def _try_some(cases: list[tuple[Path, Case]], canary: Path) -> list[Verdict]:
    """The verdicts of one fork, the last of which may be its death."""
    for place, case in cases:
        case.write(place / "in")
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            _limit()
            for place, case in cases:
                os.write(into, json.dumps(asdict(_try_one(case, place, canary))).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        verdicts = [Verdict(**json.loads(line)) for line in pipe]
    _, status = os.waitpid(pid, 0)
    if len(verdicts) < len(cases):
        name = cases[len(verdicts)][1].name
        verdicts.append(Verdict(name, False, f"died, status {status}", "", canary.exists(), 0.0, 0))
    canary.unlink(missing_ok=True)
    for place, _ in cases:
        shutil.rmtree(place)
    return verdicts


def _limit() -> None:
    """In the fork: no word on the terminal, few addresses."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try_one(case: Case, place: Path, canary: Path) -> Verdict:
    """In the fork: one file. What its reader leaves beside it counts as a fault."""
    signal.alarm(WAIT_S)  # what waits for ever, as for a pipe, dies by it
    there, seconds, peak = _names(place), _seconds(), _peak_bytes(resource.RUSAGE_SELF)
    try:
        case.read(place / "in")
        ended, message = "read", ""
    except Problem as problem:
        ended, message = "refused", str(problem)
    except BaseException as error:  # what no reader may let through
        ended, message = f"{type(error).__name__} went through", str(error)
    seconds, grown = _seconds() - seconds, _peak_bytes(resource.RUSAGE_SELF) - peak
    grown = max(grown, _peak_bytes(resource.RUSAGE_CHILDREN))  # of a child all that it takes, torch included
    if left := _names(place) - there:
        ended = f"left {left.pop()!r} behind"
    executed = canary.exists()
    canary.unlink(missing_ok=True)
    ok = ended == ("read" if case.fine else "refused") and not executed and seconds <= MOST_S and grown <= MOST_BYTES
    return Verdict(case.name, ok, ended, message[:2000], executed, seconds, grown)


def _names(place: Path) -> set[str]:
    return {str(path) for folder in (place, place / "in") for path in folder.iterdir()}


def _seconds() -> float:
    """Of work, this process and its children; not of waiting for a busy machine."""
    return sum(os.times()[:4])


def _peak_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def main() -> int:
    """Print a line of JSON for each file; 1 if any was taken wrongly."""
    verdicts = try_all(Path(sys.argv[1]))
    for verdict in verdicts:
        sys.stdout.write(json.dumps(asdict(verdict)) + "\n")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
