"""A grid over one recipe. In: `optim.lr=1e-3,2e-3` and the like; out: its axes, and a checked arm for each place."""

import itertools
import re
import shlex
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from regpt2.base.errors import ConfigError, UsageError, did_you_mean
from regpt2.config.initial_shape import require_shape
from regpt2.config.recipe_files import with_options
from regpt2.run.comparing.arms import Given, read_arm, require_comparable
from regpt2.run.comparing.runs import Axis

_SETTING = re.compile(r"(?:--)?([A-Za-z][\w.-]*)=(.+)", re.DOTALL)
_INSTEAD = {
    "seed": "--seeds N", "run": "--out", "resume": "--out", "eval_every": "--evaluations", "keep_checkpoints": "--out",
    "max_steps": "budget=...",
}  # fmt: skip
BUDGET = "budget"
MOST_CHARACTERS = 100  # of a folder's name
MOST_PLACES = 1000


@dataclass(frozen=True)
class Placed:
    """An arm at its place in a grid."""

    given: Given
    at: list[int]
    budget: str
    """Its own, as given; empty: that of all."""
    settings: dict[str, Any]
    """The values that the axes give it."""


def read_axes(words: Sequence[str], option: str) -> list[Axis]:
    """An axis for each word as in `optim.lr=1e-3,2e-3`; settings within one word, between blanks, change together.

    Raises:
        UsageError: a word is none, a setting comes twice, or lists within a word differ in length.
    """
    axes = [_read_axis(word, option) for word in words]
    names = [name for axis in axes for name in axis.names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{option} has {twice[0]} twice; give all its values in one list.")
    return axes


def together(axes: Sequence[Axis], option: str) -> Axis:
    """One axis on which all these settings change together.

    Raises:
        UsageError: their lists differ in length.
    """
    lengths = {", ".join(axis.names): len(axis.values) for axis in axes}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise UsageError(f"{option} changes its settings together, so each needs as many values: {counted}.")
    values = [[value for part in parts for value in part] for parts in zip(*(one.values for one in axes), strict=True)]
    return Axis([name for axis in axes for name in axis.names], values)


def _read_axis(word: str, option: str) -> Axis:
    settings = []
    for part in word.split():
        found = _SETTING.fullmatch(part)
        if found is None:
            raise UsageError(f"{option} {part!r} is no SETTING=VALUE,VALUE,...; for example optim.lr=1e-3,2e-3.")
        name = found[1].replace("-", "_")
        if name in _INSTEAD:
            raise UsageError(f"{option} cannot change {name}; use {_INSTEAD[name]} instead.")
        settings.append(Axis([name], [[value] for value in _values(name, found[2], option)]))
    if not settings:
        raise UsageError(f"{option} has an empty word; give SETTING=VALUE,VALUE,...")
    return together(settings, option)


def _values(name: str, text: str, option: str) -> list[Any]:
    """The values between commas: numbers, words, or TOML's lists, as in betas=[0.9,0.95],[0.9,0.99]."""
    try:
        values = list(tomllib.loads(f"x = [{text}]")["x"])
    except ValueError:
        values = [_value(part) for part in text.split(",")]
    if "" in values:
        raise UsageError(f"{option} {name}={text} has an empty value.")
    if len(values) < 2:
        raise UsageError(f"{option} {name}={text} has one value; give two or more between commas.")
    return values


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except ValueError:
        pass
    try:
        return float(text)  # .5 is a number too, though not in TOML
    except ValueError:
        return text.strip()


def shown(value: object) -> str:
    """A value as in a label: 0.001, 64, true, 0.9-0.95."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "-".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def place_name(axis: Axis, place: int, between: str = ",") -> str:
    """A place along an axis: optim.lr=0.001."""
    values = zip(axis.names, axis.values[place], strict=True)
    return between.join(f"{name}={shown(value)}" for name, value in values)


def values_of(axis: Axis) -> list[str]:
    """The places along an axis without their names: 0.001, or "64, 1" of two settings."""
    return [", ".join(map(shown, place)) for place in axis.values]


def _label(name: str) -> str:
    """The name of an arm and its folder, from the names of its places."""
    plain = re.sub(r"[^\w.+=,-]+", "-", name)
    if len(plain) <= MOST_CHARACTERS:
        return plain
    return f"{plain[:MOST_CHARACTERS]}-{zlib.crc32(name.encode()):08x}"


def place_arms(spec: str, common: Sequence[str], axes: Sequence[Axis]) -> tuple[list[Placed], list[Axis], int]:
    """An arm for each place of the grid; the axes with values of their settings' types; the recipe's own place.

    The last is the index of the arm with the recipe's own values, or 0 if the grid does not have it.

    Raises:
        UsageError: an unknown setting, a value that the configuration refuses, a value twice, too many places.
    """
    base = read_arm(spec, common)
    shape = [range(len(axis.values)) for axis in axes]
    n_places = reduce(lambda n, places: n * len(places), shape, 1)
    if n_places > MOST_PLACES:
        raise UsageError(f"the grid has {n_places:,} places, expected at most {MOST_PLACES:,}; give fewer values.")
    if base.keeps_steps and any(BUDGET in axis.names for axis in axes):
        raise UsageError("--max-steps and budget=... exclude each other: both set how long a run is.")
    arms = [_place(base, axes, list(at)) for at in itertools.product(*shape)]
    for arm in arms:
        require_comparable(arm.given, base)
    labels = [arm.given.label for arm in arms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"{twice[0]} comes twice; give each value once.")
    typed = []
    for number, axis in enumerate(axes):
        first = {arm.at[number]: arm for arm in reversed(arms)}
        typed.append(Axis(axis.names, [[first[at].settings[name] for name in axis.names] for at in shape[number]]))
    own = [at for at, arm in enumerate(arms) if arm.given.config == base.config and not arm.budget]
    return arms, typed, own[0] if own else 0


def _place(base: Given, axes: Sequence[Axis], at: list[int]) -> Placed:
    raw = {
        name: value
        for axis, place in zip(axes, at, strict=True)
        for name, value in zip(axis.names, axis.values[place], strict=True)
    }
    config = _changed(base, raw, ", ".join(f"{name}={shown(value)}" for name, value in raw.items()))
    # As the configuration holds them: 1 becomes 1.0 where a number may have a fraction, so that it has one label.
    settings = {
        name: str(value) if name == BUDGET else reduce(getattr, name.split("."), config) for name, value in raw.items()
    }
    words = [f"--{key.replace('_', '-')}={shown(value)}" for key, value in settings.items() if key != BUDGET]
    spec = " ".join([base.spec, *map(shlex.quote, words)])
    label = _label(",".join(f"{name}={shown(value)}" for name, value in settings.items()))
    return Placed(replace(base, label=label, spec=spec, config=config), at, settings.get(BUDGET, ""), settings)


def _changed(base: Given, settings: Mapping[str, Any], name: str) -> Any:
    """The recipe's configuration with these settings.

    Raises:
        UsageError: it refuses them; the message names the place.
    """
    table: dict[str, Any] = {}
    for key, value in settings.items():
        if key == BUDGET:
            continue
        *sections, last = key.split(".")
        inner = reduce(lambda inside, section: inside.setdefault(section, {}), sections, table)
        inner[last] = value
    try:
        config = with_options(base.config, table)
        require_shape(base.config, config)
    except ConfigError as error:
        known = [*_settings(base.config)]
        unknown = next((key for key in settings if key not in known and key != BUDGET), None)
        if unknown:
            raise UsageError(f"there is no setting {unknown!r}{did_you_mean(unknown, known)}") from None
        raise UsageError(f"{name}: {error}") from None
    return config


def _settings(config: Any, prefix: str = "") -> list[str]:
    """The names of all settings, as section.key."""
    names: list[str] = []
    for key, value in vars(config).items():
        names += _settings(value, f"{prefix}{key}.") if hasattr(value, "__dataclass_fields__") else [prefix + key]
    return names
