"""Measure a model. In: a model and names of evaluations; out: their figures, printed and, if asked, as JSON."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from regpt2 import __version__
from regpt2.base import plugins
from regpt2.base.console import say
from regpt2.base.device import Precision, choose_compute, device_name, pick_device
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import write_atomic
from regpt2.base.world import start_world
from regpt2.data.shards import open_tokens
from regpt2.evals import EvalContext
from regpt2.model.load import KINDS, LoadedModel, load_model
from regpt2.training.parallel import in_compute_type


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=KINDS)]
    evals: tuple[str, ...] = ("val_loss",)
    """Entries of the shelf evals/."""
    data: Path | None = None
    """The prepared data folder, for val_loss."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split to score, from its beginning, in whole windows; all, if it has fewer."""
    seq_len: int | None = None
    """Tokens per window; by default the model's block_size."""
    batch: int = 8
    """Sequences per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """fp32 unless asked otherwise: an evaluation should not depend on the hardware."""
    out: Path | None = None
    """Also write the results to this JSON file."""


def main(arguments: list[str]) -> int:
    """`regpt2 evaluate MODEL [options]`."""
    options = tyro.cli(Options, prog="regpt2 evaluate", args=arguments)
    if not options.evals:
        raise UsageError(f"--evals names none; there is: {', '.join(plugins.entries('evals'))}.")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")
    entries = {name: plugins.load("evals", name) for name in options.evals}  # unknown names fail before any work
    compute = choose_compute(options.precision, pick_device(options.device))
    with start_world(pick_device(options.device)) as world:
        loaded = load_model(options.model, device=world.device)
        _check(options, loaded)
        context = EvalContext(
            model=in_compute_type(loaded.model, compute.dtype),
            world=world,
            data=options.data,
            seq_len=options.seq_len or loaded.model.config.block_size,
            batch=options.batch,
            val_tokens=options.val_tokens,
        )
        results: dict[str, Any] = {}
        for name, entry in entries.items():
            started_at = time.perf_counter()
            results[name] = {**entry.evaluate(context), "elapsed_s": round(time.perf_counter() - started_at, 3)}
            if world.is_main:
                _show(name, results[name])
        if options.out is not None and world.is_main:
            about = {"model": loaded.source, "step": loaded.step, "device": device_name(world.device)}
            about |= {"precision": compute.precision, "torch": torch.__version__, "version": __version__}
            write_atomic(options.out, json.dumps({**about, "results": results}, indent=2) + "\n")
    return 0


def _check(options: Options, loaded: LoadedModel) -> None:
    """Numbers that fit the model, and data in the model's own vocabulary."""
    block_size = loaded.model.config.block_size
    for name in ("val_tokens", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    if options.seq_len is not None and not 1 <= options.seq_len <= block_size:
        raise UsageError(f"--seq-len {options.seq_len} must lie between 1 and the model's block_size, {block_size}.")
    if options.data is None:
        return
    with open_tokens(options.data, "val") as tokens:
        theirs = loaded.tokenizer.name if loaded.tokenizer else None
        if theirs not in (None, tokens.tokenizer_name) or tokens.vocab_size != loaded.model.config.vocab_size:
            raise DataError(
                f"{options.data} was made with the tokenizer {tokens.tokenizer_name!r} ({tokens.vocab_size} tokens), "
                f"{loaded.source} was trained with {theirs!r} ({loaded.model.config.vocab_size} tokens); "
                "prepare the data with the model's tokenizer."
            )


def _show(name: str, figures: dict[str, Any]) -> None:
    say(name)
    for key, value in figures.items():
        shown = "unknown" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
        say(f"  {key:<14} {shown}")
