"""Coverage-guided fuzzing. In: names of targets and a time for each; out: one line for each, 1 if any has crashed.

python tests/fuzz/fuzz.py [TARGET ...] --seconds 60 --work FOLDER

FOLDER/TARGET/ then has log, crash-* and timeout-*: inputs that a reader took wrongly; and found/: inputs that reached
new code, from which the next run goes on. A crash copied to tests/fuzz/corpus/TARGET/ is tried by every pytest.
"""

import argparse
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

NAMES = [
    *("shards", "manifest", "weights", "model_file", "model_config"),
    *("recipe", "tokenizer", "vocabulary", "record", "checkpoint"),
]
MOST_INPUT_BYTES = 8192
ROOM_BYTES = 1 << 30
HANG_S = 20


def main() -> int:
    """Fuzz the targets one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files, guided by coverage.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"by default all: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "regpt2-fuzz", help="a folder")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"there is no target {unknown.pop()!r}; there is: {', '.join(NAMES)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; install it with: pip install -c constraints.txt '.[fuzz]'")
    failed = [name for name in options.targets or NAMES if not _fuzz(name, options.seconds, options.work / name)]
    return 1 if failed else 0


def _fuzz(name: str, seconds: int, work: Path) -> bool:
    """One target, in a process of its own; says in one line how it went."""
    (work / "found").mkdir(parents=True, exist_ok=True)
    flags = [f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-max_len={MOST_INPUT_BYTES}", "-print_final_stats=1"]
    started_at = time.time()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:  # the fuzzer leaves without cleaning up
        command = [sys.executable, __file__, *flags, f"-artifact_prefix={work}/", str(work / "found")]
        environment = os.environ | {"TMPDIR": temporary, "FUZZ_TARGET": name, "OMP_NUM_THREADS": "1"}
        log = work / "log"
        with open(log, "w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    text = log.read_text(errors="replace")
    runs, reached = (_last(pattern, text) for pattern in (r"number_of_executed_units: (\d+)", r"cov: (\d+)"))
    crashes = [path for path in work.glob("*-*") if path.stat().st_mtime >= started_at - 1]
    ok = done.returncode == 0 and not crashes
    where = "" if ok else f"; see {log}"
    print(f"{name:13} {runs:>9} runs, {reached:>5} covered, {len(crashes)} crashes{where}", flush=True)
    return ok


def _last(pattern: str, text: str) -> str:
    return (re.findall(pattern, text) or ["0"])[-1]


def _child(name: str) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["regpt2", "tomllib"]):
        import seeds
        import targets
    from mutations import mutate

    def mutator(data: bytes, most_bytes: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, most_bytes))
        return mutate(name, data, chance)[:most_bytes]

    warnings.simplefilter("error")
    start = Path(tempfile.mkdtemp())
    for number, data in enumerate(seeds.inputs(name)):
        (start / f"{number:04d}").write_bytes(data)
        targets.TARGETS[name](data)  # what is imported on first use is not charged to an input
    words = sorted({word for data in seeds.good(name) for word in re.findall(rb"[A-Za-z_][\w./-]{2,40}", data)})
    (start / "words.dict").write_text("".join(f'"{word.decode()}"\n' for word in words))
    with targets.little_memory(ROOM_BYTES):
        flags = [*sys.argv, str(start), f"-dict={start / 'words.dict'}"]
        atheris.Setup(flags, lambda data: targets.feed(name, data), custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    if "FUZZ_TARGET" in os.environ:
        _child(os.environ["FUZZ_TARGET"])
    sys.exit(main())
