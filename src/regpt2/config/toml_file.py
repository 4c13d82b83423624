"""A configuration as TOML. In: a recipe file; out: a checked `RunConfig`, TOML again, and what differs between two."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from regpt2.base.errors import ConfigError, did_you_mean
from regpt2.base.files import read_small
from regpt2.base.shelves import extended
from regpt2.config.run import EvalConfig, RunConfig
from regpt2.model.architecture import config_class
from regpt2.training.optimizer import OptimConfig

RECIPE_BYTES, DOTS = 1 << 20, 100  # tomllib would take gigabytes for a key of 50,000 dots
T = TypeVar("T")

# Sections whose class depends on the entries that they name, each with the key that names them.
CHOOSING = {"model": "architecture", "optim": "name", "evals": "names"}


def read_toml(path: Path, complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> RunConfig:
    """A recipe file as a config. `complete` may add to its table what the file leaves out.

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
        return from_table(RunConfig, complete(table) if complete else table, "")
    except (ConfigError, ValueError) as error:  # ValueError: a number of too many digits to be shown
        raise ConfigError(f"{path}: {error}") from None


def options_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of options from values by name; a str is a path where one is expected.

    Raises:
        UsageError: an unknown name, a wrong type, an impossible value.
    """
    return from_table(kind, dict(values), "")


def from_table(kind: type[T], table: dict[str, Any], prefix: str, base: T | None = None) -> T:
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
    """A value as the type of its field; accepts an int for a float, a list for a tuple, a str for a path."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} is a number of {value.bit_length():,} bits, expected one of at most 64.")
    if (name := CHOOSING.get(key)) and isinstance(value, dict):
        hint = type(base) if base is not None else class_of(key, value.get(name, getattr(hint, name)))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_table(hint, value, f"{key}.", base)
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


def class_of(section: str, names: object) -> Any:
    """The class of a section for the entry, or the entries, that it names: with their own options."""
    listed = names if isinstance(names, list | tuple) else [names]
    if section == "model":
        return config_class("".join(map(str, listed[-1:])))
    kind, shelf = (OptimConfig, "training.optim") if section == "optim" else (EvalConfig, "evals")
    return extended(kind, shelf, listed)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is tuple:
        args = get_args(hint)
        return f"a list of {_spelled(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    return "a table" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def to_toml(config: RunConfig) -> str:
    """The resolved config, usable as a recipe."""
    return "\n".join(_toml_lines(dataclasses.asdict(config), "")) + "\n"


def _toml_lines(table: dict[str, Any], name: str) -> list[str]:
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
