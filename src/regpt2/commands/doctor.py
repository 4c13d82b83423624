"""Is everything ready for a run? In: a recipe, folders; out: a line for each check, ok, warn or FAIL; 1 if any failed.

    regpt2 doctor gpt2_124m --data data/fineweb_edu_10B
    torchrun --standalone --nproc-per-node 8 -m regpt2 -- doctor gpt2_124m

Under torchrun every rank looks at its own device, one on each machine at the disks, and rank 0 speaks for all.
"""

import dataclasses
import importlib.metadata
import json
import math
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt2 import __version__
from regpt2.base import free_memory
from regpt2.base.console import count, duration, say
from regpt2.base.device import choose_compute, pick_device
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.base.files import describe_os_error, free_bytes, try_lock, write_atomic
from regpt2.base.options import parse
from regpt2.base.ranks.world import World, start_world
from regpt2.config.run import RunConfig, load_recipe, setup_of
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, Manifest
from regpt2.data.tokens.shards import verify_shard
from regpt2.machine.health.machine import Finding, Patient, checks
from regpt2.machine.speed.rates import disk_rate
from regpt2.training import checkpoint
from regpt2.training.memory import require_memory, still_needed

Check = Callable[[], Finding]


@dataclass(frozen=True)
class Options:
    """Check whether this machine, its disks and the data are ready for a run, and how fast they are."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]")] = ""
    """The recipe to check for; default: GPT-2 124M, without data."""
    data: Path | None = None
    """The prepared data folder; default: the recipe's."""
    run: Path | None = None
    """The run folder, which need not exist; default: the recipe's, else runs/."""
    device: str = ""
    """auto, cpu, cuda, cuda:1 or mps; default: the recipe's."""
    json: Path | None = None
    """Also write the findings to this JSON file."""
    quick: bool = False
    """Skip timings and hashes, and check only the precision of the run."""


def main(arguments: list[str]) -> int:
    """The verb `regpt2 doctor`."""
    options = parse(Options, arguments, "regpt2 doctor")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")
    config = _config(options)
    device = pick_device(config.device)
    began_at = time.monotonic()
    try:
        with start_world(device, timeout_s=300) as world:
            found = examine(config, world, of_recipe=bool(options.recipe), quick=options.quick)
    except (Problem, RuntimeError) as error:  # the ranks cannot meet, or exchange wrong values, or one is lost
        _show("ranks", Finding("FAIL", str(error)))
        return 1
    exit_code = int(any(row["status"] == "FAIL" for row in found))
    if world.is_main:
        _conclude(found, time.monotonic() - began_at, options.json)
    return exit_code


def _config(options: Options) -> RunConfig:
    config = load_recipe(options.recipe) if options.recipe else RunConfig(run="runs")
    return dataclasses.replace(
        config,
        data=str(options.data) if options.data else config.data,
        mix=() if options.data else config.mix,
        run=str(options.run) if options.run else config.run,
        device=options.device or config.device,
    )


def examine(config: RunConfig, world: World, *, of_recipe: bool, quick: bool) -> list[dict[str, Any]]:
    """Make every check on every rank that it concerns, and show each as it is done. All ranks get all findings."""
    host = socket.gethostname()
    patient = Patient(
        world=world,
        model=config.model,
        micro_batch=config.batch.micro_batch,
        seq_len=config.batch.seq_len,
        batch_tokens=config.batch.batch_tokens,
        precision=config.precision,
        compile=config.compile,
        in_shards=config.parallel.strategy == "fsdp",
        ranks_here=world.everyones(host).count(host),
        quick=quick,
    )
    of_machine: dict[str, Check] = {
        "run folder": partial(run_folder, config),
        "checkpoints": partial(checkpoints, config, patient),
        "packages": partial(packages, config),
        "tokenizer": partial(tokenizer, config),
    }
    if not quick:
        of_machine["disk"] = partial(disk, config, patient)
    if config.data or config.mix:
        of_machine["data"] = partial(data, config, of_recipe=of_recipe, quick=quick)
    of_rank = checks(patient)
    if of_recipe:
        of_rank["recipe"] = partial(recipe, config, patient)
    found = []
    for name, look in of_rank.items():
        found += _gather(name, _guarded(look), world)
    for name, look in of_machine.items():
        found += _gather(name, _guarded(look) if world.local_rank == 0 else None, world)
    return found


def _guarded(look: Check) -> Finding:
    """A check that fails by itself is a finding too: its message, no traceback."""
    try:
        return look()
    except Problem as problem:
        return Finding("FAIL", str(problem))
    except OSError as error:
        return Finding("FAIL", describe_os_error(error))
    except Exception as error:  # whatever a driver, a compiler or a kernel raises
        said = str(error).strip().split("\n")[0]
        return Finding("FAIL", f"the check itself failed: {type(error).__name__}: {said}")


def _gather(name: str, finding: Finding | None, world: World) -> list[dict[str, Any]]:
    """What all ranks found. Rank 0 shows its own, of the others what is not ok, and who is much slower."""
    everyones = world.everyones(finding and dataclasses.asdict(finding))
    rows = [{"check": name, "rank": rank, **one} for rank, one in enumerate(everyones) if one is not None]
    if world.device.type == "cuda":  # on a CPU the ranks share the cores
        rows += _slower(name, rows)
    shown = set()
    for row in rows if world.is_main else []:
        if row["rank"] == 0 or (row["status"] != "ok" and row["found"] not in shown):
            shown.add(row["found"])
            where = f" (rank {row['rank']})" if row["rank"] else ""
            _show(name + where, Finding(row["status"], row["found"], row["advice"]))
    return rows


def _slower(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks that all others have to wait for: below 80 % of the fastest."""
    found = []
    for figure in [key for key in rows[0]["figures"] if key.endswith("_per_s")]:
        rates = {row["rank"]: row["figures"][figure] for row in rows if figure in row["figures"]}
        best = max(rates.values())
        if slow := [f"{rank} ({count(rate)})" for rank, rate in rates.items() if rate < 0.8 * best]:
            said = f"{figure} of rank {', '.join(slow)} is below 80 % of the fastest ({count(best)})"
            one = Finding("warn", said, "all wait for the slowest: its power limit, its slot, other work there?")
            found.append({"check": name, "rank": 0, **dataclasses.asdict(one)})
    return found


def _show(name: str, finding: Finding) -> None:
    say(f"{finding.status:<5} {name:<13} {finding.found}" + (f"; {finding.advice}" if finding.advice else ""))


def _conclude(found: list[dict[str, Any]], elapsed_s: float, out: Path | None) -> None:
    names = {status: {row["check"] for row in found if row["status"] == status} for status in ("ok", "warn", "FAIL")}
    n_failed, n_all = len(names["FAIL"]), len(set.union(*names.values()))
    said = f"{n_all} checks in {duration(elapsed_s)}, {len(names['warn'])} warnings, {n_failed or 'none'} failed"
    say(f"{said}: {'not ready' if n_failed else 'ready to start'}.")
    if out is not None:
        about = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "ready": not n_failed,
            "elapsed_s": elapsed_s,
        }
        for row in found:  # JSON has no NaN
            row["figures"] = {key: figure if math.isfinite(figure) else None for key, figure in row["figures"].items()}
        write_atomic(out, json.dumps({**about, "findings": found}, indent=1) + "\n")


def recipe(config: RunConfig, patient: Patient) -> Finding:
    """Can the update be made on so many ranks, and in the memory of each?"""
    world = patient.world
    setup = setup_of(
        config,
        world.size,
        device=world.device.type,
        precision=choose_compute(config.precision, world.device).precision,
        compiled=patient.compiles,
    )
    config.check_ranks(world.size)
    doubt = require_memory(setup, config.batch.tokens_of(1), free_memory.free_bytes(world.device))
    said = (
        f"{config.batch.batch_tokens:,} tokens per update = {world.size} rank(s) x {setup.grad_accum_steps} x "
        f"{setup.micro_batch} x {setup.seq_len}{config.batch.growth}, in about {still_needed(setup) / 1e9:.3g} GB"
    )
    return Finding("warn", said, doubt) if doubt else Finding("ok", f"{said}; regpt2 plan has time and cost")


def run_folder(config: RunConfig) -> Finding:
    """What a checkpoint needs of its disk: files and folders that are renamed whole, locks, a clock."""
    place = _nearest_folder(Path(config.run))
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        folder = Path(name)
        write_atomic(folder / "part" / "file", b"first")
        write_atomic(folder / "part" / "file", b"second")
        (folder / "part").rename(folder / "whole")
        if (folder / "whole" / "file").read_bytes() != b"second":
            return Finding("FAIL", f"{place}: a file that was replaced still has its old content", "another disk")
        behind_s = time.time() - (folder / "whole" / "file").stat().st_mtime
        with open(folder / "lock", "a+b") as one, open(folder / "lock", "a+b") as other:
            if not try_lock(one) or try_lock(other):
                return Finding(
                    "FAIL", f"{place}: a locked file can be locked again", "another disk, or mount its locks"
                )
    said = f"{place}: written, renamed, locked"
    if abs(behind_s) > 5:
        return Finding("warn", f"{said}; its clock differs by {behind_s:.0f} s from this machine's", "set the clocks")
    return Finding("ok", said)


def checkpoints(config: RunConfig, patient: Patient) -> Finding:
    """Room for those that are kept, and the one that is written before an old one goes."""
    folder = Path(config.run) / "checkpoints"
    if not config.save_every:
        return Finding("ok", "none are saved: save_every = 0")
    saves = -(-config.max_steps // config.save_every)
    most = min(saves, config.keep_checkpoints + 1) if config.keep_checkpoints else saves
    checkpoint.require_room(folder, patient.saved_bytes, keep=config.keep_checkpoints, saves_left=saves)
    said = f"{free_bytes(folder) / 1e9:.3g} GB free, at most {most} of {patient.saved_bytes / 1e9:.3g} GB each"
    return Finding("ok", said)


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the one in which it will be made."""
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{place} is in the way: it is no folder; choose another --run.")
    return place


def disk(config: RunConfig, patient: Patient) -> Finding:
    """How fast the run folder's disk is."""
    place = _nearest_folder(Path(config.run))
    n_bytes = max(1 << 20, min(256 << 20, free_bytes(place) // 4))
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        rate = disk_rate(Path(name) / "random", n_bytes)
    save_s = patient.saved_bytes / rate.write
    said = (
        f"{n_bytes >> 20} MiB written and fsynced at {rate.write / 1e6:,.0f} MB/s, read at {rate.read / 1e6:,.0f}; "
        f"a checkpoint of {patient.saved_bytes / 1e9:.3g} GB takes {save_s:.2g} s"
    )
    figures = {"write_bytes_per_s": rate.write, "read_bytes_per_s": rate.read}
    if save_s > 60:
        return Finding("warn", said, "expected below a minute: a local disk, or a larger --save-every", figures)
    return Finding("ok", said, figures=figures)


def packages(config: RunConfig) -> Finding:
    """Extras that are there, and those that the recipe needs."""
    extras = ("gigatoken", "tensorboard", "wandb", "ray", "lm_eval", "onnx", "transformers")
    there = {name: version for name in extras if (version := _version(name))}
    missing = [name for name in config.track if name not in there]
    said = f"extras: {', '.join(f'{name} {version}' for name, version in there.items()) or 'none'}"
    if missing:
        return Finding("FAIL", f"{said}; track names {missing[0]}", f"pip install 'regpt2[{missing[0]}]'")
    return Finding("ok", said)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tokenizer(config: RunConfig) -> Finding:
    """Is the vocabulary of the model here, and does it give the ids that GPT-2 was trained on?"""
    name = {50257: "gpt2", 257: "bytes"}.get(config.model.vocab_size)
    if name is None:
        return Finding("ok", f"none of ours has {config.model.vocab_size:,} tokens: the data's own is checked there")
    found = load_tokenizer(name)
    text = "Hello, I'm a language model,"
    ids = found.encode(text)
    if name == "gpt2" and ids != [15496, 11, 314, 1101, 257, 3303, 2746, 11]:  # as in the lecture
        return Finding("FAIL", f"{text!r} became {ids}", "expected 15496, 11, 314, ...: reinstall tiktoken")
    return Finding("ok", f"{name}, {found.vocab_size:,} tokens, fingerprint {found.fingerprint[:16]}")


def data(config: RunConfig, *, of_recipe: bool, quick: bool) -> Finding:
    """The folders of the run: manifests, sizes, vocabulary, and the first shard of each read to its end."""
    shares = read_shares(config.data, config.mix)
    said = []
    with open_mixture(shares) as train:
        found = train.tokenizer()
        for share, stream in zip(shares, train.streams, strict=True):
            stream.read(0, min(stream.n_tokens, 1 << 20))  # refuses ids that no token has
            if not quick and (share.folder / MANIFEST_NAME).exists():
                verify_shard(share.folder, Manifest.read(share.folder).shards[0])
                said.append(f"first shard of {share.name} has its SHA-256")
        if of_recipe and config.model.vocab_size != found.vocab_size:
            raise DataError(
                f"{train} has {found.vocab_size:,} tokens ({found.name}), the model {config.model.vocab_size:,}; "
                f"set --model.vocab-size {found.vocab_size}, or prepare the data with the other tokenizer."
            )
        n_files = sum(len(stream.files) for stream in train.streams)
        about = (
            f"{train}: {n_files} file(s) of the right size, {train.plan(config.batch.tokens_until(config.max_steps))}"
        )
        notes = train.notes
    if config.eval_every and "val_loss" in config.evals.names:
        open_mixture(shares, "val").close()
    text = "; ".join([about, *said, "regpt2 verify reads all"])
    return Finding("warn", text, " ".join(notes)) if notes else Finding("ok", text)
