"""The graphics card and the software, read only. In: nvidia-smi, if it exists; out: names, clocks, watts."""

import contextlib
import platform
import shutil
import statistics
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

SMI = ["nvidia-smi", "--id=0", "--format=csv,noheader,nounits"]


def ask(fields: str) -> list[str]:
    """What nvidia-smi reports of the first GPU; empty if it is missing or finds no GPU."""
    if shutil.which(SMI[0]) is None:
        return []
    try:
        done = subprocess.run([*SMI, f"--query-gpu={fields}"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.strip().split(",")]


def about(root: Path, command: list[str]) -> dict[str, str]:
    """Facts without which a result has no meaning: commit, versions, machine, command."""
    git = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *command]),
        "commit": commit.stdout.strip() if commit else "",
        **dict(zip(("gpu", "driver"), ask("name,driver_version") or ("", ""), strict=True)),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "numpy", "transformers", "tyro")},
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class Card:
    """Clock, power and heat while an item runs; they show other work on the card, or a power limit."""

    FIELDS = ("clock_mhz", "power_w", "temperature_c", "used_mib")
    QUERY = "clocks.sm,power.draw,temperature.gpu,memory.used"

    def __init__(self) -> None:
        self.samples: list[list[float]] = []
        self.looked_at = 0.0

    def look(self, every_s: float = 2.0) -> None:
        if time.time() - self.looked_at < every_s:
            return
        self.looked_at = time.time()
        if found := ask(self.QUERY):
            with contextlib.suppress(ValueError):  # "[N/A]"
                self.samples.append([float(value) for value in found])

    def seen(self) -> dict[str, list[float]]:
        """Minimum, median and maximum of each."""
        columns = zip(self.FIELDS, zip(*self.samples, strict=True), strict=False)
        return {name: [min(values), statistics.median(values), max(values)] for name, values in columns}
