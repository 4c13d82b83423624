"""A run made ready. In: a `RunConfig` and the ranks; out: a `TrainingRun` and its `RunState`."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regpt2.base import shelves
from regpt2.base.console import ProgressLine, say, warn
from regpt2.base.device import Compute, be_deterministic, choose_compute, compiles, device_name, peak_flops
from regpt2.base.errors import ConfigError, DataError, Problem, UsageError
from regpt2.base.free_memory import free_bytes
from regpt2.base.ranks.signals import StopSignals
from regpt2.base.ranks.watchdog import Watchdog
from regpt2.base.ranks.world import World
from regpt2.base.record.best import BestSoFar
from regpt2.base.record.metrics import DATA_SHEET, TIMED, MetricsLog
from regpt2.base.record.trackers import open_sinks
from regpt2.config.run import RunConfig
from regpt2.config.setup import setup_of
from regpt2.data.loader import Loader
from regpt2.data.mixture import Mixture, open_mixture, read_shares
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.shards import verify
from regpt2.evals.scoring.assets import files_by_name, find, find_parts
from regpt2.evals.val_loss import require_window
from regpt2.model.architecture import build_model
from regpt2.model.files.fill_model import load_into
from regpt2.model.flops import Peak
from regpt2.model.language_model import LanguageModel
from regpt2.model.matmul_rate import square_rate
from regpt2.references.verdict import Verdict
from regpt2.run.beginning import begin
from regpt2.training import checkpoint
from regpt2.training.compiler_cache import CompilerCache
from regpt2.training.guard import Guard
from regpt2.training.lora import merged, with_adapters
from regpt2.training.memory import require_memory
from regpt2.training.optimizer import build_optimizer
from regpt2.training.ranks.replicas import check_replicas
from regpt2.training.ranks.strategy import make_trainable, whole_model
from regpt2.training.ranks.weight_average import WeightAverage
from regpt2.training.step import LossScale


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a run is made of, and keeps to its end. What changes beside the weights is in `RunState`."""

    config: RunConfig
    folder: Path
    world: World
    compute: Compute
    data: Mixture
    loader: Loader
    tokenizer: Tokenizer
    model: LanguageModel
    """The plain module with fp32 weights, which train. What is evaluated, sampled and saved is `plain`."""
    adapted: LanguageModel
    """With LoRA a view of `model` with adapters, which share its weights; without it `model` itself."""
    trainable: nn.Module
    """A view of `adapted` in the compute type, compiled, over ranks: for `train_step`."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """With optim.ema: of the weights of `model`. It then is the model that `plain` gives."""
    metrics: MetricsLog
    saver: checkpoint.Saver
    watchdog: Watchdog
    stop: StopSignals
    peak: Peak | None
    without_data: dict[str, str]
    """Evaluations that are left out because their data is not available, and why."""

    @property
    def ordered(self) -> bool:
        """Are gradients summed in a fixed order?"""
        return self.config.parallel.strategy == "ordered"

    def set_window(self, tokens: int) -> None:
        """Let attention reach back this far from now on: in training, and in what is evaluated and saved."""
        self.model.set_window(tokens)
        if self.adapted is not self.model:
            self.adapted.set_window(tokens)

    def plain(self) -> LanguageModel:
        """What training has made so far, as a plain model: `model` itself, or another where its weights are elsewhere.

        That is with optim.ema, where it is the average; with LoRA, where the adapters are merged into a copy; and where
        weights lie in shards. All ranks ask.
        """
        if self.average is not None:
            return self.average.plain()
        if self.config.lora.rank:
            with self.world.together():  # room for it is found on all ranks, or on none
                return merged(self.adapted)
        return whole_model(self.model, self.world)

    def check_replicas(self, step: int) -> None:
        """Compare the weights of all ranks, and the averages.

        Raises:
            Problem: they have drifted apart.
        """
        check_replicas(self.adapted, self.world, step, self.average.tensors if self.average else None)


@dataclass(kw_only=True)
class RunState:
    """What a run learns on its way, beside weights and moments."""

    guard: Guard
    scale: LossScale | None
    """For fp16 alone."""
    earlier_s: float = 0.0
    """Time that earlier starts of this run have taken."""
    started_at: float = field(default_factory=time.monotonic)
    saved_at: int | None = None
    """The step of the newest checkpoint."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The model that it began from, as `Beginning.origin`; rank 0 alone has it before a checkpoint is loaded."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of models that know nothing of language, on the validation split; rank 0 alone has them."""
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """The newest figures of each evaluation."""
    best: BestSoFar = field(default_factory=BestSoFar)
    """The lowest validation loss so far; the same on every rank, since all have the same figures."""
    verdict: Verdict | None = None
    """The newest validation loss beside its reference; rank 0 alone has it."""
    base_sha256: str = ""
    """With LoRA: of the file that keeps the frozen weights; rank 0 alone needs it."""

    @property
    def elapsed_s(self) -> float:
        """Time of all starts of this run up to now."""
        return self.earlier_s + time.monotonic() - self.started_at


def open_data(config: RunConfig) -> Mixture:
    """The training split."""
    return open_mixture(read_shares(config.data, config.mix))


def build(
    config: RunConfig, world: World, data: Mixture, watchdog: Watchdog, stop: StopSignals
) -> tuple[TrainingRun, RunState]:
    """Check everything that can be checked, then make model and optimizer. Nothing is written yet.

    Raises:
        Problem: something does not fit, on this rank or another.
    """
    folder = Path(config.run)
    ordered = config.parallel.strategy == "ordered"
    with world.together():
        compute = choose_compute(config.precision, world.device)
        if config.deterministic or ordered:
            be_deterministic(world.device)
        _check_folder(config, folder)
        beginning = begin(config, data, is_main=world.is_main)
        config, tokenizer = beginning.config, beginning.tokenizer
        if config.sample_every:
            _check_prompt(config, tokenizer)
        loader = _loader(config, data, tokenizer, world, watchdog)
        config.check_ranks(world.size)
        _check_memory(config, world, compute)
        if config.eval_every and "val_loss" in config.evals.names:
            _check_evals(data, config.batch.seq_len)
        files = files_by_name(config.evals.files, shelves.entries("evals"))
        sinks = open_sinks(config.track, folder)
        if config.verify_data:
            _verify_data(data, world, watchdog)
        model = build_model(config.model, seed=config.seed).to(world.device)
        model.trained_seq_len = beginning.trained_seq_len
        if beginning.weights is not None:  # before they are sharded or wrapped, so every strategy begins alike
            load_into(model, beginning.weights)

    compiled = compiles(config.compile, world.device)
    adapted = with_adapters(model, config.lora, seed=config.seed)
    trainable = make_trainable(adapted, compute.dtype, world, config.parallel, compiled=compiled)
    run = TrainingRun(
        config=config,
        folder=folder,
        world=world,
        compute=compute,
        data=data,
        loader=loader,
        tokenizer=tokenizer,
        model=model,
        adapted=adapted,
        trainable=trainable,
        optimizer=build_optimizer(adapted, config.optim, world, ordered=ordered, compiled=compiled),
        average=WeightAverage(model, config.optim.ema, world) if config.optim.ema else None,
        metrics=MetricsLog(folder / "metrics.jsonl" if world.is_main else None, sinks),
        saver=checkpoint.Saver(folder / "checkpoints", config.keep_checkpoints),
        watchdog=watchdog,
        stop=stop,
        peak=peak_of(world, compute),
        without_data=_fetch_assets(config.evals.names if config.eval_every else (), files, world),
    )
    scale = LossScale(factor=2.0**16) if compute.needs_scaler else None
    return run, RunState(guard=Guard(config.guard, world.device), scale=scale, origin=beginning.origin)


def peak_of(world: World, compute: Compute) -> Peak | None:
    """Of a GPU by its data sheet; of a CPU the mean over its ranks, which time matmuls at once, as they train."""
    if world.device.type != "cpu":
        sheet = peak_flops(world.device, compute.precision)
        return None if sheet is None else Peak(sheet, DATA_SHEET)
    world.barrier()
    with world.together():
        rate = square_rate(compute.dtype, world.device)
    mean = float(world.mean(torch.tensor(rate, dtype=torch.float64)))
    return Peak(float(f"{mean:.3g}"), TIMED)


def _loader(config: RunConfig, data: Mixture, tokenizer: Tokenizer, world: World, watchdog: Watchdog) -> Loader:
    by_documents = config.batch.order == "documents"
    with ProgressLine(
        "finding documents", data.n_tokens / 1e6, "M tokens", shown=by_documents and world.is_main
    ) as bar:

        def on_tokens(n_tokens: int) -> None:
            bar.advance(n_tokens / 1e6)
            watchdog.beat("finding documents")

        return Loader(
            data.streams,
            config.batch,
            seed=config.seed,
            parts=data.parts,
            rank=world.rank,
            world_size=world.size,
            end_of_text=tokenizer.eot,
            on_tokens=on_tokens,
        )


def _check_memory(config: RunConfig, world: World, compute: Compute) -> None:
    """Refuse what would run out of memory; warn where it may."""
    if not config.check_memory or world.device.type not in ("cpu", "cuda"):
        return
    compiled = compiles(config.compile, world.device)
    setup = setup_of(config, world.size, device=world.device.type, precision=compute.precision, compiled=compiled)
    warning = require_memory(setup, config.batch.tokens_of(1), free_bytes(world.device))
    if warning and world.is_main:
        warn(warning)


def _fetch_assets(names: tuple[str, ...], files: dict[str, Path], world: World) -> dict[str, str]:
    """Fetch the data of evaluations to every machine, before the first step; returns what is missing, and why."""
    missing: dict[str, str] = {}
    for name in names if world.local_rank == 0 else ():
        try:
            _fetch(name, files, world)
        except (Problem, OSError) as error:
            missing[name] = str(error)
    return {name: why for found in world.everyones(missing) for name, why in found.items()}


def _fetch(name: str, files: dict[str, Path], world: World) -> None:
    """The data of one evaluation. Of one with parts those that are missing are named, and it does without them."""
    entry, part = shelves.with_part("evals", name)
    assets = [asset for asset in getattr(entry, "ASSETS", ()) if not part or asset.part in ("", part)]
    name = name.partition(".")[0]
    for asset in assets:
        if not asset.part:
            find(asset, name, files)
    found, missing = find_parts([asset for asset in assets if asset.part], name, files)
    if missing and not found:
        raise next(iter(missing.values()))
    if missing and world.is_main:
        warn(f"{name}: without the data of {', '.join(missing)}. {next(iter(missing.values()))}")


def _check_folder(config: RunConfig, run: Path) -> None:
    for folder in (run, run / "checkpoints"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f"{folder} is in the way: it is not a folder. Move it, or choose another --run.")
    used = (run / "metrics.jsonl").exists() or bool(checkpoint.folders(run / "checkpoints"))
    if config.resume == "never" and used:
        raise UsageError(f"{run} already holds a run and resume is 'never'; choose another --run, or --resume auto.")
    if config.resume == "must" and not checkpoint.folders(run / "checkpoints"):
        raise UsageError(f"{run} has no checkpoint to resume from and resume is 'must'; --resume auto starts anew.")


def _check_prompt(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Samples need a prompt that the tokenizer knows and that leaves room for at least one token."""
    try:
        n_tokens = len(tokenizer.encode(config.sample.prompt)) or 1  # an empty one begins a document
    except UsageError as error:
        raise ConfigError(f"sample.prompt: {error} (--sample-every 0 trains without samples.)") from None
    if n_tokens >= (seq_len := config.batch.seq_len):
        raise ConfigError(
            f"sample.prompt has {n_tokens:,} tokens, expected at most {seq_len - 1:,}: one less than batch.seq_len = "
            f"{seq_len:,} (model.block_size = {config.model.block_size:,}), so that a token can follow. Give a shorter "
            "--sample.prompt, or train without samples: --sample-every 0."
        )


def _check_evals(data: Mixture, seq_len: int) -> None:
    """Look for what evaluations need before the first step, not in the middle of the run."""
    try:
        with open_mixture(data.shares, "val") as val:
            for share, stream in zip(val.shares, val.streams, strict=True):
                require_window(share.folder, stream.n_tokens, seq_len)
    except DataError as error:
        raise DataError(f"{error} (--eval-every 0 trains without evaluation.)") from None


def _verify_data(data: Mixture, world: World, watchdog: Watchdog) -> None:
    """Each rank checks its share of the shards."""
    megabytes = 2e-6 * data.n_tokens / world.size
    with ProgressLine("checking shards", megabytes, "MB", shown=world.is_main) as progress:

        def on_bytes(n_bytes: int) -> None:
            progress.advance(n_bytes / 1e6)
            watchdog.beat("checking shards")

        for share in data.shares:
            bad = verify(share.folder, on_bytes, part=world.rank, of=world.size)
            if bad:
                raise DataError(f"{len(bad)} damaged shards in {share.folder}: {bad[0]} Prepare the data again.")


def compiler_cache(run: TrainingRun) -> CompilerCache | None:
    """Where the compiled step is kept for the next start, loaded if it is there; None if no GPU code is compiled."""
    config, device = run.config, run.world.device
    if device.type != "cuda" or not compiles(config.compile, device):
        return None
    cache = CompilerCache(
        {
            "device": f"{device_name(device)} {device}",
            "model": dataclasses.asdict(config.model),
            "batch": [config.batch.micro_batch, config.batch.seq_len],
            "optim": config.optim.name,
            "lora": [config.lora.rank, config.lora.alpha],
            "precision": run.compute.precision,
            "ranks": [config.parallel.strategy, run.world.size],
            "deterministic": config.deterministic,
        }
    )
    if cache.load() and run.world.is_main:
        say(f"using the compiled step of an earlier start: {cache.path}")
    return cache
