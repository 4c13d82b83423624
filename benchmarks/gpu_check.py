"""One GPU, nine minutes: is it right here, and how fast? In: a GPU; out: DIR/summary.md and .json, DIR/items/*.json.

    python benchmarks/gpu_check.py --out DIR [--minutes 9] [--only ITEM ...] [--smoke] [--wheels DIR]
                                   [--peers DIR] [--data DIR --recipe NAME] [--device cuda]

Needs torch, NumPy, tiktoken, safetensors and rich; no installation, no network. Items go in the order of their value,
each in a process of its own; each row is on disk as soon as it is measured, so that nothing is lost when time runs out.
What one item leaves of its time goes to those that come after. Exit code 1: something is wrong, or correctness was not
shown. --smoke tries every item with tiny works on whatever machine this is.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import gpu_card
import gpu_summary
from gpu_items import Check, perform

ROOT = Path(__file__).resolve().parents[1]
ITEMS = {  # in the order of value: seconds that each may take, of nine minutes
    "correctness": 120,
    "headline": 120,
    "peers": 240,
    "ladder": 90,
    "ceilings": 40,
    "sizes": 50,
    "generation": 25,
    "hellaswag": 25,
    "optimizers": 10,
    "checkpoint": 20,
    "determinism": 25,
    "sweep": 15,
    "training": 150,
}
# Before the items' processes are forked. None of it asks the GPU for anything: CUDA does not survive a fork.
IMPORTED_ONCE = ["regpt2.speed.steps", "torch._dynamo"]


def main() -> int:
    options = read_options()
    began_at = time.time()
    deadline = began_at + 60 * options.minutes
    (options.out / "items").mkdir(parents=True, exist_ok=True)
    make_importable(ROOT / "src", *([options.wheels.resolve()] if options.wheels else []))
    about = gpu_card.about(ROOT, sys.argv)
    states = {}
    for i, item in enumerate(options.only):
        check = Check(
            item=item,
            out=options.out.resolve(),
            device=options.device,
            smoke=options.smoke,
            until=time.time() + seconds_for(options.only[i:], deadline - time.time()),
            data=options.data and options.data.resolve(),
            recipe=options.recipe,
            peers=options.peers and options.peers.resolve(),
        )
        states[item] = watch(check, deadline, about)
        gpu_summary.write(options.out, list(ITEMS))  # after every item: this process may be ended too
    if not options.smoke:
        gpu_summary.publish(options.out, ROOT / "benchmarks" / "results", about)
    print(f"{options.out / 'summary.md'}: {gpu_summary.in_a_line(states)}; {time.time() - began_at:.0f} s", flush=True)
    return gpu_summary.exit_code(states)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--wheels", type=Path, help="a folder with unpacked packages that this Python lacks")
    parser.add_argument("--peers", type=Path, help="clones of build-nanogpt, nanoGPT, llm.c, for the item peers")
    parser.add_argument("--data", type=Path, help="a prepared data folder, for the item training")
    parser.add_argument("--recipe", default="gpt2_124m", help="that the item training follows")
    options = parser.parse_args()
    left_out = {"peers"} if options.peers is None else set()
    left_out |= {"training"} if options.data is None else set()
    options.only = options.only or [item for item in ITEMS if item not in left_out]
    if options.device == "auto" and not options.smoke and shutil.which("nvidia-smi") is None:
        parser.error("there is no NVIDIA GPU (no nvidia-smi); give --device, or --smoke to try every item anyhow")
    return options


def make_importable(*folders: Path) -> None:
    """Here, in the items' processes, and in those that they start."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    os.environ["PYTHONPATH"] = os.pathsep.join([*names, *filter(None, [os.environ.get("PYTHONPATH")])])


def seconds_for(items: list[str], left_s: float) -> float:
    """For the first of `items`: its share of what is left, or what it takes if that is more and there."""
    usual_s = ITEMS[items[0]]
    share_s = left_s * usual_s / sum(ITEMS[item] for item in items)
    return max(share_s, min(usual_s, left_s))


def watch(check: Check, deadline: float, about: dict[str, str]) -> str:
    """Have an item done in a process of its own, show its rows as they come, end it when its time is over."""
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
    shown = 0
    try:
        while process.is_alive() and time.time() < check.until:
            process.join(0.2)
            shown = show_rows(check, shown)
            card.look()
    finally:
        end(process)
    show_rows(check, shown)
    found = check.read()
    if found["state"] == "running":
        late = time.time() >= check.until
        why = "its time was over" if late else f"its process ended with code {process.exitcode}: see {check.log}"
        found |= {"state": "cut off" if late else "failed", "why": why}
    found |= {"seconds": time.time() - started_at, "card": card.seen(), "about": about}
    print(f"{check.item}: {found['state']} after {found['seconds']:.0f} s. {found['why']}".rstrip(), flush=True)
    check.store(found)
    return str(found["state"])


def show_rows(check: Check, shown: int) -> int:
    rows = check.read()["rows"]
    for row in rows[shown:]:
        print(f"  {gpu_summary.row_in_a_line(row)}", flush=True)
    return len(rows)


def end(process: multiprocessing.process.BaseProcess) -> None:
    """The item, and all that it has started."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            process.kill()
    process.join()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the item at work ends too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
