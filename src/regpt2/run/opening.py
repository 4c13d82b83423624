"""The record of a run, opened. In: a run and the updates already made; out: config.toml, this start in the record."""

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
from regpt2.base.record.metrics import read_events
from regpt2.base.shelves import origins
from regpt2.base.version import commit
from regpt2.config.passes import repetition_warnings
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import to_toml
from regpt2.data.checks.baselines import baselines
from regpt2.run.saving import BASE
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training.lora import adapters
from regpt2.training.optimizer import unused_options


def open_records(run: TrainingRun, state: RunState, first: int) -> None:
    """Write config.toml, cut the record back to `first` and note this start in it. Rank 0 alone."""
    if not run.world.is_main:
        return
    config, batch, world = run.config, run.config.batch, run.world
    n_tokens = batch.tokens_until(config.max_steps)
    write_atomic(run.folder / "config.toml", to_toml(config))
    notes = _cut_back(run, first)
    by_command = Path(sys.argv[0]).stem in ("regpt2", "__main__")
    called = "regpt2" if by_command else f"python {sys.argv[0]}".strip()
    state.baselines = _baselines(run)
    event: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
        "version": __version__,
        "commit": commit(),
        "command": " ".join([called, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(world.device),
        "precision": run.compute.precision,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
        "n_params": run.model.n_params(),
        "tokenizer": run.tokenizer.name,
        "tokenizer_fingerprint": run.tokenizer.fingerprint,
        "dataset": run.data.dataset,
        "data_fingerprint": run.data.fingerprint,
        "train_tokens": run.data.n_tokens,
        "data_sets": run.data.described(n_tokens),
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": batch.batch_tokens,
        "max_steps": config.max_steps,
        "total_tokens": n_tokens,
        "baselines": state.baselines,
        **({"peak_flops": run.peak.flops, "peak_source": run.peak.source} if run.peak else {}),
        **state.origin,
    }
    if config.lora.rank:
        event["trainable_params"] = sum(p.numel() for p in adapters(run.adapted).values())
    if plugins := origins(*_entries(config)):
        event["plugins"] = plugins
        notes += _changed_plugins(run, plugins)
    run.metrics.log("run", first, **event)
    notes += [*_positions_and_windows(run), *unused_options(config.optim, run.adapted), *_random_base(run)]
    notes += [f"evaluation {name} is left out: {why}" for name, why in run.without_data.items()]
    for text in [*run.data.notes, *repetition_warnings(config, run.data), *notes]:
        run.metrics.log("note", first, text=text)
        warn(text)
    say(
        f"{run.folder}: {count(run.model.n_params())} parameters, {event['device']}, {run.compute.precision}, "
        f"{world.size} rank(s) x {batch.grad_accum_steps(world.size)} micro-steps x {batch.micro_batch} x "
        f"{batch.seq_len} = {batch.batch_tokens:,} tokens per update{batch.growth}; "
        f"{config.max_steps:,} updates are {count(n_tokens)} tokens, {run.data.plan(n_tokens)}"
        + (f"; resuming from step {first:,}" if first else "")
    )
    if (start := config.window_at(1)) != (end := config.window_at(config.max_steps)):
        say(f"attention's window grows from {start:,} to {end:,} tokens")
    _say_what_trains(run)


def _entries(config: RunConfig) -> list[tuple[str, str]]:
    """The entries of shelves that a run uses and that a plugin may bring."""
    own = [("model.architectures", config.model.architecture), ("training.optim", config.optim.name)]
    return [*own, *(("evals", name) for name in config.evals.names)]


def _changed_plugins(run: TrainingRun, plugins: dict[str, dict[str, str]]) -> list[str]:
    """A note for each plugin that is another file than at an earlier start of this run."""
    path, before = run.metrics.path, dict[str, Any]()
    for event in read_events(path) if path and path.exists() else ():
        before |= event.get("plugins", {}) if event.get("event") == "run" else {}
    changed = [name for name, now in plugins.items() if before.get(name, now).get("sha256") != now["sha256"]]
    return [f"the plugin {name} ({plugins[name]['file']}) has changed since this run began" for name in changed]


def _cut_back(run: TrainingRun, first: int) -> list[str]:
    """Remove what earlier starts recorded after update `first`. Returns the notes that this needs."""
    forgotten = run.metrics.cut_back(first)
    if first:
        return []
    for ending in ("html", "md", "png"):
        (run.folder / f"report.{ending}").unlink(missing_ok=True)  # the page of another run
    if not forgotten:
        return []
    return [f"an earlier start in {run.folder} left no checkpoint: the record of its {forgotten:,} updates is removed"]


def _say_what_trains(run: TrainingRun) -> None:
    """Where the model is not simply the weights that train: an average of them, or frozen ones with adapters."""
    config = run.config
    if run.average is not None:
        say(
            f"the model is the average of the weights (optim.ema = {config.optim.ema:g}): it is evaluated, sampled and "
            "saved; training losses are those of the weights themselves"
        )
    if config.lora.rank:
        learning = sum(p.numel() for p in adapters(run.adapted).values())
        say(
            f"training {count(learning)} of {count(run.model.n_params())} parameters (LoRA, rank {config.lora.rank}); "
            f"the others are frozen and kept in {run.folder / BASE}"
        )


def _random_base(run: TrainingRun) -> list[str]:
    if not run.config.lora.rank or run.config.init:
        return []
    return [
        "lora.rank trains adapters of a model whose own frozen weights are random: begin from a trained one with "
        "--init MODEL."
    ]


def _positions_and_windows(run: TrainingRun) -> list[str]:
    """Notes where positions are never trained, or attention's window is as long as the sequences."""
    config = run.config
    seq_len, block_size = config.batch.seq_len, config.model.block_size
    trained = run.model.context_size  # by this run, or before it in the model that it began from
    if trained == block_size:
        return _idle_window(config)
    return [
        *_idle_window(config),
        f"positions {trained:,} to {block_size - 1:,} of the model are never trained: batch.seq_len = {seq_len:,} is "
        f"less than model.block_size = {block_size:,}. Evaluations and samples use the first {trained:,} alone. Train "
        f"all with --batch.seq-len {block_size}, or leave them out with --model.block-size {trained}.",
    ]


def _idle_window(config: RunConfig) -> list[str]:
    start, end = config.window_at(1), config.window_at(config.max_steps)
    if not end or end < config.batch.seq_len:
        return []
    since = "" if start >= config.batch.seq_len else " once it has grown to that"
    return [
        f"attention's window of {end:,} tokens (model.window) hides nothing in sequences of batch.seq_len = "
        f"{config.batch.seq_len:,} tokens{since}."
    ]


def _baselines(run: TrainingRun) -> dict[str, float]:
    if len(run.data.shares) > 1 or run.loader.is_masked:  # they score all of one text
        return {}
    try:
        return baselines(run.data.shares[0].folder, run.tokenizer)
    except Problem:  # no validation split: nothing to compare with
        return {}
