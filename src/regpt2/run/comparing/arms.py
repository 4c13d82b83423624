"""The arms of a comparison. In: recipes with options, and a budget; out: configurations that may be compared."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regpt2.base.errors import UsageError, did_you_mean
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.config.initial_shape import require_shape
from regpt2.config.passes import steps_within
from regpt2.config.recipe_files import defaults_for
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import differences, read_toml, to_toml
from regpt2.run.comparing.runs import Arm

_LABEL = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
_BUDGET = re.compile(r"(\d+|\d*\.\d+)(k|M|B|s|min|h)?")
_TOKENS = {None: 1, "k": 10**3, "M": 10**6, "B": 10**9}
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_OURS = ("--run", "--seed", "--resume", "--eval-every", "--keep-checkpoints")
MOST_CHARACTERS = 60


@dataclass(frozen=True)
class Given:
    """An arm as given on the command line."""

    label: str
    spec: str
    config: RunConfig
    keeps_steps: bool
    """It has its own --max-steps."""


@dataclass(frozen=True)
class Budget:
    """What a run may take: tokens, or seconds of training."""

    tokens: int = 0
    seconds: float = 0.0


def read_arms(specs: Sequence[str], common: Sequence[str]) -> list[Given]:
    """Recipes, each with the common options and its own, checked against each other.

    Raises:
        UsageError: one is no recipe, two have one name, or their losses could not be compared.
    """
    arms = [read_arm(spec, common) for spec in specs]
    seen: dict[str, str] = {}
    for arm in arms:
        if (label := arm.label.casefold()) in seen:
            raise UsageError(
                f"two arms are called {arm.label!r}: {seen[label]!r} and {arm.spec!r}; give one of them a name, "
                f'as in "NAME={arm.spec}".'
            )
        seen[label] = arm.spec
        require_comparable(arm, arms[0])
    return arms


def require_comparable(arm: Given, first: Given) -> None:
    """Refuse an arm whose validation loss could not be compared with the first's.

    Raises:
        UsageError: it has other data, or does not measure it.
    """
    for name, here, there in (
        ("data", arm.config.data, first.config.data),
        ("mix", arm.config.mix, first.config.mix),
        ("evals.val_tokens", arm.config.evals.val_tokens, first.config.evals.val_tokens),
        ("model.vocab_size", arm.config.model.vocab_size, first.config.model.vocab_size),
    ):
        if here != there:
            raise UsageError(
                f"{arm.label} has {name} = {here!r}, {first.label} has {there!r}; losses on these do not compare. "
                "Options after -- apply to all arms."
            )
    if "val_loss" not in arm.config.evals.names:
        raise UsageError(f"{arm.label} does not evaluate val_loss, which the comparison needs; add it to evals.names.")


def read_arm(spec: str, common: Sequence[str]) -> Given:
    """A recipe with its own options, as in "NAME=RECIPE --option value", and the common ones.

    Raises:
        UsageError: it is none, or sets what the comparison sets.
    """
    named = _LABEL.fullmatch(spec)
    try:
        recipe, *own = shlex.split(named[2] if named else spec)
    except ValueError:
        raise UsageError(f"{spec!r} is not a recipe with options: it is empty, or a quote is not closed.") from None
    options = [*common, *own]
    for option in options:
        if (name := option.partition("=")[0]) in _OURS:
            raise UsageError(f"{name} cannot be set for an arm: use --out, --seeds or --evaluations.")
    default = defaults_for(recipe, options)
    config = parse(RunConfig, options, f"regpt2 compare, {spec!r}:", default=default)
    require_shape(default, config)
    plain = " ".join([Path(recipe).stem, *own])
    label = named[1] if named else re.sub(r"[^\w.+]+", "-", plain)[:MOST_CHARACTERS]
    keeps_steps = any(option.partition("=")[0] == "--max-steps" for option in options)
    return Given(label.strip("-.") or "arm", spec, config, keeps_steps)


def read_budget(text: str, first: RunConfig) -> Budget:
    """A budget as in 5M or 10min; empty: the tokens of the first arm.

    Raises:
        UsageError: it is neither.
    """
    if not text:
        return Budget(tokens=first.batch.tokens_until(first.max_steps))
    found = _BUDGET.fullmatch(text.replace(",", "").replace("_", ""))
    amount = float(found[1]) if found else 0.0
    if found is None or not amount:
        raise UsageError(f"--budget {text} is neither tokens (300k, 5M, 1.7B) nor time of training (90s, 10min, 2h).")
    unit = found[2]
    return Budget(seconds=amount * _SECONDS[unit]) if unit in _SECONDS else Budget(tokens=round(amount * _TOKENS[unit]))


def within(given: Given, tokens: int, evaluations: int) -> RunConfig:
    """The arm's configuration with as many updates as the tokens allow; its schedule spans them.

    Raises:
        UsageError: they are too few.
    """
    config = given.config
    steps = config.max_steps if given.keeps_steps else steps_within(config.batch, tokens)
    if steps <= config.schedule.warmup_steps or not steps:
        raise UsageError(
            f"{given.label}: {tokens:,} tokens make {steps:,} updates, expected more than schedule.warmup_steps = "
            f"{config.schedule.warmup_steps:,}; give a larger --budget, or a shorter warm-up."
        )
    every = max(1, round(steps / evaluations))
    config = replace(config, max_epochs=0.0, stop_after_worse=0, keep_best=False)  # the budget alone sets the end
    return replace(config, run="", seed=1, resume="auto", max_steps=steps, eval_every=every, keep_checkpoints=1)


def keep_recipe(folder: Path, label: str, config: RunConfig) -> None:
    """Write the arm's recipe into its folder, or check that the same one is there.

    Raises:
        UsageError: the arm was started with another.
    """
    path = folder / label / "recipe.toml"
    if not path.exists():
        write_atomic(path, to_toml(config))
        return
    changes = differences(read_toml(path), config).items()
    if changed := [f"{key} was {old!r} and is {new!r} now" for key, (old, new) in changes]:
        raise UsageError(
            f"{folder / label} was started with another recipe: {'; '.join(changed)}. Undo that, choose another "
            '--out, or give an arm of your own another name ("NAME=...").'
        )


def with_baseline(folder: Path, arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """The arms with the baseline first (default: as they are), each with its settings that differ from it.

    Raises:
        UsageError: there is no such arm.
    """
    labels = [arm.label for arm in arms]
    if baseline and baseline not in labels:
        raise UsageError(f"--baseline {baseline}{did_you_mean(baseline, labels)} Available: {', '.join(labels)}.")
    ordered = sorted(arms, key=lambda arm: arm.label != (baseline or labels[0]))
    first = read_toml(folder / ordered[0].label / "recipe.toml")
    changes = [differences(first, read_toml(folder / arm.label / "recipe.toml")) for arm in ordered]
    for of_arm in changes:
        of_arm.pop("eval_every", None)  # follows from the number of updates
    shown = [[f"{key} {_shown(a)} → {_shown(b)}" for key, (a, b) in of_arm.items()] for of_arm in changes]
    return [replace(arm, changes=lines) for arm, lines in zip(ordered, shown, strict=True)]


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
