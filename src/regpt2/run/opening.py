"""The record of a run, opened. In: a job and the updates already made; out: config.toml, this start in the record."""

import dataclasses
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from regpt2 import __version__
from regpt2.base.console import count, say, warn
from regpt2.base.device import device_name
from regpt2.base.errors import Problem
from regpt2.base.files import write_atomic
from regpt2.base.version import commit
from regpt2.config.run import RunConfig, to_toml
from regpt2.data.checks.baselines import baselines
from regpt2.run.setup import Job
from regpt2.training.optimizer import unused_options


def open_records(job: Job, first: int) -> None:
    """Write config.toml, cut the record back to `first` and note this start in it. Rank 0 alone."""
    if not job.world.is_main:
        return
    config, batch, world = job.config, job.config.batch, job.world
    n_tokens = batch.tokens_until(config.max_steps)
    write_atomic(job.run / "config.toml", to_toml(config))
    notes = _cut_back(job, first)
    by_command = Path(sys.argv[0]).stem in ("regpt2", "__main__")
    called = "regpt2" if by_command else f"python {sys.argv[0]}".strip()
    job.baselines = _baselines(job)
    event: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
        "version": __version__,
        "commit": commit(),
        "command": " ".join([called, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(world.device),
        "precision": job.compute.precision,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
        "n_params": job.model.n_params(),
        "tokenizer": job.tokenizer.name,
        "tokenizer_fingerprint": job.tokenizer.fingerprint,
        "dataset": job.data.dataset,
        "data_fingerprint": job.data.fingerprint,
        "train_tokens": job.data.n_tokens,
        "data_sets": job.data.described(n_tokens),
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": batch.batch_tokens,
        "max_steps": config.max_steps,
        "total_tokens": n_tokens,
        "baselines": job.baselines,
    }
    job.metrics.log("run", first, **event)
    notes += [*_untrained_positions(config), *unused_options(config.optim, job.model)]
    notes += [f"evaluation {name} is left out: {why}" for name, why in job.without_data.items()]
    for text in [*job.data.notes, *job.data.repeated(n_tokens), *notes]:
        job.metrics.log("note", first, text=text)
        warn(text)
    say(
        f"{job.run}: {count(job.model.n_params())} parameters, {event['device']}, {job.compute.precision}, "
        f"{world.size} rank(s) x {batch.grad_accum_steps(world.size)} micro-steps x {batch.micro_batch} x "
        f"{batch.seq_len} = {batch.batch_tokens:,} tokens per update{batch.growth}; "
        f"{config.max_steps:,} updates are {count(n_tokens)} tokens, {job.data.plan(n_tokens)}"
        + (f"; resuming from step {first:,}" if first else "")
    )


def _cut_back(job: Job, first: int) -> list[str]:
    """Leave of earlier starts what leads to this one; afresh, that is nothing but notes. Returns what to say of it."""
    forgotten = job.metrics.cut_back(first)
    if first:
        return []
    for ending in ("html", "md", "png"):
        (job.run / f"report.{ending}").unlink(missing_ok=True)  # the page of another run
    if not forgotten:
        return []
    return [f"an earlier start in {job.run} left no checkpoint: the record of its {forgotten:,} updates is removed"]


def _untrained_positions(config: RunConfig) -> list[str]:
    seq_len, block_size = config.batch.seq_len, config.model.block_size
    if seq_len == block_size:
        return []
    return [
        f"positions {seq_len:,} to {block_size - 1:,} of the model are never trained: batch.seq_len = {seq_len:,} is "
        f"less than model.block_size = {block_size:,}. Evaluations and samples use the first {seq_len:,} alone. Train "
        f"all with --batch.seq-len {block_size}, or leave them out with --model.block-size {seq_len}."
    ]


def _baselines(job: Job) -> dict[str, float]:
    if len(job.data.shares) > 1:
        return {}
    try:
        return baselines(job.data.shares[0].folder, job.tokenizer)
    except Problem:  # no validation split: nothing to compare with
        return {}
