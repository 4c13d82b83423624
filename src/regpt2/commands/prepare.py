"""Text to tokens to shards: a data set's name in, a folder of shards with its `manifest.json` out.

It can be killed at any moment: the same command goes on, and the folder is the same, byte for byte, for any number
of workers and interruptions. `docs/data.md` tells how.
"""

import dataclasses
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from regpt2.base import plugins
from regpt2.base.console import ProgressLine, count, duration, say
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import folder_lock
from regpt2.base.options import parse
from regpt2.data.fast_tokenizer import EncoderName, fast_tokenizer
from regpt2.data.preparing.cluster import OPTIONS, check_options, encode
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.preparing.encode_part import PARTS_NAME, Job, PartResult, forget_copies
from regpt2.data.preparing.pack_shards import Ledger, Packer, Packing, clear, discard
from regpt2.data.preparing.ready_shards import collect
from regpt2.data.preparing.workers import run_tasks
from regpt2.data.sources.filters import Filters
from regpt2.data.sources.plan import Part, Plan, Source
from regpt2.data.tokenizer import Tokenizer, find_vocab, load_tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, Manifest, Split, described

SHELF = "data.datasets"
DEFAULT_SHARD_TOKENS = 100_000_000  # as in llm.c
DEFAULT_VAL_FRACTION = 0.05
ENCODER = "encoder"  # among the options in the manifest


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """The data set, one of those above."""
    out: Path
    """The folder to write. After an interruption, run the same command again to resume."""
    input: Path | None = None
    """For text_files: your file or folder. For a published data set: a local copy instead of the download."""
    field: str = "text"
    """The field or column with the text in .jsonl, .json and .parquet; meta.text is the field text inside meta."""
    repo: str = ""
    """For hub: the id of the data set, owner/name."""
    config: str = ""
    """The configuration of a published data set; see its line above."""
    split: str = ""
    """For hub: the split; default: train."""
    revision: str = ""
    """Branch, tag or commit of a published data set, instead of the pinned one."""
    first: int | None = None
    """Use only the first N files of a published data set, to try it."""
    tokenizer: str = "gpt2"
    """gpt2 (50,257 ids) or bytes (257)."""
    vocab: Path | None = None
    """A vocab.bpe of your own for gpt2; it must be GPT-2's."""
    encoder: EncoderName = "auto"
    """What computes gpt2's ids: auto uses gigatoken if it is installed and gives equal ids, else tiktoken."""
    workers: int = dataclasses.field(default_factory=_cores)
    """Number of processes; it does not change the result."""
    engine: Annotated[str, tyro.conf.arg(metavar=f"{{processes,{','.join(OPTIONS)}}}")] = "processes"
    """Where to encode: processes on this machine, a Slurm job array, or tasks on a Ray cluster."""
    tasks: int | None = None
    """With slurm or ray: number of tasks that share the work; default: four for each of --workers."""
    engine_options: tuple[str, ...] = ()
    """With slurm or ray: its options as NAME=VALUE, such as partition=cpu time=04:00:00 for slurm."""
    val_fraction: float | None = None
    """Share of the documents, about, that goes to the validation split; default: 0.05."""
    val_tokens: int | None = None
    """Take the first N tokens as the validation split, as in the lecture."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens per shard; the last shard of each split is shorter."""
    dedup: bool = False
    """Leave out exact duplicates of earlier documents."""
    filters: Annotated[Filters, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Filters)
    disk_limit: float | None = None
    """Use at most N GB of disk at any time, shards included, by working on fewer files at once."""

    @property
    def source(self) -> Source:
        """What is asked of the data set's entry."""
        asked = (self.input, self.field, self.repo, self.config, self.split, self.revision, self.first)
        return Source(*asked)


def main(argv: list[str]) -> int:
    """The command `regpt2 prepare`."""
    entries = [f"  {name:<17} {plugins.load(SHELF, name).DESCRIPTION}." for name in plugins.entries(SHELF)]
    about = "\n".join(["Text to tokens to shards. Data sets:", *entries])
    prepare(parse(PrepareOptions, argv, "regpt2 prepare", about=about))
    return 0


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare a data set, or go on where an earlier call was interrupted. Progress and a summary are printed.

    A script that calls this with several workers needs `if __name__ == "__main__":`, as for all of multiprocessing.

    Raises:
        UsageError: an impossible option, or `options.out` holds something else.
        DataError: the input cannot be read, has changed, or gives an empty split.
        DownloadError: the input is elsewhere and cannot be fetched.
    """
    started_at = time.monotonic()
    _check(options)
    entry = plugins.load(SHELF, options.dataset)
    if hasattr(entry, "shards"):
        manifest = _collect(entry, options)
        _summarize(manifest, options, time.monotonic() - started_at)
        return manifest
    vocab = find_vocab(options.vocab) if options.tokenizer == "gpt2" else options.vocab
    tokenizer = fast_tokenizer(options.encoder, load_tokenizer(options.tokenizer, vocab))
    plan: Plan = entry.plan(options.source)
    settings = _settings(options, plan, tokenizer)
    with folder_lock(options.out):
        if (options.out / MANIFEST_NAME).exists():
            return _already_complete(options.out, settings)
        limit_bytes = None if options.disk_limit is None else int(options.disk_limit * 1e9)
        space = Space(plan, options.tokenizer, options.shard_tokens, options.workers, limit_bytes)
        ledger = _begin_or_go_on(options, plan, settings, space)
        packer = Packer(options.out, _packing(options, plan, tokenizer), ledger)
        _encode_and_pack(plan, _job(options, plan, vocab), packer, space, options)
        if plan.is_local and entry.plan(options.source).fingerprint != plan.fingerprint:
            raise _changed(options.out)
        manifest = _finish(options, plan, tokenizer, packer)
    _summarize(manifest, options, time.monotonic() - started_at)
    return manifest


def _check(options: PrepareOptions) -> None:
    if options.val_fraction is not None and options.val_tokens is not None:
        raise UsageError("--val-fraction and --val-tokens both say what validation is; leave one out.")
    if options.val_fraction is not None and not 0 < options.val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {options.val_fraction} must be above 0 and at most 0.5; the usual is 0.05.")
    if options.val_tokens is not None and options.val_tokens < 1:
        raise UsageError(f"--val-tokens {options.val_tokens} must be at least 1; the lecture has 100000000.")
    if not 1 <= options.shard_tokens < 2**31:
        raise UsageError(
            f"--shard-tokens {options.shard_tokens} must be from 1 to 2,147,483,647; the usual is 100000000."
        )
    if options.workers < 1:
        raise UsageError(f"--workers {options.workers} must be at least 1; this machine has {_cores()} cores.")
    if options.first is not None and options.first < 1:
        raise UsageError(f"--first {options.first} must be at least 1.")
    if options.input is not None and options.out.resolve().is_relative_to(options.input.resolve()):
        raise UsageError(f"--out {options.out} must not lie inside --input {options.input}; choose a folder beside it.")
    _check_engine(options)


def _check_engine(options: PrepareOptions) -> None:
    if options.engine != "processes":
        check_options(options.engine, _engine_options(options))
        if options.disk_limit is not None:
            raise UsageError(
                f"--disk-limit works with our own processes, not with --engine {options.engine}; leave one out."
            )
    elif options.engine_options or options.tasks is not None:
        raise UsageError("--tasks and --engine-options need --engine slurm or ray; choose one, or leave them out.")
    if options.tasks is not None and options.tasks < 1:
        raise UsageError(f"--tasks {options.tasks} must be at least 1.")


def _collect(entry: ModuleType, options: PrepareOptions) -> Manifest:
    """Get shards that are ready: nothing shapes them any more."""
    usual = PrepareOptions(options.dataset, options.out)
    for name in ("field", "tokenizer", "val_fraction", "val_tokens", "shard_tokens", "dedup", "filters", "disk_limit"):
        if getattr(options, name) != getattr(usual, name):
            raise UsageError(f"{options.dataset} has shards as they are; leave out --{name.replace('_', '-')}.")
    plan = entry.shards(options.source)
    with folder_lock(options.out):
        return collect(plan, options.out, options.vocab, options.workers)


def _val_tokens(options: PrepareOptions, plan: Plan) -> int:
    """So many first tokens are for validation; 0: a share of the documents is."""
    if options.val_fraction is not None:
        return 0
    return plan.val_tokens if options.val_tokens is None else options.val_tokens


def _job(options: PrepareOptions, plan: Plan, vocab: Path | None) -> Job:
    return Job(
        dataset=options.dataset,
        tokenizer=options.tokenizer,
        vocab=vocab,
        encoder=options.encoder,
        val_fraction=None if _val_tokens(options, plan) else options.val_fraction or DEFAULT_VAL_FRACTION,
        filters=options.filters,
        dedup=options.dedup,
        folder=options.out / PARTS_NAME,
    )


def _packing(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer) -> Packing:
    return Packing(
        dataset=options.dataset,
        shard_tokens=options.shard_tokens,
        val_tokens=_val_tokens(options, plan),
        dedup=options.dedup,
        tokenizer=tokenizer,
    )


def _settings(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer) -> dict[str, str]:
    """All that decides what the shards hold: a folder made with other settings is another one."""
    return {
        "dataset": options.dataset,
        "source": plan.source,
        "revision": plan.revision,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    } | _shaping(options, plan)


def _shaping(options: PrepareOptions, plan: Plan) -> dict[str, str]:
    """The options that decide what the shards hold, where they are not as usual."""
    val_tokens = _val_tokens(options, plan)
    shaping = {"field": options.field, "shard_tokens": str(options.shard_tokens)}
    shaping |= (
        {"val_tokens": str(val_tokens)}
        if val_tokens
        else {"val_fraction": str(options.val_fraction or DEFAULT_VAL_FRACTION)}
    )
    rules = dataclasses.asdict(options.filters) | {"dedup": options.dedup}
    usual = dataclasses.asdict(Filters()) | {"dedup": False}
    return shaping | {name: str(value) for name, value in rules.items() if value != usual[name]}


def _already_complete(folder: Path, settings: dict[str, str]) -> Manifest:
    manifest = Manifest.read(folder)
    names = ("dataset", "source", "revision", "tokenizer", "tokenizer_fingerprint")
    there = {name: getattr(manifest, name) for name in names} | manifest.options
    there.pop(ENCODER, None)  # another one gives the same ids
    _require_same(folder, there, settings)
    clear(folder)
    say(f"{folder} is complete already; nothing to do.")
    return manifest


def _begin_or_go_on(options: PrepareOptions, plan: Plan, settings: dict[str, str], space: Space) -> Ledger:
    folder = options.out
    ledger = Ledger.read(folder)
    if ledger is None:
        if strangers := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".npy", ".ds")):
            raise UsageError(f"{folder} holds tokens from elsewhere already ({strangers[0]}); choose another --out.")
        ledger = Ledger(settings, plan.fingerprint)
    else:
        _require_same(folder, ledger.settings, settings)
        if ledger.plan != plan.fingerprint:
            raise _changed(folder)
    (folder / PARTS_NAME).mkdir(exist_ok=True)
    # A Slurm job of an earlier call may still be writing parts; the engine cleans up when it submits a new one.
    for place in [folder] if options.engine == "slurm" else [folder, folder / PARTS_NAME]:
        for left_by_a_kill in place.glob(".*.tmp"):
            left_by_a_kill.unlink()
    space.require(folder)
    return ledger


def _require_same(folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    for name in dict.fromkeys([*here, *there]):
        if there.get(name) != here.get(name):
            is_commit = name == "revision" and re.fullmatch("[0-9a-f]{40}", there.get(name, ""))
            go_on = f"resume with --revision {there[name]}, " if is_commit else ""
            raise UsageError(
                f"{folder} holds another preparation: its {name} is {there.get(name)!r}, this command's is "
                f"{here.get(name)!r}; {go_on}choose another --out, or remove the folder."
            )


def _changed(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the input files have changed (names, sizes or times) since this preparation was begun; "
        "remove the folder and run the command again."
    )


def _encode_and_pack(plan: Plan, job: Job, packer: Packer, space: Space, options: PrepareOptions) -> None:
    """Have every unfinished part encoded; the packer puts them into the order of the plan."""
    folded = packer.ledger.folded
    done = {n for n in range(folded, len(plan.parts)) if PartResult.read(job.folder, n) is not None}
    tasks = [(n, plan.parts[n]) for n in range(folded, len(plan.parts)) if n not in done]
    if done or folded:
        say(f"Going on: {folded + len(done):,} of {len(plan.parts):,} parts are done.")
        forget_copies(job.folder, lambda n: n < folded or n in done)
    for index in sorted(done):
        packer.add(index)
    with ProgressLine("prepare", sum(part.n_bytes for _, part in tasks) / 1e6, "MB") as line:
        if options.engine != "processes":
            _encode_by_engine(tasks, job, packer, options, line)
            return
        may_begin = space.admission(lambda: packer.upcoming, lambda: packer.waiting_bytes)
        workers = max(1, min(options.workers, len(tasks)))
        advance = partial(_advance, line)
        for index, _ in run_tasks(tasks, job.start, workers, may_begin=may_begin, on_progress=advance):
            packer.add(index)


def _encode_by_engine(
    tasks: list[tuple[int, Part]], job: Job, packer: Packer, options: PrepareOptions, line: ProgressLine
) -> None:
    sizes = {index: part.n_bytes for index, part in tasks}

    def on_done(index: int) -> None:
        line.advance(sizes[index] / 1e6)
        packer.add(index)

    n_tasks, given = options.tasks or 4 * options.workers, _engine_options(options)
    if tasks:
        encode(options.engine, job, tasks, n_tasks=n_tasks, workers=options.workers, options=given, on_done=on_done)


def _engine_options(options: PrepareOptions) -> dict[str, str]:
    """`("partition=cpu", ...)` by name."""
    pairs = [item.partition("=") for item in options.engine_options]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise UsageError(f"--engine-options {wrong[0]!r}: expected NAME=VALUE, as in partition=cpu.")
    return {name: value for name, _, value in pairs}


def _advance(line: ProgressLine, n_bytes: int) -> None:
    line.advance(n_bytes / 1e6)


def _finish(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer, packer: Packer) -> Manifest:
    """The last shards, then the manifest, then nothing else is needed."""
    try:
        tallies, skipped = packer.finish(plan.skipped)
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
        options=_shaping(options, plan) | {ENCODER: packer.encoders},
        splits={
            name: Split(tally.documents, tally.tokens, tally.text_bytes, tuple(progress[name].shards))
            for name, tally in tallies.items()
        },
        skipped=dict(sorted(skipped.items())),
        first_skipped=dict(sorted(skipped.first.items())),
    )
    manifest.write(options.out)
    clear(options.out)
    return manifest


def _summarize(manifest: Manifest, options: PrepareOptions, elapsed_s: float) -> None:
    say(f"{manifest.dataset} ({manifest.source}) with the {manifest.tokenizer} tokenizer in {duration(elapsed_s)}:")
    for name, split in manifest.splits.items():
        last = split.shards[-1]
        short = f", last shard: {last.tokens:,} tokens (the rest, as expected)" if len(split.shards) > 1 else ""
        say(
            f"  {name:5} {split.documents:,} documents, {split.tokens:,} tokens, {count(split.text_bytes)} bytes "
            f"({split.text_bytes / split.tokens:.3f} per token), {len(split.shards)} shard(s){short}"
        )
    for line in described(manifest.skipped, manifest.first_skipped):
        say(f"  {line}")
    if not manifest.skipped:
        say("  nothing was skipped")
    say(f"  fingerprint {manifest.fingerprint[:16]}, in {options.out}")
