"""Damaged checkpoints and shards (9, 10, 16). In: a bench; out: noticed, the one before used, the file named?"""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import points
import trial
from suite import Bench, Fault, Outcome

from regpt2.base.errors import CheckpointError, DataError
from regpt2.base.files import sha256_file
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens import shards
from regpt2.data.tokens.manifest import MANIFEST_NAME, Manifest, Shard, Split
from regpt2.data.tokens.shards import open_tokens, write_shard
from regpt2.training import checkpoint

Damage = Callable[[Path], None]


def flip(path: Path, rng: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut at a random place."""
    with open(path, "rb+") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _random(damage: Callable[[Path, random.Random], None], names: list[str], rng: random.Random) -> Damage:
    name, seed = rng.choice(names), rng.random()
    return lambda folder: damage(folder / name, random.Random(seed))


def _manifest_damages(name: str, other: str) -> dict[str, Damage]:
    """What can be wrong in `manifest.json` of a checkpoint."""

    def of(change: Callable[[dict[str, Any]], Any]) -> Damage:
        def edited(manifest: dict[str, Any]) -> Any:
            return change(manifest) or manifest

        return lambda folder: edit_json(folder / "manifest.json", edited)

    return {
        "another hash": of(lambda m: m["files"][name].update(sha256="0" * 64)),
        "another size": of(lambda m: m["files"][name].update(bytes=1)),
        "a file not listed": of(lambda m: m["files"].pop(name) and None),
        "two entries exchanged": of(lambda m: m["files"].update({name: m["files"][other], other: m["files"][name]})),
        "no files": of(lambda m: m.pop("files") and None),
        "a list": of(lambda m: [m]),
        "a list of files": of(lambda m: m.update(files=list(m["files"]))),
        "not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
        "not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    }


def _fixed_damages(names: list[str]) -> dict[str, Damage]:
    """Whole files: gone, empty, zeros, longer, a folder, exchanged."""
    found: dict[str, Damage] = {}
    for name in names:
        found[f"{name} gone"] = lambda folder, name=name: (folder / name).unlink()
        found[f"{name} empty"] = lambda folder, name=name: (folder / name).write_bytes(b"")
        found[f"{name} zeros"] = lambda folder, name=name: (folder / name).write_bytes(
            bytes((folder / name).stat().st_size)
        )
        found[f"{name} longer"] = lambda folder, name=name: (folder / name).write_bytes(
            (folder / name).read_bytes() + b" "
        )
        found[f"{name} a folder"] = lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir())[1]
    found["two files exchanged"] = lambda folder: swap(folder / names[0], folder / names[1])
    return found


N_FLIPS, N_CUTS, N_FALLBACKS = 200, 40, 6


def checkpoint_damage(bench: Bench) -> Outcome:
    """Every flipped bit, cut, lost or exchanged file is noticed; the checkpoint before is used; all bad is an end."""
    outcome = Outcome()
    trial.reference(bench)
    good = _reference_run(bench) / "checkpoints" / f"step-{trial.STEPS:08d}"
    damages: list[tuple[str, Damage]] = [
        *((f"flip {n}", _random(flip, list(checkpoint.FILES), bench.rng)) for n in range(N_FLIPS)),
        *((f"cut {n}", _random(truncate, [*checkpoint.FILES, "manifest.json"], bench.rng)) for n in range(N_CUTS)),
        *_fixed_damages(list(checkpoint.FILES)).items(),
        *_manifest_damages(checkpoint.MODEL, checkpoint.OPTIMIZER).items(),
    ]
    few = bench.planned < CHECKPOINT_DAMAGES
    damages = bench.rng.sample(damages, bench.planned) if few else damages
    for what, noticed in bench.ask(lambda: _notices(good, bench.new("copy"), damages, _checkpoint_is_bad)).items():
        outcome.fired(not noticed, f"{what}: {noticed}")
    if not few:
        slowest = max(
            _falls_back(bench, outcome, what, damage) for what, damage in damages[:: len(damages) // N_FALLBACKS]
        )
        _all_bad(bench, outcome)
        outcome.remark = f"going on from the one before, with its updates, took {slowest:.1f} s at most"
    return outcome


CHECKPOINT_DAMAGES = N_FLIPS + N_CUTS + len(_fixed_damages(list(checkpoint.FILES))) + len(_manifest_damages("", ""))


def _reference_run(bench: Bench) -> Path:
    return next(path for path in bench.shared.glob("reference-*") if trial.digest(path) == trial.reference(bench))


def _checkpoint_is_bad(folder: Path) -> str:
    """Empty if it is noticed."""
    try:
        checkpoint.verify(folder)
    except CheckpointError:
        return ""
    return "not noticed"


def _notices(good: Path, copy: Path, damages: list[tuple[str, Damage]], check: Callable[[Path], str]) -> dict[str, str]:
    """Damage a copy in each way; what is wrong with how it was met, by damage."""
    found = {"a whole one": "" if check(good) == "not noticed" else "a good one is refused"}
    for what, damage in damages:
        shutil.copytree(good, copy)
        damage(copy)
        try:
            found[what] = check(copy)
        except Exception as error:  # another error than the promised one
            found[what] = f"{type(error).__name__}: {error}"
        shutil.rmtree(copy)
    return {what: fault for what, fault in found.items() if what != "a whole one" or fault}


def _falls_back(bench: Bench, outcome: Outcome, what: str, damage: Damage) -> float:
    """The newest checkpoint is bad: set aside aloud, the one before used, the end the same. Seconds it took."""
    run = bench.new("run")
    shutil.copytree(_reference_run(bench), run)
    damage(run / "checkpoints" / f"step-{trial.STEPS:08d}")
    started_at = time.monotonic()
    process = trial.start(bench, run)
    code, said = process.wait(), process.said
    elapsed_s = time.monotonic() - started_at
    before = trial.STEPS - trial.SAVE_EVERY
    wrong = [] if code == 0 and "Traceback" not in said else [f"exit code {code}"]
    wrong += [] if "set aside" in said and f"resuming from step {before}" in said else ["not said"]
    wrong += [] if (run / "checkpoints" / f"bad-step-{trial.STEPS:08d}").is_dir() else ["not kept aside"]
    wrong += [f"{elapsed_s:.1f} s"] if elapsed_s > 5 else []
    outcome.fired(not wrong, f"fallback after {what}: {'; '.join(wrong)}: {said[-300:]}")
    outcome.same(trial.digest(run), trial.reference(bench), f"fallback after {what}")
    return elapsed_s


def _all_bad(bench: Bench, outcome: Outcome) -> None:
    """No checkpoint is good: the run ends with a list, and does not silently start afresh."""
    run = bench.new("run")
    shutil.copytree(_reference_run(bench), run)
    names = [folder.name for folder in checkpoint.folders(run / "checkpoints")]
    for name in names:
        flip(run / "checkpoints" / name / checkpoint.MODEL, bench.rng)
    record = (run / "metrics.jsonl").read_bytes()
    process = trial.start(bench, run)
    code, said = process.wait(), process.said
    ok = code == 1 and all(name in said for name in names) and "Traceback" not in said
    outcome.fired(ok and (run / "metrics.jsonl").read_bytes() == record, f"all bad: exit code {code}: {said[-400:]}")


N_SHARD_FLIPS, N_SHARD_CUTS = 60, 40


def shard_damage(bench: Bench) -> Outcome:
    """The same for shards, which are also changed while a run reads them: named, and never a SIGBUS."""
    outcome = Outcome()
    data = trial.prepare_data(bench)
    names = sorted(path.name for path in data.glob("*.bin"))
    damages: list[tuple[str, Damage]] = [
        *((f"flip {n}", _random(flip, names, bench.rng)) for n in range(N_SHARD_FLIPS)),
        *((f"cut {n}", _random(truncate, [*names, MANIFEST_NAME], bench.rng)) for n in range(N_SHARD_CUTS)),
        *_fixed_damages(names[:2]).items(),
    ]
    few = bench.planned < SHARD_DAMAGES
    damages = bench.rng.sample(damages, bench.planned) if few else damages
    for what, noticed in bench.ask(lambda: _notices(data, bench.new("copy"), damages, _data_is_bad)).items():
        outcome.fired(not noticed, f"{what}: {noticed}")
    if not few:
        for what, damage in _IN_A_RUN.items():
            _damaged_in_a_run(bench, outcome, what, damage)
    return outcome


SHARD_DAMAGES = N_SHARD_FLIPS + N_SHARD_CUTS + len(_fixed_damages(["a", "b"]))


def _data_is_bad(folder: Path) -> str:
    """Empty if it is noticed, and the file named."""
    try:
        for split in ("train", "val"):
            open_tokens(folder, split).close()
        messages = shards.verify(folder)
    except DataError as error:
        messages = [str(error)]
    if not messages:
        return "not noticed"
    return "" if all(".bin" in message or MANIFEST_NAME in message for message in messages) else messages[0]


_IN_A_RUN: dict[str, Damage] = {
    "truncated": lambda path: truncate(path, random.Random(0)),
    "emptied": lambda path: path.write_bytes(b""),
    "replaced": lambda path: (path.with_suffix(".new").write_bytes(bytes(100)), path.with_suffix(".new").rename(path))[
        0
    ],
    "unlinked": lambda path: path.unlink(),
    "filled with 0xff": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
}


def _damaged_in_a_run(bench: Bench, outcome: Outcome, what: str, damage: Damage) -> None:
    """Either the run ends with the shard's name, or it is the undisturbed run: an open file outlives its name."""
    data, run = bench.new("data"), bench.new("run")
    shutil.copytree(trial.prepare_data(bench), data)
    victims = sorted(data.glob("*_train_*.bin"))

    def harm() -> None:
        for path in victims:
            damage(path)

    process = trial.start(bench, run, "--data", data, before=lambda: points.arm(points.STEP[0], 6, harm))
    code, said = process.wait(), process.said
    if code == 0:
        outcome.fired(trial.newest_step(run) == trial.STEPS, f"{what}: it ended early")
        outcome.same(trial.digest(run), trial.reference(bench), f"{what} in a run")
    else:
        named = any(path.name in said for path in victims)
        outcome.fired(code == 1 and named and "Traceback" not in said, f"{what}: exit code {code}: {said[-400:]}")


def wrong_tokens(bench: Bench) -> Outcome:
    """An id outside the vocabulary, in shards whose hashes are right: refused with shard and place, not looked up."""
    outcome = Outcome()
    cases = [("bytes", 257), ("bytes", 65535), ("gpt2", 50257), ("gpt2", 65535)]
    for tokenizer, bad in cases[: bench.planned]:
        folder, at = bench.new("data"), bench.rng.randrange(1000, 4000)
        _data_with(folder, tokenizer, bad, at)
        if tokenizer == "bytes":
            options = ("--data", folder, "--batch.order", "sequential", "--max-steps", "40", "--eval-every", "0")
            process = trial.start(bench, bench.new("run"), *options)
            code, said = process.wait(), process.said
        else:
            code, said = bench.ask(lambda folder=folder: _read_all(folder))
        ok = (
            code == 1 and f"id {bad}" in said and f"{at:,}" in said and "000000.bin" in said and "Traceback" not in said
        )
        outcome.fired(ok, f"{tokenizer} {bad}: exit code {code}: {said[-300:]}")
    return outcome


def _data_with(folder: Path, tokenizer: str, bad: int, at: int) -> None:
    """A folder with one wrong id; with a manifest for `bytes`, as another project makes it for `gpt2`."""
    folder.mkdir()
    ids = np.full(9000, 97, dtype=np.uint16)
    val = write_shard(folder / "own_val_000000.bin", 9000, [ids])
    ids = ids.copy()
    ids[at] = bad
    train = write_shard(folder / "own_train_000000.bin", 9000, [ids])
    if tokenizer == "bytes":
        known = load_tokenizer("bytes")
        Manifest(
            dataset="own",
            source="made by a fault",
            revision="0",
            tokenizer=known.name,
            tokenizer_fingerprint=known.fingerprint,
            vocab_size=known.vocab_size,
            options={},
            splits={
                name: Split(1, 9000, 9000, (_checked(folder, shard),))
                for name, shard in (("train", train), ("val", val))
            },
            skipped={},
        ).write(folder)


def _checked(folder: Path, shard: Shard) -> Shard:
    assert sha256_file(folder / shard.file) == shard.sha256
    return shard


def _read_all(folder: Path) -> tuple[int, str]:
    try:
        with open_tokens(folder, "train") as tokens:
            tokens.read(0, tokens.n_tokens)
    except DataError as error:
        return 1, str(error)
    return 0, "nothing was said"


FAULTS = [
    Fault(
        9,
        "damaged checkpoints",
        (CHECKPOINT_DAMAGES + N_FALLBACKS, CHECKPOINT_DAMAGES + N_FALLBACKS),
        checkpoint_damage,
    ),
    Fault(10, "damaged shards", (SHARD_DAMAGES + len(_IN_A_RUN), SHARD_DAMAGES + len(_IN_A_RUN)), shard_damage),
    Fault(16, "tokens outside the vocabulary", (4, 4), wrong_tokens),
]
