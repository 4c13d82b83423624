"""Text to tokens to shards: a data set's name in, a folder of shards with its `manifest.json` out.

It can be killed at any moment: the same command goes on, and the folder is the same, byte for byte, for any number
of workers and interruptions. `docs/data.md` tells how.
"""

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import tyro

from regpt2.base import plugins
from regpt2.base.console import ProgressLine, count, duration, say
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import folder_lock, require_free_space
from regpt2.data.documents import Plan, Source
from regpt2.data.manifest import MANIFEST_NAME, TOKEN_BYTES, Manifest, Split
from regpt2.data.packing import Ledger, Packer, discard
from regpt2.data.parts import PARTS_NAME, Job, PartResult
from regpt2.data.shards import LEDGER_NAME
from regpt2.data.tokenizer import Tokenizer, find_vocab, load_tokenizer
from regpt2.data.workers import run_tasks

SHELF = "data.datasets"
TOKENS_PER_BYTE = {"gpt2": 0.5, "bytes": 1.0}  # for the disk estimate: English has 0.22, Python code 0.45
DEFAULT_SHARD_TOKENS = 100_000_000  # as in llm.c


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how."""

    dataset: tyro.conf.Positional[str]
    """The data set (see above)."""
    out: Path
    """The folder to write; run the same command again to go on after an interruption."""
    input: Path | None = None
    """Your file or folder, for text_files; or a local copy of a data set that is downloaded."""
    field: str = "text"
    """The field or column that holds the text in .jsonl and .parquet."""
    tokenizer: str = "gpt2"
    """gpt2 (50,257 ids) or bytes (257)."""
    vocab: Path | None = None
    """A vocab.bpe of your own for gpt2; it must be GPT-2's."""
    workers: int = dataclasses.field(default_factory=_cores)
    """Processes; the result is the same for any number."""
    val_fraction: float = 0.05
    """About this share of the documents goes to the validation split."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens per shard; the last of each split is shorter."""


def main(argv: list[str]) -> int:
    """The command `regpt2 prepare`."""
    entries = [f"{name}: {plugins.load(SHELF, name).DESCRIPTION}." for name in plugins.entries(SHELF)]
    about = "Text to tokens to shards. Data sets:\n\n" + "\n\n".join(entries)
    prepare(tyro.cli(PrepareOptions, args=argv, prog="regpt2 prepare", description=about))
    return 0


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare a data set, or go on where an earlier call was interrupted. Progress and a summary are printed.

    A script that calls this with several workers needs `if __name__ == "__main__":`, as for all of multiprocessing.

    Raises:
        UsageError: an impossible option, or `options.out` holds something else.
        DataError: the input cannot be read, has changed, or gives an empty split.
    """
    started_at = time.monotonic()
    _check(options)
    entry = plugins.load(SHELF, options.dataset)
    vocab = find_vocab(options.vocab) if options.tokenizer == "gpt2" else options.vocab
    tokenizer = load_tokenizer(options.tokenizer, vocab)
    plan: Plan = entry.plan(Source(options.input, options.field))
    settings = _settings(options, plan, tokenizer)
    with folder_lock(options.out):
        if (options.out / MANIFEST_NAME).exists():
            return _already_complete(options.out, settings)
        ledger = _begin_or_go_on(options, plan, settings)
        job = Job(options.dataset, options.tokenizer, vocab, options.val_fraction, options.out / PARTS_NAME)
        packer = Packer(options.out, options.dataset, options.shard_tokens, ledger)
        _encode_and_pack(plan, job, packer, options.workers)
        if _plan_again(entry, options) != plan.fingerprint:
            raise _changed(options.out)
        manifest = _finish(options, plan, tokenizer, packer)
    _summarize(manifest, options, time.monotonic() - started_at)
    return manifest


def _check(options: PrepareOptions) -> None:
    if not 0 < options.val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {options.val_fraction} must be above 0 and at most 0.5; the usual is 0.05.")
    if not 1 <= options.shard_tokens < 2**31:
        raise UsageError(
            f"--shard-tokens {options.shard_tokens} must be from 1 to 2,147,483,647; the usual is 100000000."
        )
    if options.workers < 1:
        raise UsageError(f"--workers {options.workers} must be at least 1; this machine has {_cores()} cores.")
    if options.input is not None and options.out.resolve().is_relative_to(options.input.resolve()):
        raise UsageError(f"--out {options.out} must not lie inside --input {options.input}; choose a folder beside it.")


def _settings(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer) -> dict[str, str]:
    """All that decides what the shards hold: a folder made with other settings is another one."""
    return {
        "dataset": options.dataset,
        "source": plan.source,
        "revision": plan.revision,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    } | _shaping(options)


def _shaping(options: PrepareOptions) -> dict[str, str]:
    names = ("field", "val_fraction", "shard_tokens")
    return {name: str(getattr(options, name)) for name in names}


def _already_complete(folder: Path, settings: dict[str, str]) -> Manifest:
    manifest = Manifest.read(folder)
    names = ("dataset", "source", "revision", "tokenizer", "tokenizer_fingerprint")
    _require_same(folder, {name: getattr(manifest, name) for name in names} | manifest.options, settings)
    _clear(folder)
    say(f"{folder} is complete already; nothing to do.")
    return manifest


def _begin_or_go_on(options: PrepareOptions, plan: Plan, settings: dict[str, str]) -> Ledger:
    folder = options.out
    ledger = Ledger.read(folder)
    if ledger is None:
        if strangers := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".npy")):
            raise UsageError(f"{folder} holds tokens from elsewhere already ({strangers[0]}); choose another --out.")
        ledger = Ledger(settings, plan.fingerprint)
    else:
        _require_same(folder, ledger.settings, settings)
        if ledger.plan != plan.fingerprint:
            raise _changed(folder)
    shards_bytes = sum(shard.bytes for progress in ledger.progress.values() for shard in progress.shards)
    total_bytes = int(plan.n_bytes * TOKENS_PER_BYTE[options.tokenizer] * TOKEN_BYTES)
    waiting_bytes = min(total_bytes, 2 * options.shard_tokens * TOKEN_BYTES)  # parts that are in no shard yet
    what = f"preparing {plan.n_bytes / 1e6:,.1f} MB of text"
    require_free_space(folder, max(0, total_bytes + waiting_bytes - shards_bytes), what)
    (folder / PARTS_NAME).mkdir(exist_ok=True)
    for place in (folder, folder / PARTS_NAME):
        for left_by_a_kill in place.glob(".*.tmp"):
            left_by_a_kill.unlink()
    return ledger


def _require_same(folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            raise UsageError(
                f"{folder} holds another preparation: its {name} is {there.get(name)!r}, this command's is {value!r}; "
                "choose another --out, or remove the folder."
            )


def _changed(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the input files have changed (names, sizes or times) since this preparation was begun; "
        "remove the folder and run the command again."
    )


def _encode_and_pack(plan: Plan, job: Job, packer: Packer, workers: int) -> None:
    """Have every unfinished part encoded, and pack the finished ones in the order of the plan."""
    upcoming = packer.ledger.folded
    done = {n for n in range(upcoming, len(plan.parts)) if PartResult.read(job.folder, n) is not None}
    tasks = [(n, plan.parts[n]) for n in range(upcoming, len(plan.parts)) if n not in done]
    if done or upcoming:
        say(f"Going on: {upcoming + len(done):,} of {len(plan.parts):,} parts are done.")
    with ProgressLine("prepare", sum(part.n_bytes for _, part in tasks) / 1e6, "MB") as line:
        while upcoming in done:
            packer.take(upcoming)
            upcoming += 1
        for index, part in run_tasks(tasks, job.start, max(1, min(workers, len(tasks)))):
            line.advance(part.n_bytes / 1e6)
            done.add(index)
            while upcoming in done:
                packer.take(upcoming)
                upcoming += 1


def _plan_again(entry: ModuleType, options: PrepareOptions) -> str:
    plan: Plan = entry.plan(Source(options.input, options.field))
    return plan.fingerprint


def _finish(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer, packer: Packer) -> Manifest:
    """The last shards, then the manifest, then nothing else is needed."""
    try:
        tallies, skipped = packer.finish()
    except DataError:
        discard(options.out, options.dataset)  # other options are another preparation
        raise
    progress = packer.ledger.progress
    manifest = Manifest(
        dataset=options.dataset,
        source=plan.source,
        revision=plan.revision,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        options=_shaping(options),
        splits={
            name: Split(tally.documents, tally.tokens, tally.text_bytes, tuple(progress[name].shards))
            for name, tally in tallies.items()
        },
        skipped=dict(sorted((plan.skipped | skipped).items())),
    )
    manifest.write(options.out)
    _clear(options.out)
    return manifest


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    (folder / LEDGER_NAME).unlink(missing_ok=True)


def _summarize(manifest: Manifest, options: PrepareOptions, elapsed_s: float) -> None:
    say(f"{manifest.dataset} ({manifest.source}) with the {manifest.tokenizer} tokenizer in {duration(elapsed_s)}:")
    for name, split in manifest.splits.items():
        last = split.shards[-1]
        short = f", last shard: {last.tokens:,} tokens (the rest, as expected)" if len(split.shards) > 1 else ""
        say(
            f"  {name:5} {split.documents:,} documents, {split.tokens:,} tokens, {count(split.text_bytes)} bytes "
            f"({split.text_bytes / split.tokens:.3f} per token), {len(split.shards)} shard(s){short}"
        )
    for reason, number in manifest.skipped.items():
        say(f"  {reason}: {number:,}")
    if not manifest.skipped:
        say("  nothing was skipped")
    say(f"  fingerprint {manifest.fingerprint[:16]}, in {options.out}")
