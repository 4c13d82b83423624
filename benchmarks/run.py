"""We and our peers, on the same work, turn by turn. In: their clones; out: a JSON file, and the tables of README.md.

    python benchmarks/run.py --peers DIR --out benchmarks/results/DATE_cpu.json [--only training] [--quick]
    python benchmarks/run.py --profile --out benchmarks/results/DATE_cpu.json
    python benchmarks/run.py --table benchmarks/results/DATE_cpu.json [more JSON files]

DIR holds your clones of build-nanogpt, nanoGPT and llm.c. If one of these or of the packages transformers, ctranslate2
and xllamacpp is missing, it is left out and a line reports it. Each result is written at once. A second run with the
same file replaces what it measures again and keeps the rest. In training a third side takes turns with both: the bare
matmuls of the step (bare_matmuls.py), which show this machine's rate and the share of it that each side reaches.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bare_matmuls import flops
from regpt2.base.device import device_name
from regpt2.base.files import write_atomic
from regpt2.base.version import commit, digest
from sides import SideFailed, ratios, take_turns
from tables import update_readme
from works import PLACES, Comparison, SideSpec, TrainingWork, Work, plan, profiles

HERE = Path(__file__).parent
OURS, LIMIT = "regpt2", "bare matmuls"
CLONES = {"build-nanogpt": "train_gpt2.py", "nanoGPT": "model.py", "llm.c": "train_gpt2.c"}
PACKAGES = {"transformers": "transformers", "CTranslate2": "ctranslate2", "llama.cpp": "xllamacpp"}
# By how much losses may differ at the first step: random weights of one distribution, or, with llm.c, the same weights.
SAME_WORK, SAME_WEIGHTS = 0.3, 1e-3
TINY_PAIRS, LEAST_PAIRS = 2, 5
SCRIPTS = {"llm.c": "llmc.py", LIMIT: "bare_matmuls.py"}


def version(runtime: str, peers: Path | None) -> str | None:
    """A peer's version: the package's, or the file's digest; None if it is missing."""
    if runtime in PACKAGES:
        package = PACKAGES[runtime]
        return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    source = None if peers is None else peers / runtime / CLONES[runtime]
    if source is None or not source.exists():
        return None
    return f"{source.name} {hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"


def formats(comparison: Comparison) -> list[str]:
    """The model formats that the sides need."""
    if isinstance(comparison.work, TrainingWork):
        uses_file = comparison.rivals[0].runtime == "llm.c" and comparison.work.device == "cpu"
        return ["llmc"] if uses_file else []
    gguf = {"fp32": "gguf-fp32", "bf16": "gguf-bf16", "int8": "gguf-q8_0"}[comparison.precision]
    wanted = {"transformers": ["huggingface"], "CTranslate2": ["huggingface", "ctranslate2"], "llama.cpp": [gguf]}
    return ["native", *dict.fromkeys(name for side in comparison.rivals for name in wanted[side.runtime])]


def command(comparison: Comparison, side: SideSpec, peers: Path | None, folder: Path) -> list[str]:
    """The command that starts a side."""
    script = SCRIPTS.get(side.runtime, f"{comparison.work.kind}.py")
    job = {"work": dataclasses.asdict(comparison.work), "side": dataclasses.asdict(side), "folder": str(folder)}
    job |= {"peers": str(peers and peers.absolute()), "threads": torch.get_num_threads()}
    return [sys.executable, str(HERE / script), json.dumps(job)]


def export(comparison: Comparison, folder: Path) -> Path:
    """The folder with the model in all formats that the sides need; existing ones are not written again."""
    place = folder / comparison.work.model.name
    place.mkdir(exist_ok=True)
    wanted = [name for name in formats(comparison) if not (place / PLACES[name]).exists()]
    if wanted:
        job = {"model": dataclasses.asdict(comparison.work.model), "formats": wanted}
        writer = [sys.executable, str(HERE / "exports.py"), str(place), json.dumps(job)]
        done = subprocess.run(writer, capture_output=True, text=True)
        if done.returncode:
            raise SideFailed(f"exports.py: {done.stderr.strip().splitlines()[-1]}")
    return place


def measure(comparison: Comparison, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A result for each rival."""
    place = export(comparison, folder)
    sides = {OURS: comparison.ours} | {str(side): side for side in comparison.rivals}
    if isinstance(comparison.work, TrainingWork):
        sides[LIMIT] = SideSpec(LIMIT, comparison.precision)
    commands = {name: command(comparison, side, options.peers, place) for name, side in sides.items()}
    pairs = TINY_PAIRS if options.quick else options.pairs
    stops = any(side.runtime == "llm.c" for side in comparison.rivals)  # after each of its few steps
    warmup, rows = take_turns(
        commands, least=min(LEAST_PAIRS, pairs), most=pairs, seconds=options.seconds, times=1 if stops else None
    )
    return [result(comparison, side, warmup, rows) for side in comparison.rivals]


def result(comparison: Comparison, side: SideSpec, warmup: list[dict], rows: list[dict]) -> dict[str, Any]:
    """The result of two sides' turns."""
    work, peer = comparison.work, str(side)
    wall, cpu = (ratios(rows, OURS, peer, key) for key in ("wall_s", "cpu_s"))
    return {
        **identity(comparison, side),
        "tokens": work.tokens,
        "ratio": statistics.median(wall),
        "ratio_spread": [min(wall), max(wall)],
        "cpu_ratio": statistics.median(cpu) if cpu else None,
        "our_s": statistics.median(row[OURS]["wall_s"] for row in rows),
        "their_s": statistics.median(row[peer]["wall_s"] for row in rows),
        "our_peak_bytes": rows[-1][OURS]["peak_bytes"],
        "their_peak_bytes": rows[-1][peer]["peak_bytes"],
        **sameness(comparison, side, warmup[0][OURS], warmup[0][peer]),
        **limit(comparison.work, rows, peer),
        "turns_s": [[row[OURS]["wall_s"], row[peer]["wall_s"]] for row in rows],
    }


def limit(work: Work, rows: list[dict], peer: str) -> dict[str, Any]:
    """The rate of the bare matmuls of a training step, and the share of their time in that of both sides' steps."""
    if not isinstance(work, TrainingWork):
        return {}
    bare_s = statistics.median(row[LIMIT]["wall_s"] for row in rows)
    shares = {side: statistics.median(ratios(rows, side, LIMIT, "wall_s")) for side in (OURS, peer)}
    return {"matmul_flops_per_s": flops(work) / bare_s, "our_share": shares[OURS], "their_share": shares[peer]}


def sameness(comparison: Comparison, side: SideSpec, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Shows that both sides did the same work: losses of the first step, or the share of equal ids."""
    if not isinstance(comparison.work, TrainingWork):
        pairs = [pair for rows in zip(ours["ids"], theirs["ids"], strict=True) for pair in zip(*rows, strict=True)]
        if comparison.precision == "fp32" and len(set(pairs[0])) > 1:
            raise SideFailed(f"{side}: its first token is {pairs[0][1]}, ours {pairs[0][0]}: not the same model")
        return {"same_ids": sum(a == b for a, b in pairs) / len(pairs)}
    same_weights = side.runtime == "llm.c" and comparison.work.device == "cpu"
    apart = abs(ours["loss"] - theirs["loss"])
    if not apart <= (SAME_WEIGHTS if same_weights else SAME_WORK):  # also true for NaN
        raise SideFailed(f"{side}: its first loss is {theirs['loss']:.4f}, ours {ours['loss']:.4f}: not the same work")
    return {"our_first_loss": ours["loss"], "their_first_loss": theirs["loss"]}


def identity(comparison: Comparison, side: SideSpec) -> dict[str, Any]:
    """The fields that identify a result."""
    work = comparison.work
    return {"kind": work.kind, "work": str(work), "precision": side.precision, "peer": str(side)}


def key(entry: dict[str, Any]) -> tuple[str, ...]:
    """The same as a key."""
    return tuple(entry[name] for name in ("kind", "work", "precision", "peer") if name in entry)


def machine(device: str) -> dict[str, Any]:
    """The machine of the measurement."""
    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(out: Path, device: str, section: str, entries: list[dict[str, Any]]) -> None:
    """Put results or profiles into the file; each replaces an earlier one of the same name."""
    document = json.loads(out.read_text()) if out.exists() else {"machine": machine(device)}
    if document["machine"] != machine(device):
        sys.exit(f"{out} is from another machine: {document['machine']}; give another --out.")
    merged = {key(entry): entry for entry in [*document.get(section, []), *entries]}
    write_atomic(out, json.dumps(document | {section: list(merged.values())}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with the clones build-nanogpt, nanoGPT and llm.c")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="works or rivals with one of these words in their name"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny models: that every side runs, not how fast")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each side, at most")
    parser.add_argument("--seconds", type=float, default=60, help="for the turns of one comparison, about")
    parser.add_argument("--out", type=Path, help="the JSON file to write or to add to")
    parser.add_argument("--profile", action="store_true", help="the share of each part of our step, beside its floor")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="only write the tables of README.md")
    options = parser.parse_args()
    if options.table:
        return update_readme(HERE / "README.md", options.table)
    if options.out is None:
        parser.error("--out is missing")
    if options.profile:
        failed = sum(run_profile(*each, options) for each in profiles(options.device, quick=options.quick))
    else:
        with tempfile.TemporaryDirectory() as folder:
            comparisons = plan(options.device, quick=options.quick)
            failed = sum(run(comparison, options, Path(folder)) for comparison in comparisons)
    sys.exit(f"{failed} failed" if failed else 0)


def of_limit(entry: dict[str, Any]) -> str:
    """The end of a sentence: how near both sides come to the bare matmuls; nothing where these were not measured."""
    if "matmul_flops_per_s" not in entry:
        return ""
    reached = f"ours at {entry['our_share']:.0%}, theirs at {entry['their_share']:.0%}"
    return f"; {reached} of the bare matmuls' {entry['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s"


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where a result comes from."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "code": digest("model", "training"), "at": at, "quick": options.quick}


def run_profile(work: TrainingWork, precision: str, options: argparse.Namespace) -> bool:
    """Profile our step; returns whether it failed."""
    print(f"profile, {work}, {precision}", flush=True)
    job = {"work": dataclasses.asdict(work), "precision": precision, "steps": 3}
    script = [sys.executable, str(HERE / "profile_step.py"), json.dumps(job)]
    done = subprocess.run(script, capture_output=True, text=True)
    if done.returncode:
        print(f"  failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return True
    entry = {"work": str(work), "precision": precision, **json.loads(done.stdout.splitlines()[-1]), **about(options)}
    save(options.out, options.device, "profiles", [entry])
    return False


def run(comparison: Comparison, options: argparse.Namespace, folder: Path) -> int:
    """Measure one comparison, if it is requested and its rivals exist; returns how many failed."""
    title = f"{comparison.work.kind}, {comparison.work}, {comparison.precision}"
    named = {side: f"{title}: {side}" for side in comparison.rivals}
    wanted = [side for side, name in named.items() if any(word in name for word in options.only or [""])]
    versions = {side: version(side.runtime, options.peers) for side in wanted}
    for side in wanted:
        if versions[side] is None:
            print(f"{named[side]} is left out: it is not installed, or not in --peers", flush=True)
    there = tuple(side for side in wanted if versions[side] is not None)
    if not there:
        return 0
    print(f"{title}: {', '.join(map(str, there))}", flush=True)
    try:
        results = measure(dataclasses.replace(comparison, rivals=there), options, folder)
    except SideFailed as error:
        print(f"  failed: {error}", flush=True)
        alone = [dataclasses.replace(comparison, rivals=(side,)) for side in there if len(there) > 1]
        return sum(run(each, options, folder) for each in alone) if alone else 1
    for entry, side in zip(results, there, strict=True):
        entry |= {"peer_version": versions[side], **about(options)}
        low, high = entry["ratio_spread"]
        assert math.isfinite(entry["ratio"])
        print(f"  {side}: ours is {entry['ratio']:.2f}x as fast ({low:.2f}-{high:.2f}){of_limit(entry)}", flush=True)
    save(options.out, options.device, "results", results)
    return 0


if __name__ == "__main__":
    main()
