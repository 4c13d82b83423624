"""The configuration of a run. In: a recipe (TOML) and options; out: one frozen, checked `RunConfig`, and TOML again.

It only composes the dataclasses that stand beside the code that reads them.
Precedence: default < recipe < command line.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from regpt2.base import plugins
from regpt2.base.device import Precision
from regpt2.base.errors import ConfigError, UsageError, did_you_mean
from regpt2.base.files import read_small
from regpt2.data.loader import BatchConfig
from regpt2.data.mixture import read_shares
from regpt2.model.architecture import config_class
from regpt2.model.language_model import GPTConfig
from regpt2.references.curves import names as curve_names
from regpt2.training.guard import GuardConfig
from regpt2.training.memory import Setup
from regpt2.training.optimizer import OptimConfig
from regpt2.training.ranks.strategy import ParallelConfig
from regpt2.training.schedule import ScheduleConfig

RECIPE_BYTES, DOTS = 1 << 20, 100  # a key of 50,000 dots would take the library gigabytes
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated during training."""

    names: tuple[str, ...] = ("val_loss",)
    """Evaluations by name: the entries of the shelf evals/."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split to score; always the same ones, for any number of ranks."""
    files: tuple[str, ...] = ()
    """Local files of evaluations, each as NAME=PATH; the others come from the cache or are downloaded."""
    limit: int = 0
    """Score only the first N examples of each evaluation; 0 = all. For a quick try: it changes the results."""

    verdict: str = "auto"
    """Reference curve to compare validation losses with: auto (the one for this model and data), off, or a name."""

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
            if name not in plugins.entries("evals"):
                plugins.load("evals", name)  # raises, with the names that there are


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
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the newest checkpoint, if any; never: refuse a used run folder; must: refuse a new one."""
    seed: int = 1337
    """Determines the initial weights, the order of the data and dropout."""
    max_steps: int = 19_073
    """Total number of updates."""
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
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if self.mix:
            read_shares(self.data, self.mix)  # raises what is wrong with them
        if self.max_steps < 1:
            raise ConfigError(f"max_steps = {self.max_steps} must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed} must be from 0 to 2**63 - 1.")
        if self.log_every < 1:
            raise ConfigError(f"log_every = {self.log_every} must be at least 1.")
        for name in ("eval_every", "sample_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 0 (0 = never).")
        if self.batch.seq_len > self.model.block_size:
            raise ConfigError(
                f"batch.seq_len = {self.batch.seq_len} is longer than model.block_size = {self.model.block_size}; "
                f"the most is {self.model.block_size}."
            )

    def check_ranks(self, world_size: int) -> None:
        """Refuse updates that so many ranks cannot share, of whatever size.

        Raises:
            ConfigError: not a whole number of passes, or one that the strategy cannot do.
        """
        for stretch in self.batch.stretches:
            self.parallel.check(world_size, self.batch.grad_accum_steps(world_size, stretch.steps_before + 1))


def setup_of(config: RunConfig, ranks: int, *, device: str, precision: str, compiled: bool) -> Setup:
    """How each of so many ranks trains, for what is known of memory and time.

    Raises:
        ConfigError: an update is not a whole number of passes.
    """
    return Setup(
        model=config.model,
        micro_batch=config.batch.micro_batch,
        seq_len=config.batch.seq_len,
        grad_accum_steps=config.batch.grad_accum_steps(ranks),
        precision=precision,
        device=device,
        compiled=compiled,
        strategy=config.parallel.strategy,
        ranks=ranks,
        optim=config.optim,
    )


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_rows() -> list[str]:
    """A line for each shipped recipe: its name, and the first line of its head."""
    return [f"  {name:<18} {recipe_head(find_recipe(name)).splitlines()[0]}" for name in recipe_names()]


def recipe_head(path: Path) -> str:
    """The comment at the head of a recipe: what it does, on what hardware, in what time, with what result."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(head)


def find_recipe(spec: str) -> Path:
    """The file of a recipe named or given by path.

    Raises:
        UsageError: neither a shipped recipe nor a TOML file.
    """
    shipped = RECIPES / f"{spec}.toml"
    if spec in recipe_names():
        return shipped
    path = Path(spec)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"{spec}: there is no such file.")
        return path
    names = recipe_names()
    raise UsageError(
        f"there is no recipe {spec!r}{did_you_mean(spec, names)} Available: {', '.join(names)}; "
        "or give a file that ends in .toml."
    )


def load_recipe(spec: str) -> RunConfig:
    """A recipe by name or path, checked; its run folder is runs/NAME unless it says otherwise."""
    path = find_recipe(spec)
    config = read_toml(path)
    run, recipe = config.run or str(Path("runs") / path.stem), config.recipe or path.stem
    return dataclasses.replace(config, run=run, recipe=recipe)


def defaults_for(spec: str, options: list[str]) -> RunConfig:
    """A recipe as the options find it: in the architecture that they name; where they give `--mix`, without its data.

    Raises:
        ConfigError: there is no such architecture.
    """
    words = [word for option in options for word in option.split("=", 1)]
    architectures = [value for name, value in pairwise(words) if name == "--model.architecture"]
    given = {option.partition("=")[0].removeprefix("--") for option in options}
    return _open_to(given, load_recipe(spec), *architectures[-1:])


def with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values: `{"max_steps": 20, "optim": {"lr": 3e-4}}`, or `{"optim.lr": 3e-4}`.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value.
    """
    table: dict[str, Any] = {}
    for key, value in options.items():
        section, dot, name = key.partition(".")
        value = {name: value} if dot else value
        table[section] = {**table.get(section, {}), **value} if isinstance(value, Mapping) else value
    model = table.get("model")
    architecture = model.get("architecture", config.model.architecture) if isinstance(model, dict) else None
    base = _open_to(table.keys(), config, *([architecture] if architecture else []))
    return _from_table(RunConfig, table, "", base)


def _open_to(given: Collection[str], config: RunConfig, architecture: str | None = None) -> RunConfig:
    if architecture is not None:
        config = dataclasses.replace(config, model=_rebuilt(config.model, architecture))
    if "mix" in given:
        return dataclasses.replace(config, data="")
    return dataclasses.replace(config, mix=()) if "data" in given else config


def _rebuilt(model: GPTConfig, architecture: str) -> GPTConfig:
    """The same shape in another architecture, whose own switches are as they are by default there."""
    kind = config_class(architecture)
    if type(model) is kind:
        return model
    common = {field.name for field in dataclasses.fields(GPTConfig)} - {"architecture", "dropout"}  # modern has none
    return kind(**{name: getattr(model, name) for name in common})


def read_toml(path: Path) -> RunConfig:
    """A recipe file as a config.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, an impossible value; it names file and key.
    """
    try:
        text = read_small(path, ConfigError, RECIPE_BYTES)
        if any(line.count(".") > DOTS for line in text.splitlines()):
            raise ConfigError(f"{path} has a line of more than {DOTS} dots; no recipe has a key that deep.")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    try:
        return _from_table(RunConfig, table, "")
    except (ConfigError, ValueError) as error:  # ValueError: a number of too many digits to be shown
        raise ConfigError(f"{path}: {error}") from None


T = typing.TypeVar("T")


def options_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of options from values by name; a str is a path where one is expected.

    Raises:
        UsageError: an unknown name, a wrong type, an impossible value.
    """
    return _from_table(kind, dict(values), "")


def _from_table(kind: type[T], table: dict[str, Any], prefix: str, base: T | None = None) -> T:
    """`base` has the values that the table leaves out; without one they are the type's own."""
    hints = get_type_hints(kind)
    values = {} if base is None else {name: getattr(base, name) for name in hints}
    for key, value in table.items():
        if key not in hints:
            known = sorted(hints)
            raise ConfigError(f"unknown key {prefix + key!r}{did_you_mean(key, known)} Known here: {', '.join(known)}.")
        values[key] = _convert(hints[key], value, prefix + key, values.get(key))
    return kind(**values)


_STAND_INS: dict[Any, tuple[type, ...]] = {float: (float, int), str: (Path,), Path: (str, Path)}


def _convert(hint: Any, value: Any, key: str, base: Any = None) -> Any:
    """A value as the type of its field; an int may stand for a float, a list for a tuple, a str for a path."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} is a number of {value.bit_length():,} bits, expected one of at most 64.")
    if hint is GPTConfig and isinstance(value, dict):
        hint = type(base) if base is not None else config_class(value.get("architecture", "gpt2"))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _from_table(hint, value, f"{key}.", base)
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:  # X | None
        return None if value is None else _convert(args[0], value, key)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{key} = {value!r} must be one of {', '.join(map(repr, args))}.")
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_convert(k, item, key) for k, item in zip(kinds, value, strict=True))
    elif type(value) is hint or (isinstance(value, _STAND_INS.get(hint, ())) and not isinstance(value, bool)):
        return hint(value) if hint in _STAND_INS else value
    raise ConfigError(f"{key} = {value!r} is a {type(value).__name__}, expected {_spelled(hint)}.")


def _spelled(hint: Any) -> str:
    if get_origin(hint) is tuple:
        args = get_args(hint)
        return f"a list of {_spelled(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    return "a table" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def to_toml(config: RunConfig) -> str:
    """The resolved config, usable as a recipe."""
    return "\n".join(_toml_lines(dataclasses.asdict(config), "")) + "\n"


def _toml_lines(table: dict[str, Any], name: str) -> list[str]:
    """A table's own values, then the tables in it."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if key not in tables]
    for key, inner in tables.items():
        lines += ["", f"[{name}{key}]", *_toml_lines(inner, f"{name}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as `section.key` -> (old, new)."""
    a, b = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
