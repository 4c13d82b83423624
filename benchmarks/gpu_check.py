"""One GPU, nine minutes: is our code right, and how fast? In: a GPU; out: DIR/summary.md and .json, two archives.

    python benchmarks/gpu_check.py --out DIR [--minutes 9] [--only ITEM ...] [--smoke] [--dry]
                                   [--wheels DIR] [--cache FILE] [--work DIR]
                                   [--peers DIR] [--data DIR --recipe NAME] [--device cuda]

Needs torch, NumPy, tiktoken, safetensors and rich; no installation, no network. gpu_carry.py collects other files that
help. Items run in the order of their value, each in a process of its own. Each row is on disk as soon as it is
measured, so nothing is lost when time runs out. Time that an item does not use goes to the next ones.
Exit code 1: something is wrong or broken, or the item first did not finish. An item that is cut off is not wrong.
--smoke tries every item with tiny works on any machine. --dry runs everything on a pretended GPU, whose
values and times mean nothing, to find crashes, waits and full memory.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path

import gpu_card
import gpu_carry
import gpu_summary
from gpu_items import Check, perform

ROOT = Path(__file__).resolve().parents[1]
ITEMS = {  # in the order of value: seconds that each may take; the first nine fill nine minutes except 35 seconds
    "first": 40,
    "ceilings": 15,
    "headline": 90,
    "generation": 20,
    "optimizers": 10,
    "checkpoint": 15,
    "hellaswag": 25,
    "ladder": 170,
    "correctness": 120,
    "determinism": 60,
    "sweep": 40,
    "sizes": 60,
    "peers": 240,
    "training": 150,
    "equal_minutes": 900,
}
PATIENCE = {"first": 100}  # nothing else counts without it, so it may take longer than planned
COMPILER_CACHE = "compiler-cache"
CACHE_BYTES = 120_000_000  # before they are packed to a tenth
# Before the items' processes are forked. Nothing in it may use the GPU, because CUDA does not survive a fork.
IMPORTED_ONCE = ["regpt2.machine.speed.steps", "torch._dynamo"]


def main() -> int:
    options = read_options()
    began_at = time.time()
    deadline = began_at + 60 * options.minutes
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    make_importable(ROOT / "src", *([options.wheels.resolve()] if options.wheels else []))
    keep_compiled_code(options.work, options.cache)
    about = gpu_card.about(ROOT, sys.argv)
    states: dict[str, str] = {}
    packing = threading.Thread(target=pack, args=(options.work, options.out))
    try:
        for i, item in enumerate(options.only):
            check = Check(
                item=item,
                folder=options.work.resolve(),
                device=options.device,
                smoke=options.smoke,
                dry=options.dry,
                until=time.time() + seconds_for(options.only[i:], deadline - time.time()),
                data=options.data and options.data.resolve(),
                recipe=options.recipe,
                peers=options.peers and options.peers.resolve(),
            )
            states[item] = watch(check, deadline, about, options.out)
            if not packing.is_alive():  # while the next item runs, because this process may be ended at any time
                packing = threading.Thread(target=pack, args=(options.work, options.out))
                packing.start()
    finally:
        summary = gpu_summary.write(options.work, options.out, list(ITEMS))
        print("\n" + gpu_summary.brief(summary), flush=True)  # last, because only the end of a long output may be kept
        if packing.is_alive():
            packing.join()
        pack(options.work, options.out)
    if not options.smoke and not options.dry:
        gpu_summary.publish(options.out, ROOT / "benchmarks" / "results", about)
    print(f"{options.out / 'summary.md'}: {gpu_summary.in_a_line(states)}; {time.time() - began_at:.0f} s", flush=True)
    return gpu_summary.exit_code(states)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for four files: the summary twice, and two archives")
    parser.add_argument("--work", type=Path, help="for rows, logs and the compiler's cache; by default OUT/items")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--dry", action="store_true", help="the GPU is a pretended one: compare no values")
    parser.add_argument("--wheels", type=Path, help="what gpu_carry.py collected; by default runs/gpu-carry if there")
    parser.add_argument(
        "--cache", type=Path, help="the compiler's cache of an earlier call; by default that of --wheels"
    )
    parser.add_argument("--peers", type=Path, help="clones of build-nanogpt, nanoGPT, llm.c, for headline and peers")
    parser.add_argument("--data", type=Path, help="a prepared data folder, for the items training and equal_minutes")
    parser.add_argument("--recipe", default="gpt2_124m", help="that the item training follows")
    options = parser.parse_args()
    left_out = {"equal_minutes"}  # it takes a call of its own, by --only
    left_out |= {"peers"} if options.peers is None else set()
    left_out |= {"training"} if options.data is None else set()
    options.only = options.only or [item for item in ITEMS if item not in left_out]
    options.work = options.work or options.out / "items"
    if options.wheels is None and gpu_carry.FOLDER.is_dir():
        options.wheels = gpu_carry.FOLDER
    if options.cache is None and options.wheels and (options.wheels / gpu_carry.CACHE).is_file():
        options.cache = options.wheels / gpu_carry.CACHE
    if options.device == "auto" and not options.smoke and shutil.which("nvidia-smi") is None:
        parser.error("there is no NVIDIA GPU (no nvidia-smi); give --device, or --smoke to try every item anyhow")
    return options


def make_importable(*folders: Path) -> None:
    """Here, in the items' processes, and in processes that they start."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    os.environ["PYTHONPATH"] = os.pathsep.join([*names, *filter(None, [os.environ.get("PYTHONPATH")])])


def keep_compiled_code(work: Path, earlier: Path | None) -> None:
    """All processes share one folder of compiled code, which starts from that of an earlier call."""
    folder = work.resolve() / COMPILER_CACHE
    if earlier is not None and not folder.exists():
        gpu_carry.unpack(earlier, work)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def pack(work: Path, out: Path) -> None:
    """Kept for the next call, and to examine this one."""
    if compiled := compiled_code(work / COMPILER_CACHE):
        gpu_carry.pack(out / gpu_carry.CACHE, work, compiled)
    run = [path for path in (work / "training").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    gpu_carry.pack(out / "logs.tar.xz", work, [*sorted(work.glob("*.log")), *run])


def compiled_code(cache: Path) -> list[Path]:
    """What the next call needs of it: a compiled graph contains all kernels except handwritten ones.

    The oldest belong to the most valuable items; files beyond CACHE_BYTES are left out.
    """
    by_hand = [path for path in (cache / "triton").glob("*") if not any(path.glob("triton_*"))]
    folders = [cache / "inductor" / "fxgraph", cache / "inductor" / "aotautograd", *by_hand]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = [(path, path.stat()) for path in files if path.exists()]
    sizes = {path: stat.st_size for path, stat in sorted(found, key=lambda each: each[1].st_mtime)}
    return [path for path, end in zip(sizes, accumulate(sizes.values()), strict=True) if end <= CACHE_BYTES]


def seconds_for(items: list[str], left_s: float) -> float:
    """For the first of `items`: its share of the time left, or its planned time if that is more and still left."""
    usual_s = ITEMS[items[0]]
    share_s = left_s * usual_s / sum(ITEMS[item] for item in items)
    return max(share_s, min(PATIENCE.get(items[0], usual_s), left_s))


def watch(check: Check, deadline: float, about: dict[str, str], out: Path) -> str:
    """Run an item in a process of its own, show its rows as they come, end it when its time is over."""
    own_s, left_s = check.left_s, deadline - time.time()
    if own_s < ITEMS[check.item] / 2:
        print(
            f"{check.item}: skipped, it needs about {ITEMS[check.item]} s, {max(0, own_s):.0f} s are left", flush=True
        )
        return "skipped"
    print(f"{check.item}: at most {own_s:.0f} s of the {left_s:.0f} s that are left", flush=True)
    check.write("running")
    card = gpu_card.Card()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=perform, args=(check,))
    started_at = time.time()
    process.start()
    shown, interrupted = 0, True
    try:
        while process.is_alive() and time.time() < check.until:
            process.join(0.2)
            if (n_rows := show_rows(check, shown)) > shown:
                shown = n_rows
                gpu_summary.write(check.folder, out, list(ITEMS))
            card.look()
        interrupted = False
    finally:
        end(process)
        show_rows(check, shown)
        found = check.read()
        if found["state"] == "running":
            found |= unfinished(check, process.exitcode, interrupted)
        found |= {"seconds": time.time() - started_at, "card": card.seen(), "about": about}
        print(f"{check.item}: {found['state']} after {found['seconds']:.0f} s. {found['why']}".rstrip(), flush=True)
        check.store(found)
        gpu_summary.write(check.folder, out, list(ITEMS))
    return str(found["state"])


def unfinished(check: Check, exit_code: int | None, interrupted: bool) -> dict[str, str]:
    if interrupted:
        return {"state": "cut off", "why": "the whole check was interrupted"}
    if time.time() >= check.until:
        return {"state": "cut off", "why": "its time was over"}
    return {"state": "failed", "why": f"its process ended with code {exit_code}: see {check.log}"}


def show_rows(check: Check, shown: int) -> int:
    rows = check.read()["rows"]
    for row in rows[shown:]:
        print(f"  {gpu_summary.row_in_a_line(row)}", flush=True)
    return len(rows)


def end(process: multiprocessing.process.BaseProcess) -> None:
    """The item and every process that it started."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            process.kill()
    process.join()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running item ends too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
