"""Are the recipe, the disks and the data ready? In: a `Patient`; out: a result for each check."""

import importlib.metadata
import tempfile
import time
from pathlib import Path

from regpt2.base import free_memory
from regpt2.base.device import choose_compute
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import free_bytes, nearest_folder, try_lock, write_atomic
from regpt2.config.setup import setup_of
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, Manifest
from regpt2.data.tokens.shards import verify_shard
from regpt2.machine.health.patient import Check, CheckResult, Patient
from regpt2.machine.planning.disk import most_checkpoints, n_saves
from regpt2.machine.speed.rates import disk_rate
from regpt2.training import checkpoint
from regpt2.training.memory import require_memory, still_needed

EXTRAS = ("gigatoken", "tensorboard", "wandb", "ray", "lm_eval", "onnx", "tokenizers", "transformers")


def run_checks(patient: Patient) -> dict[str, Check]:
    """Every check of the run's folders and packages by its name: for one rank of each machine."""
    found: dict[str, Check] = {
        "run folder": run_folder,
        "checkpoints": checkpoints,
        "packages": packages,
        "tokenizer": tokenizer,
    }
    if not patient.quick:
        found["disk"] = disk
    if patient.config.data or patient.config.mix:
        found["data"] = data
    return found


def recipe(patient: Patient) -> CheckResult:
    """Does the update divide over the ranks, and fit into the memory of each?"""
    world, config = patient.world, patient.config
    precision = choose_compute(config.precision, world.device).precision
    setup = setup_of(config, world.size, device=world.device.type, precision=precision, compiled=patient.compiles)
    config.check_ranks(world.size)
    doubt = require_memory(setup, config.batch.tokens_of(1), free_memory.free_bytes(world.device))
    text = (
        f"{config.batch.batch_tokens:,} tokens per update = {world.size} rank(s) x {setup.grad_accum_steps} x "
        f"{setup.micro_batch} x {setup.seq_len}{config.batch.growth}, in about {still_needed(setup) / 1e9:.3g} GB"
    )
    return CheckResult("warn", text, doubt) if doubt else CheckResult("ok", f"{text}; regpt2 plan adds time and cost")


def run_folder(patient: Patient) -> CheckResult:
    """What a checkpoint needs of its disk: atomic renames of files and folders, locks, a clock."""
    place = _run_disk(Path(patient.config.run))
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        folder = Path(name)
        write_atomic(folder / "part" / "file", b"first")
        write_atomic(folder / "part" / "file", b"second")
        (folder / "part").rename(folder / "whole")
        if (folder / "whole" / "file").read_bytes() != b"second":
            return CheckResult(
                "FAIL", f"{place}: a file that was replaced still has its old content", "use another disk"
            )
        behind_s = time.time() - (folder / "whole" / "file").stat().st_mtime
        with open(folder / "lock", "a+b") as one, open(folder / "lock", "a+b") as other:
            if not try_lock(one) or try_lock(other):
                return CheckResult("FAIL", f"{place}: a locked file can be locked again", "mount it with working locks")
    text = f"{place}: writes, renames and locks work"
    if abs(behind_s) > 5:
        return CheckResult("warn", f"{text}; its clock is off by {behind_s:.0f} s", "synchronize the clocks")
    return CheckResult("ok", text)


def checkpoints(patient: Patient) -> CheckResult:
    """Space for the checkpoints that are kept, and the one that is written before the oldest is removed."""
    config, folder = patient.config, Path(patient.config.run) / "checkpoints"
    if not (config.save_every or config.keep_best):
        return CheckResult("ok", "the run saves none: save_every = 0")
    n_bytes, kept = patient.saved_bytes, config.keep_checkpoints
    best = patient.best_bytes
    checkpoint.require_room(folder, n_bytes, keep=kept, saves_left=n_saves(config), best_bytes=best)
    free, most = free_bytes(folder) / 1e9, most_checkpoints(config)
    text = f"{free:.3g} GB free, at most {most} of {n_bytes / 1e9:.3g} GB each"
    return CheckResult("ok", f"{text}, and 2 best ones of {best / 1e9:.3g} GB" if best else text)


def _run_disk(path: Path) -> Path:
    place = nearest_folder(path)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder; choose another --run.")
    return place


def disk(patient: Patient) -> CheckResult:
    """How fast the run folder's disk is."""
    place = _run_disk(Path(patient.config.run))
    n_bytes = max(1 << 20, min(256 << 20, free_bytes(place) // 4))
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        write, read = disk_rate(Path(name) / "random", n_bytes)
    save_s = patient.saved_bytes / write
    text = (
        f"{n_bytes >> 20} MiB written and fsynced at {write / 1e6:,.0f} MB/s, read at {read / 1e6:,.0f}; "
        f"a checkpoint of {patient.saved_bytes / 1e9:.3g} GB takes {save_s:.2g} s"
    )
    figures = {"write_bytes_per_s": write, "read_bytes_per_s": read}
    if save_s > 60:
        return CheckResult("warn", text, "expected below a minute: a local disk, or a larger --save-every", figures)
    return CheckResult("ok", text, figures=figures)


def packages(patient: Patient) -> CheckResult:
    """Extras that are installed, and those that the recipe needs."""
    installed = {name: version for name in EXTRAS if (version := _version(name))}
    missing = [name for name in patient.config.track if name not in installed]
    text = f"extras: {', '.join(f'{name} {version}' for name, version in installed.items()) or 'none'}"
    if missing:
        return CheckResult("FAIL", f"{text}; track needs {missing[0]}", f"pip install 'regpt2[{missing[0]}]'")
    return CheckResult("ok", text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tokenizer(patient: Patient) -> CheckResult:
    """Is the tokenizer of the model's vocabulary installed, and does it give the ids that GPT-2 was trained on?"""
    size = patient.config.model.vocab_size
    name = {50257: "gpt2", 257: "bytes"}.get(size)
    if name is None:
        return CheckResult(
            "ok", f"no built-in tokenizer has {size:,} tokens; the data folder's own is checked by 'data'"
        )
    found = load_tokenizer(name)
    text = "Hello, I'm a language model,"
    ids = found.encode(text)
    if name == "gpt2" and ids != [15496, 11, 314, 1101, 257, 3303, 2746, 11]:  # as in the lecture
        return CheckResult("FAIL", f"{text!r} became {ids}", "expected 15496, 11, 314, ...: reinstall tiktoken")
    return CheckResult("ok", f"{name}, {found.vocab_size:,} tokens, fingerprint {found.fingerprint[:16]}")


def data(patient: Patient) -> CheckResult:
    """The run's data folders: manifests, sizes, vocabulary, and the first shard of each by its hash."""
    config = patient.config
    shares = read_shares(config.data, config.mix)
    texts = []
    with open_mixture(shares) as train:
        found = train.tokenizer()
        for share, stream in zip(shares, train.streams, strict=True):
            stream.read(0, min(stream.n_tokens, 1 << 20))  # refuses ids beyond the vocabulary
            if not patient.quick and (share.folder / MANIFEST_NAME).exists():
                verify_shard(share.folder, Manifest.read(share.folder).shards[0])
                texts.append(f"the first shard of {share.name} matches its SHA-256")
        # With init the model may have other rows; the run's start compares the tokenizers themselves.
        if patient.of_recipe and not config.init and config.model.vocab_size != found.vocab_size:
            raise DataError(
                f"{train} has {found.vocab_size:,} tokens ({found.name}), the model {config.model.vocab_size:,}; "
                f"set --model.vocab-size {found.vocab_size}, or prepare the data with the other tokenizer."
            )
        n_files = sum(len(stream.files) for stream in train.streams)
        plan, notes = train.plan(config.batch.tokens_until(config.max_steps)), train.notes
        about = f"{train}: {n_files} file(s) of the right size, {plan}"
    if config.eval_every and "val_loss" in config.evals.names:
        open_mixture(shares, "val").close()
    text = "; ".join([about, *texts, "regpt2 verify checks all"])
    return CheckResult("warn", text, " ".join(notes)) if notes else CheckResult("ok", text)
