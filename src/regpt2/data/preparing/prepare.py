"""Text to tokens to shards. In: a data set's name and options; out: a folder of shards with its `manifest.json`.

It can be killed at any moment: the same command resumes, and the folder is the same, byte for byte, for any number
of workers and interruptions. `docs/data.md` explains how.
"""

import time
from pathlib import Path
from types import ModuleType

from regpt2.base import shelves
from regpt2.base.console import ProgressLine, count, duration, say
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import folder_lock
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.fast_tokenizer import fast_tokenizer
from regpt2.data.preparing.cluster import encode
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.preparing.encode_part import PARTS_NAME, EncodeJob, PartResult, added_tokens, forget_copies
from regpt2.data.preparing.ledger import ENCODER, begin, changed, clear, complete_already, discard
from regpt2.data.preparing.options import SHELF, PrepareOptions
from regpt2.data.preparing.pack_shards import Packer
from regpt2.data.preparing.ready_shards import collect
from regpt2.data.preparing.workers import run_tasks
from regpt2.data.sources.plan import Plan
from regpt2.data.tokenizer import Tokenizer, find_vocab, load_tokenizer
from regpt2.data.tokens.manifest import TOKEN_BYTES, Manifest, Split, described
from regpt2.data.tokens.masks import MASK_BYTES


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare a data set, or resume where an earlier call was interrupted. Progress and a summary are printed.

    A script that calls this with several workers needs `if __name__ == "__main__":`, as for all of multiprocessing.

    Raises:
        UsageError: an impossible option, or `options.out` holds something else.
        DataError: the input cannot be read, has changed, or gives an empty split.
        DownloadError: the input cannot be downloaded.
    """
    started_at = time.monotonic()
    options.check()
    entry = shelves.load(SHELF, options.dataset)
    if hasattr(entry, "shards"):
        manifest = _collect(entry, options)
    else:
        vocab = find_vocab(options.vocab) if options.tokenizer == "gpt2" else options.vocab
        tokenizer = fast_tokenizer(options.encoder, load_tokenizer(options.tokenizer, vocab))
        if added := added_tokens(entry):
            tokenizer = AddedTokens(tokenizer, added)
        plan: Plan = entry.plan(options.source)
        with folder_lock(options.out):
            if finished := complete_already(options.out, options.settings(plan, tokenizer)):
                return finished
            packer = _encode_and_pack(options, plan, tokenizer, vocab)
            if plan.is_local and entry.plan(options.source).fingerprint != plan.fingerprint:
                raise changed(options.out)
            manifest = _finish(options, plan, tokenizer, packer)
    _summarize(manifest, options, time.monotonic() - started_at)
    return manifest


def _collect(entry: ModuleType, options: PrepareOptions) -> Manifest:
    """Get ready-made shards. Options that shape shards are refused."""
    default = PrepareOptions(options.dataset, options.out)
    for name in ("field", "tokenizer", "val_fraction", "val_tokens", "shard_tokens", "dedup", "filters", "disk_limit"):
        if getattr(options, name) != getattr(default, name):
            raise UsageError(f"{options.dataset} has ready-made shards; leave out --{name.replace('_', '-')}.")
    plan = entry.shards(options.source)
    with folder_lock(options.out):
        return collect(plan, options.out, options.vocab, options.workers)


def _encode_and_pack(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer, vocab: Path | None) -> Packer:
    """Have every unfinished part encoded; the packer puts them into the order of the plan."""
    val_tokens, val_fraction = options.validation(plan)
    limit_bytes = None if options.disk_limit is None else int(options.disk_limit * 1e9)
    masked = isinstance(tokenizer, AddedTokens)
    token_bytes = TOKEN_BYTES + MASK_BYTES * masked
    space = Space(plan, options.tokenizer, options.shard_tokens, options.workers, limit_bytes, token_bytes)
    # A Slurm job of an earlier call may still be writing parts; the engine cleans up when it submits a new one.
    is_slurm = options.engine == "slurm"
    ledger = begin(options.out, options.settings(plan, tokenizer), plan.fingerprint, keep_parts_tmp=is_slurm)
    space.require(options.out)
    shard_tokens, dedup = options.shard_tokens, options.dedup
    sizes = {"shard_tokens": shard_tokens, "val_tokens": val_tokens}
    packer = Packer(options.out, ledger, tokenizer, **sizes, dedup=dedup, masked=masked)
    job = EncodeJob(
        dataset=options.dataset,
        tokenizer=options.tokenizer,
        vocab=vocab,
        encoder=options.encoder,
        val_fraction=val_fraction,
        filters=options.filters,
        dedup=dedup,
        folder=options.out / PARTS_NAME,
        options=options.own,
    )
    folded = ledger.folded
    done = {n for n in range(folded, len(plan.parts)) if PartResult.read(job.folder, n) is not None}
    tasks = [(n, plan.parts[n]) for n in range(folded, len(plan.parts)) if n not in done]
    if done or folded:
        say(f"Resuming: {folded + len(done):,} of {len(plan.parts):,} parts are done.")
        forget_copies(job.folder, lambda n: n < folded or n in done)
    for index in sorted(done):
        packer.add(index)
    with ProgressLine("prepare", sum(part.n_bytes for _, part in tasks) / 1e6, "MB") as line:
        if options.engine == "processes":
            may_begin = space.admission(lambda: packer.upcoming, lambda: packer.waiting_bytes)
            workers = max(1, min(options.workers, len(tasks)))
            advance = lambda n_bytes: line.advance(n_bytes / 1e6)  # noqa: E731
            for index, _ in run_tasks(tasks, job.start, workers, may_begin=may_begin, on_progress=advance):
                packer.add(index)
        elif tasks:

            def on_done(index: int) -> None:
                line.advance(plan.parts[index].n_bytes / 1e6)
                packer.add(index)

            encode(
                options.engine,
                job,
                tasks,
                n_tasks=options.tasks or 4 * options.workers,
                workers=options.workers,
                options=options.engine_settings,
                on_done=on_done,
            )
    return packer


def _finish(options: PrepareOptions, plan: Plan, tokenizer: Tokenizer, packer: Packer) -> Manifest:
    """The last shards, then the manifest, then nothing else is needed."""
    try:
        tallies, skipped = packer.finish(plan.skipped)
    except DataError:
        discard(options.out, options.dataset)  # with other options it would be another preparation
        raise
    progress = packer.ledger.progress
    manifest = Manifest(
        *(options.dataset, plan.source, plan.revision, tokenizer.name, tokenizer.fingerprint),
        vocab_size=tokenizer.vocab_size,
        options=options.shaping(plan) | {ENCODER: packer.encoders},
        splits={
            name: Split(tally.documents, tally.tokens, tally.text_bytes, tuple(progress[name].shards))
            for name, tally in tallies.items()
        },
        skipped=dict(sorted(skipped.items())),
        first_skipped=dict(sorted(skipped.first.items())),
        added=tuple(text for text in getattr(tokenizer, "added", ()) if text),
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
            + ("" if split.counted is None else f"; {split.counted:,} tokens, those of the answers, count in the loss")
        )
    for line in described(manifest.skipped, manifest.first_skipped) or ["nothing was skipped"]:
        say(f"  {line}")
    say(f"  fingerprint {manifest.fingerprint[:16]}, in {options.out}")
