"""Ours beside others, turn by turn: `benchmarks/run.py` for the training step, as long as time is left."""

import json
import subprocess
import sys
import time
from pathlib import Path

from gpu_items import Check, Skip
from regpt2.base.errors import Problem

RUN = Path(__file__).parents[1] / "run.py"


def run(check: Check) -> None:
    if check.peers is None:
        raise Skip("no --peers DIR")
    out = check.folder / "peers_run.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(RUN), "--peers", str(check.peers), "--out", str(out), "--only", "training"]
    command += ["--seconds", f"{check.left_s / 20:.0f}"]  # for the turns of each of six; the rest is for the setup
    command += [] if check.device == "auto" else ["--device", check.device]
    with subprocess.Popen([*command, *(["--quick"] if check.smoke else [])], stdin=subprocess.DEVNULL) as process:
        shown = 0
        while process.poll() is None:
            time.sleep(1)
            shown = keep_new(check, out, shown)
    shown = keep_new(check, out, shown)
    if process.returncode and not shown:
        raise Problem(f"run.py ended with code {process.returncode}: see {check.log}")
    if process.returncode:  # a rival's failure is not ours
        check.keep("some rivals", not_measured=f"see {check.log.name}")


def keep_new(check: Check, out: Path, shown: int) -> int:
    """The new results; run.py writes each one at once."""
    results = json.loads(out.read_text())["results"] if out.exists() else []
    for result in results[shown:]:
        check.keep(
            f"{result['peer']}, {result['work']}, {result['precision']}",
            ours_faster_by=result["ratio"],
            our_tokens_per_s=result["tokens"] / result["our_s"],
            their_tokens_per_s=result["tokens"] / result["their_s"],
            our_peak_bytes=result["our_peak_bytes"],
            their_peak_bytes=result["their_peak_bytes"],
            spread=result["ratio_spread"],
        )
    return len(results)
