"""The configuration of a run. In: values; out: one frozen, checked `RunConfig`.

It only composes dataclasses, each of which is defined beside the code that reads it.
Precedence: default < recipe < command line.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from regpt2.base import shelves
from regpt2.base.device import Precision
from regpt2.base.errors import ConfigError, did_you_mean
from regpt2.data.loader import BatchConfig
from regpt2.data.mixture import read_shares
from regpt2.model.language_model import GPTConfig
from regpt2.references.curves import names as curve_names
from regpt2.training.guard import GuardConfig
from regpt2.training.lora import LoraConfig
from regpt2.training.optimizer import OptimConfig
from regpt2.training.ranks.strategy import ParallelConfig
from regpt2.training.schedule import ScheduleConfig, window_at

TO_BE_NAMED = "?"  # as `init` of a recipe that trains a model further: the command says which


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated during training."""

    names: tuple[str, ...] = ("val_loss",)
    """Evaluations by name: the entries of the shelf evals/, or a part of one, as core.piqa."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split to score; always the same ones, for any number of ranks."""
    files: tuple[str, ...] = ()
    """Local files of evaluations, each as NAME=PATH; the others come from the cache or are downloaded."""
    limit: int = 0
    """Score only the first N examples of each evaluation; 0 = all. For a quick try: it changes the results."""

    verdict: str = "auto"
    """Reference curve to compare losses with: auto (by model and data; with --init none), off, or a name."""

    def __post_init__(self) -> None:
        if self.val_tokens < 1:
            raise ConfigError(f"evals.val_tokens = {self.val_tokens} must be at least 1.")
        if self.limit < 0:
            raise ConfigError(f"evals.limit = {self.limit} must be at least 0 (0 = all examples).")
        if self.verdict not in (choices := ["auto", "off", *curve_names()]):
            raise ConfigError(
                f"evals.verdict = {self.verdict!r}{did_you_mean(self.verdict, choices)} "
                f"Available: {', '.join(choices)}."
            )
        for name in self.names:
            shelves.with_part("evals", name)  # raises, with the names that there are


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Samples written during training."""

    prompt: str = "Hello, I'm a language model,"
    """What the samples continue; empty = from the start of a document."""
    n: int = 4
    """Number of samples."""
    max_new_tokens: int = 32
    """Tokens per sample."""
    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_k: int = 50
    """Sample from the N most likely tokens; 0 = from all."""

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"sample.{name} = {getattr(self, name)} must be a number of at least {least}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    recipe: str = ""
    """The recipe's name in the record and the report."""
    run: str = ""
    """The run folder."""
    data: str = ""
    """The prepared data folder (regpt2 prepare ... --out DIR)."""
    mix: tuple[str, ...] = ()
    """Several data folders instead of `data`, each as DIR=WEIGHT: its share of the tokens in every update."""
    init: str = ""
    """Begin from the weights of this model, not from random ones: hf:gpt2, a run, a checkpoint, a GGUF file, ..."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the newest checkpoint, if any; never: refuse a used run folder; must: refuse a new one."""
    seed: int = 1337
    """Determines the initial weights (without --init), the order of the data and dropout."""
    max_steps: int = 19_073
    """Total number of updates."""
    max_epochs: float = 0.0
    """At most this many passes over the training data: max_steps is lowered to it before the run. 0 = no limit."""
    dropout_by_size: bool = False
    """Where model.dropout is 0, choose it by the training data: 0.2 below 1M tokens, 0.1 below 10M, else 0."""
    log_every: int = 1
    """Updates between entries in the record. Reading the loss waits for the device."""
    eval_every: int = 250
    """Updates between evaluations; they also run before the first update and after the last. 0 = never."""
    sample_every: int = 250
    """Updates between samples; they are also written after the last update. 0 = never."""
    save_every: int = 1000
    """Updates between checkpoints; also saved after the last update, on Ctrl-C and on SIGTERM. 0 = never save."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep; 0 keeps all."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss, in checkpoints/best."""
    stop_after_worse: int = 0
    """Stop after N validations in a row whose loss is not below the best. 0 = never."""
    track: tuple[str, ...] = ()
    """Also send the record to: tensorboard, wandb."""
    verify_data: bool = True
    """Check the SHA-256 of every shard before the first update."""
    check_memory: bool = True
    """Refuse, before the first update, a run that would certainly run out of memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    deterministic: bool = False
    """On a GPU: the same bits in every run, also after a resume; kernels may be slower. A CPU always does this."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile for the training step, not for evaluations and samples. auto: on a GPU with Triton."""
    model: GPTConfig = field(default_factory=GPTConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.mix:
            read_shares(self.data, self.mix)  # raises what is wrong with them
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed} must be from 0 to 2**63 - 1.")
        for name in ("max_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1.")
        for name in ("eval_every", "sample_every", "save_every", "keep_checkpoints", "stop_after_worse"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 0 (0 = never).")
        if not 0 <= self.max_epochs < math.inf:
            raise ConfigError(f"max_epochs = {self.max_epochs} must be a number of at least 0 (0 = no limit).")
        self._check_validations()
        if self.batch.seq_len > self.model.block_size:
            raise ConfigError(
                f"batch.seq_len = {self.batch.seq_len} is longer than model.block_size = {self.model.block_size}; "
                f"the most is {self.model.block_size}."
            )
        self.schedule.check_window(self.model.architecture, getattr(self.model, "window", None))
        self.lora.check(self.model, self.optim.name, self.parallel.strategy)
        if self.lora.rank and self.optim.ema:
            raise ConfigError(
                f"optim.ema = {self.optim.ema} averages all weights, and with lora.rank only adapters train; take "
                "--optim.ema 0, or --lora.rank 0."
            )

    def _check_validations(self) -> None:
        """Refuse to keep or wait for the best of no validations."""
        asked = [f"{name} = {getattr(self, name)}" for name in ("keep_best", "stop_after_worse") if getattr(self, name)]
        if asked and not (self.eval_every and "val_loss" in self.evals.names):
            missing = "eval_every = 0" if not self.eval_every else f"evals.names = {list(self.evals.names)}"
            raise ConfigError(
                f"{' and '.join(asked).lower()} needs validation losses, and there are none with {missing}; set "
                "eval_every above 0 and val_loss in evals.names, or give --no-keep-best and --stop-after-worse 0."
            )

    def window_at(self, step: int) -> int:
        """Tokens that attention reaches back in update `step`, from 1; 0: all before."""
        return window_at(self.schedule, getattr(self.model, "window", 0), step, self.max_steps)

    def check_ranks(self, world_size: int) -> None:
        """Refuse a number of ranks that cannot share every update, whatever its size.

        Raises:
            ConfigError: not a whole number of passes, or one that the strategy cannot do.
        """
        for stretch in self.batch.stretches:
            self.parallel.check(world_size, self.batch.grad_accum_steps(world_size, stretch.steps_before + 1))
