"""Text to tokens to shards. In: a data set's name and options; out: a folder of shards with its `manifest.json`.

It can be killed at any moment: the same command resumes, and the folder is the same, byte for byte, for any number
of workers and interruptions. `docs/data.md` explains how.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from regpt2.base import shelves
from regpt2.base.console import ProgressLine, count, duration, say, warn
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import builtin_folder, folder_lock, write_atomic
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.fast_tokenizer import fast_tokenizer
from regpt2.data.own_vocabulary import read_own
from regpt2.data.preparing.cluster import encode
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.preparing.encode_part import PARTS_NAME, EncodeJob, PartResult, added_tokens, forget_copies
from regpt2.data.preparing.hold_out import WINDOW_TOKENS
from regpt2.data.preparing.ledger import (
    ENCODER,
    HELD_OUT,
    begin,
    begin_again,
    changed,
    clear,
    complete_already,
    discard,
)
from regpt2.data.preparing.options import SHELF, PrepareOptions
from regpt2.data.preparing.pack_shards import Packer
from regpt2.data.preparing.ready_shards import collect
from regpt2.data.preparing.workers import run_tasks
from regpt2.data.sources.plan import Plan
from regpt2.data.tokenizer import OWN, OWN_FILE, TOKENIZERS, BytePairTokenizer, Tokenizer, find_vocab, load_tokenizer
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
        tokenizer, vocab = _tokenizer(options)
        if added := added_tokens(entry):
            tokenizer = AddedTokens(tokenizer, added)
        plan: Plan = entry.plan(options.source)
        with folder_lock(options.out):
            if finished := complete_already(options.out, options.settings(plan, tokenizer)):
                _keep_vocabulary(options, tokenizer)  # a lost one is mended
                return finished
            packer = _encode_and_pack(options, plan, tokenizer, vocab)
            if hold_out := packer.hold_out():
                begin_again(options.out, packer.ledger, hold_out)
                with _nothing_left(options):
                    packer = _encode_and_pack(options, plan, tokenizer, vocab)
            if plan.is_local and entry.plan(options.source).fingerprint != plan.fingerprint:
                raise changed(options.out)
            manifest = _finish(options, plan, tokenizer, packer)
    _summarize(manifest, options, time.monotonic() - started_at)
    return manifest


def _tokenizer(options: PrepareOptions) -> tuple[Tokenizer, Path | None]:
    """The tokenizer, and where every worker finds its vocabulary: of one's own in the data folder, as it will be."""
    if options.tokenizer in TOKENIZERS:
        vocab = find_vocab(options.vocab) if options.tokenizer == "gpt2" else options.vocab
        return fast_tokenizer(options.encoder, load_tokenizer(options.tokenizer, vocab)), vocab
    if options.vocab is not None:
        raise UsageError(
            f"--vocab {options.vocab} is for gpt2; --tokenizer {options.tokenizer} has its own: leave it out."
        )
    own = BytePairTokenizer(read_own(builtin_folder(options.tokenizer) or Path(options.tokenizer)))
    return fast_tokenizer(options.encoder, own), options.out / OWN_FILE


def _keep_vocabulary(options: PrepareOptions, tokenizer: Tokenizer) -> None:
    """Write a tokenizer of one's own into the data folder, from which everything else reads it."""
    place, vocab = options.out / OWN_FILE, tokenizer.vocab if tokenizer.name == OWN else None
    if vocab is not None and not (place.is_file() and place.read_bytes() == vocab):
        write_atomic(place, vocab)


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
    space = Space(plan, tokenizer.name, options.shard_tokens, options.workers, limit_bytes, token_bytes)
    # A Slurm job of an earlier call may still be writing parts; the engine cleans up when it submits a new one.
    is_slurm = options.engine == "slurm"
    ledger = begin(options.out, options.settings(plan, tokenizer), plan.fingerprint, keep_parts_tmp=is_slurm)
    space.require(options.out)
    _keep_vocabulary(options, tokenizer)
    shard_tokens, dedup = options.shard_tokens, options.dedup
    sizes = {"shard_tokens": shard_tokens, "val_tokens": val_tokens}
    packer = Packer(options.out, ledger, tokenizer, **sizes, dedup=dedup, masked=masked)
    job = EncodeJob(
        dataset=options.dataset,
        tokenizer=tokenizer.name,
        vocab=vocab,
        encoder=options.encoder,
        val_fraction=val_fraction,
        hold_out=ledger.hold_out,
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
    with _nothing_left(options):
        tallies, skipped = packer.finish(plan.skipped)
    progress, hold_out = packer.ledger.progress, packer.ledger.hold_out
    made_by = {ENCODER: packer.encoders} | ({HELD_OUT: str(hold_out)} if hold_out.digest else {})
    manifest = Manifest(
        *(options.dataset, plan.source, plan.revision, tokenizer.name, tokenizer.fingerprint),
        vocab_size=tokenizer.vocab_size,
        options=options.shaping(plan) | made_by,
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


@contextmanager
def _nothing_left(options: PrepareOptions) -> Iterator[None]:
    """Input that gives no two splits leaves nothing: with other options it would be another preparation."""
    try:
        yield
    except DataError:
        discard(options.out, options.dataset)
        raise


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
    if held_out := manifest.options.get(HELD_OUT):
        say(f"  --val-fraction left a split empty; held out for validation instead: {held_out}")
    say(f"  fingerprint {manifest.fingerprint[:16]}, in {options.out}")
    n_tokens, name = min((split.tokens, name) for name, split in manifest.splits.items())
    if n_tokens < WINDOW_TOKENS:
        fits = (1 << (n_tokens - 1).bit_length()) // 2  # a power of two divides the tokens of an update
        shorter = f"Give train --batch.seq-len {fits} or less, or prepare" if fits else "Prepare"
        warn(
            f"the {name} split has {n_tokens:,} tokens, fewer than the {WINDOW_TOKENS:,} of one window of GPT-2. "
            f"{shorter} more text or with another --val-fraction."
        )
