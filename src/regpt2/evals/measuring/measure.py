"""A model measured. In: a model and names of evaluations; out: `Results`, printed and as JSON if wanted."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from regpt2 import __version__
from regpt2.base import shelves
from regpt2.base.console import figure, say, warn
from regpt2.base.device import Precision, be_deterministic, choose_compute, device_name, pick_device
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.base.files import write_atomic
from regpt2.base.ranks.world import start_world
from regpt2.base.shelves import own_options
from regpt2.data.tokens.shards import open_tokens
from regpt2.evals.measuring.show import paper_table, show_result
from regpt2.evals.scoring.assets import files_by_name
from regpt2.evals.scoring.context import EvalContext, Figures, scoring
from regpt2.model.files.load import KINDS, LoadedModel, load_model
from regpt2.references.core import core_scores
from regpt2.references.scores import core_mean, references_for
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.training.ranks.strategy import in_compute_type

GROUPS = {
    "paper": ("lambada", "cbt", "wikitext", "ptb", "enwik8", "text8", "one_billion_words"),
    "choices": ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "boolq", "copa"),
}
_QUIET_S = 10.0  # of a part after a part, as a line of progress


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=KINDS)]
    evals: tuple[str, ...] = ("val_loss",)
    """Entries of the shelf evals/, a part of one (core.piqa), paper (the GPT-2 paper's table), choices (eight sets)."""
    data: Path | None = None
    """The prepared data folder, for val_loss."""
    tokenizer: Path | None = None
    """The meta.pkl or tokenizer.json of the data, for a model that does not include it, as nanoGPT's or llm.c's."""
    files: tuple[str, ...] = ()
    """Local files, each as NAME=PATH; the others come from the cache or are downloaded and checked."""
    limit: int = 0
    """Score only the first N examples of each evaluation; 0 = all."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split to score, from its beginning, in whole windows; all if it has fewer."""
    seq_len: int | None = None
    """Tokens per window and largest context; default: as in training, at most block_size."""
    batch: int = 8
    """Sequences of seq_len tokens per forward pass; shorter ones are packed to the same number of tokens."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """fp32 by default, so that results do not depend on the hardware."""
    deterministic: bool = False
    """On a GPU: use only kernels that give the same bits each time."""
    check_fp32: int = 64
    """In another precision: also score N examples of each evaluation in fp32 and compare; 0 = none."""
    out: Path | None = None
    """Also write the results to this JSON file."""


@dataclass(frozen=True)
class Results:
    """What was measured, and how: `results["hellaswag"]["acc_norm"]`. The JSON of `--out` holds the same."""

    model: str
    step: int | None
    """Updates made, if the model came from a run."""
    device: str
    precision: str
    torch: str
    version: str
    limit: int
    seq_len: int
    results: dict[str, dict[str, Any]]
    """By name of the evaluation: its figures, their standard errors (`acc_stderr`), protocols and references."""
    failed: dict[str, str]
    """By name of the evaluation: why it could not be measured."""

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.results[name]


def measure(options: EvaluateOptions, loaded: LoadedModel | None = None, *, shown: bool = False) -> Results:
    """Measure the model that `options` name, or `loaded` instead; `shown`: print each evaluation when it is done.

    Raises:
        UsageError: an option is out of its range, or there is no such evaluation.
        Problem: the only evaluation failed. Of several, `Results.failed` has the message.
    """
    names = _names(options)
    entries = {name: shelves.with_part("evals", name) for name in names}  # unknown names fail before any work
    files = files_by_name(options.files, shelves.entries("evals"))
    device = next(loaded.model.parameters()).device if loaded else pick_device(options.device)
    compute = choose_compute(options.precision, device)
    if options.deterministic:
        be_deterministic(device)
    with start_world(device) as world:
        loaded = loaded or load_model(options.model, device=world.device)
        dataset = _check(options, loaded)
        if world.is_main and (untrained := _untrained(options, loaded)):
            warn(untrained)
        context = EvalContext(
            model=in_compute_type(loaded.model, compute.dtype),
            world=world,
            data=options.data,
            seq_len=options.seq_len or loaded.model.context_size,
            batch=options.batch,
            val_tokens=options.val_tokens,
            on_part=_told_now_and_then() if shown and world.is_main else lambda name, value: None,
            tokenizer=cache(lambda: tokenizer_of(loaded, options.tokenizer)),  # val_loss does without
            files=files,
            limit=options.limit,
        )
        results: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name, (entry, part) in entries.items():
            started_at = time.perf_counter()
            context = replace(context, part=part, options=own_options(options, name))
            try:
                with scoring(context):
                    figures = entry.evaluate(context)
                wants_check = compute.precision != "fp32" and options.check_fp32
                check = _check_against_fp32(entry, figures, context, loaded, options) if wants_check else {}
            except Problem as problem:  # must not cost the others
                if len(entries) == 1:
                    raise
                failed[name] = str(problem)
                continue
            elapsed_s = time.perf_counter() - started_at
            results[name] = _result(name, figures, entry.PROTOCOLS, dataset, check, elapsed_s)
            results[name] |= {"options": asdict(context.options)} if context.options else {}
            if shown and world.is_main:
                show_result(name, results[name], loaded.model.n_params())
        found = Results(
            loaded.source, loaded.step, device_name(device), compute.precision, torch.__version__, __version__,
            options.limit, context.seq_len, results, failed,
        )  # fmt: skip
        if world.is_main:
            _finish(options, found, shown=shown)
    return found


def _told_now_and_then() -> Callable[[str, float], None]:
    """Prints the parts of long work as they are done, at most one in ten seconds."""
    spoke_at = time.monotonic()

    def on_part(name: str, value: float) -> None:
        nonlocal spoke_at
        if time.monotonic() - spoke_at >= _QUIET_S:
            say(f"{name}: {figure(value)}")
            spoke_at = time.monotonic()

    return on_part


def expanded(asked: Sequence[str]) -> list[str]:
    """Names of evaluations, with the members of a group in its place."""
    return [name for one in asked for name in GROUPS.get(one, (one,))]


def _names(options: EvaluateOptions) -> list[str]:
    """The evaluations, groups expanded, each once."""
    names = expanded(options.evals)
    if not names:
        raise UsageError(f"--evals is empty. Available: {', '.join([*GROUPS, *shelves.entries('evals')])}.")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")
    return list(dict.fromkeys(names))


def _check(options: EvaluateOptions, loaded: LoadedModel) -> str | None:
    """Check the numbers, and that the data is in the model's vocabulary; returns the name of the data set."""
    block_size = loaded.model.config.block_size
    for name, least in (("val_tokens", 1), ("batch", 1), ("limit", 0), ("check_fp32", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}.")
    if options.seq_len is not None and not 1 <= options.seq_len <= block_size:
        raise UsageError(f"--seq-len {options.seq_len} must be between 1 and the model's block_size, {block_size}.")
    if options.data is None:
        return None
    ours, rows = loaded.tokenizer, loaded.model.config.vocab_size
    with open_tokens(options.data, "val") as tokens:
        # Tokens without a manifest have no fingerprint: we take them for the model's.
        is_another = ours is not None and tokens.tokenizer_fingerprint not in (None, ours.fingerprint)
        if is_another or tokens.vocab_size not in (loaded.n_text_tokens, rows):
            raise DataError(
                f"{options.data} was made with the tokenizer {tokens.tokenizer_name!r} ({tokens.vocab_size} tokens), "
                f"{loaded.source} was trained with {ours.name if ours else None!r} ({rows} tokens); "
                "prepare the data with the model's tokenizer."
            )
        return tokens.dataset


def _untrained(options: EvaluateOptions, loaded: LoadedModel) -> str:
    """A warning where the model has positions that training never saw."""
    trained, block_size = loaded.model.context_size, loaded.model.config.block_size
    if options.seq_len is None and trained < block_size:
        return (
            f"{loaded.source} has a block_size of {block_size:,} and was trained on sequences of {trained:,} tokens: "
            f"the windows have {trained:,} tokens (--seq-len {block_size} for the whole block)."
        )
    if (options.seq_len or 0) > trained:
        return (
            f"{loaded.source} was trained on sequences of {trained:,} tokens: the positions after that are untrained."
        )
    return ""


def _check_against_fp32(
    entry: Any, figures: Figures, context: EvalContext, loaded: LoadedModel, options: EvaluateOptions
) -> dict[str, Any]:
    """How far the figures of the first examples, or of the first part of a text, are from those in fp32."""
    most = options.check_fp32 if "count" in figures else 1
    n = min(most, context.limit or most)
    val_tokens = min(context.val_tokens, options.check_fp32 * context.seq_len)
    few = replace(context, limit=n, val_tokens=val_tokens)
    lower, full = entry.evaluate(few), entry.evaluate(replace(few, model=loaded.model))
    metrics = [metric for metric in entry.PROTOCOLS if full.get(metric) is not None]
    return {"examples": n, "difference": {m: (lower[m] or 0.0) - (full[m] or 0.0) for m in metrics}}


def _result(
    name: str, figures: Figures, protocols: dict[str, str], dataset: str | None, check: dict[str, Any], elapsed_s: float
) -> dict[str, Any]:
    """One evaluation in the JSON. A loss is compared only with published losses on the same text."""
    where = (dataset or "") if name == "val_loss" else None
    found = {metric: references_for(name.partition(".")[0], metric, where) for metric in figures}
    if "centered_mean" in figures:
        found["centered_mean"] = core_mean(task for task in core_scores().tasks if task in figures)
    return {
        **figures,
        "protocol": {metric: protocols[metric] for metric in figures if metric in protocols},
        "references": {
            metric: [asdict(reference) for reference in published] for metric, published in found.items() if published
        },
        "elapsed_s": round(elapsed_s, 3),
        **({"fp32_check": check} if check else {}),
    }


def _finish(options: EvaluateOptions, found: Results, *, shown: bool) -> None:
    if shown and "paper" in options.evals:
        say(paper_table(found.results))
    for name, why in found.failed.items():
        warn(f"{name} was not measured: {why}")
    if options.out is not None:
        write_atomic(options.out, json.dumps(asdict(found), indent=2) + "\n")
