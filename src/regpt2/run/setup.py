"""A run made ready. In: a `RunConfig` and the ranks; out: a `Job`: data, model, optimizer, record, and its step."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from regpt2.base import plugins
from regpt2.base.console import ProgressLine, warn
from regpt2.base.device import Compute, be_deterministic, choose_compute, compiles, peak_flops
from regpt2.base.errors import CheckpointError, ConfigError, DataError, Problem, UsageError
from regpt2.base.free_memory import free_bytes
from regpt2.base.ranks.signals import StopSignals
from regpt2.base.ranks.watchdog import Watchdog
from regpt2.base.ranks.world import World
from regpt2.base.record.metrics import MetricsLog
from regpt2.base.record.trackers import open_sinks
from regpt2.config.run import RunConfig, differences, read_toml, setup_of
from regpt2.data.loader import Loader
from regpt2.data.mixture import Mixture, open_mixture, read_shares
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.shards import verify
from regpt2.evals.scoring.assets import files_by_name, find
from regpt2.evals.val_loss import require_window
from regpt2.model.architecture import build_model, switches_on
from regpt2.model.files.load import TokenizerRef
from regpt2.model.language_model import LanguageModel
from regpt2.model.weights import native
from regpt2.references.verdict import Verdict
from regpt2.training import checkpoint
from regpt2.training.guard import Guard
from regpt2.training.memory import require_memory
from regpt2.training.optimizer import build_optimizer, load_state_tensors, state_tensors
from regpt2.training.ranks.replicas import check_replicas
from regpt2.training.ranks.strategy import gather, load_weights, make_trainable
from regpt2.training.step import LossScale

# Another value of these makes another run: the batches of a step, or the weights, would not be the same.
_DEFINE_THE_RUN = (
    "seed", "model.", "optim.name",
    "batch.batch_tokens", "batch.ramp_", "batch.seq_len", "batch.order", "batch.one_batch",
)  # fmt: skip
_MAY_CHANGE_SILENTLY = (
    "recipe", "run", "data", "mix", "resume", "log_every", "eval_every", "sample_every", "save_every",
    "keep_checkpoints", "verify_data", "check_memory", "track", "evals.verdict",
    "sample.", "parallel.check_every", "parallel.timeout_s",
)  # fmt: skip


@dataclass
class Job:
    """Everything that the loop uses. `model` is the plain fp32 module, `trainable` a view of it."""

    config: RunConfig
    world: World
    compute: Compute
    run: Path
    data: Mixture
    loader: Loader
    tokenizer: Tokenizer
    model: LanguageModel
    trainable: nn.Module
    """`model` in the compute type, compiled, over ranks: for `train_step`."""
    optimizer: torch.optim.Optimizer
    guard: Guard
    scale: LossScale | None
    metrics: MetricsLog
    saver: checkpoint.Saver
    watchdog: Watchdog
    stop: StopSignals
    peak_flops: float | None
    elapsed_s: float = 0.0
    """Time in earlier stretches of this run."""
    started_at: float = field(default_factory=time.monotonic)
    baselines: dict[str, float] = field(default_factory=dict)
    """Bits per byte of models that know nothing of language, on the validation split; rank 0 alone has them."""
    saved_at: int | None = None
    """The step of the newest checkpoint."""
    without_data: dict[str, str] = field(default_factory=dict)
    """Evaluations whose data could not be had, and why: they are left out."""
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """The newest figures of each evaluation."""
    verdict: Verdict | None = None
    """Where the newest validation loss stands beside its reference; rank 0 alone has it."""

    @property
    def tokenizer_ref(self) -> TokenizerRef:
        """What a checkpoint says of the tokenizer."""
        return TokenizerRef(self.tokenizer.name, self.tokenizer.fingerprint, characters=self.tokenizer.characters)


def open_data(config: RunConfig) -> Mixture:
    """The training split."""
    return open_mixture(read_shares(config.data, config.mix))


def build(config: RunConfig, world: World, data: Mixture, watchdog: Watchdog, stop: StopSignals) -> Job:
    """Check everything that can be checked, then make model and optimizer. Nothing is written yet.

    Raises:
        Problem: something does not fit, on this rank or another.
    """
    run = Path(config.run)
    with world.together():
        compute = choose_compute(config.precision, world.device)
        if config.deterministic or config.parallel.strategy == "ordered":
            be_deterministic(world.device)
        _check_folder(config, run)
        tokenizer = _matching_tokenizer(config, data)
        if config.sample_every:
            _check_prompt(config, tokenizer)
        loader = Loader(
            data.streams, config.batch, seed=config.seed, parts=data.parts, rank=world.rank, world_size=world.size
        )
        config.check_ranks(world.size)
        _check_memory(config, world, compute)
        if config.eval_every and "val_loss" in config.evals.names:
            _check_evals(data, config.batch.seq_len)
        files = files_by_name(config.evals.files, plugins.entries("evals"))
        sinks = open_sinks(config.track, run)
        if config.verify_data:
            _verify_data(data, world, watchdog)
        model = build_model(config.model, seed=config.seed).to(world.device)
        model.trained_seq_len = config.batch.seq_len

    compiled = compiles(config.compile, world.device)
    trainable = make_trainable(model, compute.dtype, world, config.parallel, compiled=compiled)
    ordered = config.parallel.strategy == "ordered"
    return Job(
        config=config,
        world=world,
        compute=compute,
        run=run,
        data=data,
        loader=loader,
        tokenizer=tokenizer,
        model=model,
        trainable=trainable,
        optimizer=build_optimizer(model, config.optim, world, ordered=ordered, compiled=compiled),
        guard=Guard(config.guard, world.device),
        scale=LossScale(factor=2.0**16) if compute.needs_scaler else None,
        metrics=MetricsLog(run / "metrics.jsonl" if world.is_main else None, sinks),
        saver=checkpoint.Saver(run / "checkpoints", config.keep_checkpoints),
        watchdog=watchdog,
        stop=stop,
        peak_flops=peak_flops(world.device, compute.precision),
        without_data=_fetch_assets(config.evals.names if config.eval_every else (), files, world),
    )


def _check_memory(config: RunConfig, world: World, compute: Compute) -> None:
    """Refuse what would run out of memory; say where it may."""
    if not config.check_memory or world.device.type not in ("cpu", "cuda"):
        return
    compiled = compiles(config.compile, world.device)
    setup = setup_of(config, world.size, device=world.device.type, precision=compute.precision, compiled=compiled)
    warning = require_memory(setup, config.batch.tokens_of(1), free_bytes(world.device))
    if warning and world.is_main:
        warn(warning)


def _fetch_assets(names: tuple[str, ...], files: dict[str, Path], world: World) -> dict[str, str]:
    """Bring what evaluations need to every machine, before the first step; what cannot be had, and why."""
    missing: dict[str, str] = {}
    for name in names if world.local_rank == 0 else ():
        try:
            for asset in plugins.load("evals", name).ASSETS:
                find(asset, name, files)
        except (Problem, OSError) as error:
            missing[name] = str(error)
    return {name: why for found in world.everyones(missing) for name, why in found.items()}


def _check_folder(config: RunConfig, run: Path) -> None:
    for folder in (run, run / "checkpoints"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f"{folder} is in the way: it is no folder; move it, or choose another --run.")
    used = (run / "metrics.jsonl").exists() or bool(checkpoint.folders(run / "checkpoints"))
    if config.resume == "never" and used:
        raise UsageError(f"{run} holds a run already and resume is 'never'; choose another --run, or --resume auto.")
    if config.resume == "must" and not checkpoint.folders(run / "checkpoints"):
        raise UsageError(f"{run} has no checkpoint to resume from and resume is 'must'; --resume auto starts anew.")


def _matching_tokenizer(config: RunConfig, data: Mixture) -> Tokenizer:
    """The tokenizer that made the data, if the model has its vocabulary and the settings suit it."""
    tokenizer = data.tokenizer()
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size:,}, but {data} was made with the tokenizer "
            f"{tokenizer.name!r} of {tokenizer.vocab_size:,} tokens; set --model.vocab-size {tokenizer.vocab_size} "
            "or prepare the data with the other tokenizer."
        )
    if tokenizer.eot is None and "document_mask" in switches_on(config.model):
        raise ConfigError(
            f"model.document_mask = true needs an end of text between documents, and {data} is {tokenizer.name} "
            "without one; set --model.no-document-mask."
        )
    return tokenizer


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
    """What evaluations need is looked for before the first step, not in the middle of the run."""
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


def restore(job: Job) -> int:
    """Go on where the run folder stands; returns the number of updates already made, 0 for a new run."""
    newest = None
    with job.world.together():
        if job.world.is_main:
            newest = checkpoint.newest_good(job.run / "checkpoints")
    name = job.world.from_main(newest and newest.name)
    if name is None:
        return 0
    with job.world.together():
        found = checkpoint.read(job.run / "checkpoints" / name)
        _check_same_run(job, found)
        load_weights(job.model, found.model)
        load_state_tensors(job.optimizer, job.model, found.optimizer)
    job.guard.load_state(found.state["guard"])
    if job.scale is not None and found.state["loss_scale"] is not None:
        job.scale = LossScale(**found.state["loss_scale"])
    job.elapsed_s = found.state["elapsed_s"]
    job.saved_at = found.step
    return found.step


def _check_same_run(job: Job, found: checkpoint.Checkpoint) -> None:
    """Refuse to go on as another run than the one that was begun."""
    shape = dataclasses.asdict(job.config.model)
    for key, value in found.config["model"].items():
        if shape.get(key) != value:
            raise CheckpointError(
                f"{found.folder} holds a model with {key} = {value}, the recipe has {shape.get(key)}; "
                "use the recipe of that run, or another --run folder."
            )
    if found.state["data_fingerprint"] != job.data.fingerprint:
        raise CheckpointError(
            f"{job.run} was trained on data with fingerprint {found.state['data_fingerprint'][:16]}, {job.data} has "
            f"{job.data.fingerprint[:16]}; give the --data or --mix of that run, or another --run folder."
        )
    if not (job.run / "config.toml").is_file():
        raise CheckpointError(f"{job.run / 'config.toml'} is missing; put it back, or use another --run folder.")
    before = read_toml(job.run / "config.toml")
    for key, (old, new) in differences(before, job.config).items():
        if key.startswith(_DEFINE_THE_RUN):
            raise ConfigError(
                f"{key} was {old} in {job.run} and is {new} now: that is another run. "
                f"Set it back, or use another --run folder."
            )
        if job.world.is_main and not key.startswith(_MAY_CHANGE_SILENTLY):
            warn(f"{key} was {old} up to step {found.step} and is {new} from here on.")


def require_room(job: Job, first: int) -> None:
    """Refuse to begin a run whose checkpoints the disk cannot hold."""
    every, last = job.config.save_every, job.config.max_steps
    with job.world.together():
        if job.world.is_main and every:
            checkpoint.require_room(
                job.run / "checkpoints",
                12 * sum(p.numel() for p in job.model.parameters()),  # fp32 weights and AdamW's two moments
                keep=job.config.keep_checkpoints,
                saves_left=-(-last // every) - first // every,
            )


def save(job: Job, step: int) -> None:
    """Begin a checkpoint of this step; the loop goes on once the state is copied. Every rank comes, rank 0 writes.

    Raises:
        Problem: the ranks' weights have drifted apart.
    """
    config, world = job.config, job.world
    if step == job.saved_at:
        return
    job.saved_at = step
    if config.parallel.check_every:
        check_replicas(job.model, world, step)
    parameters = gather(dict(job.model.named_parameters()), world)
    moments = gather(state_tensors(job.optimizer, job.model), world)
    if not world.is_main:
        return
    state = {
        "step": step,
        "seed": config.seed,
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": config.batch.batch_tokens,
        "tokens": config.batch.tokens_until(step),
        "data_fingerprint": job.data.fingerprint,
        "guard": job.guard.state(),
        "loss_scale": dataclasses.asdict(job.scale) if job.scale else None,
        "elapsed_s": job.elapsed_s + time.monotonic() - job.started_at,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
    }
    job.saver.save(
        lambda: checkpoint.snapshot(
            step,
            native.config_json(job.model.config, job.tokenizer_ref, job.model.trained_seq_len),
            native.tensors(job.model, parameters),
            moments,
            state,
            job.saver.copies,
        )
    )
