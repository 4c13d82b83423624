"""Recipes. In: a name or a path, and options; out: the file, its description, a checked `RunConfig`."""

import dataclasses
from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from regpt2.base.errors import UsageError, did_you_mean
from regpt2.base.shelves import words_after
from regpt2.config.initial_shape import require_shape, with_shape
from regpt2.config.run import TO_BE_NAMED, RunConfig
from regpt2.config.toml_file import CHOOSING, class_of, from_table, read_toml
from regpt2.model.initial_weights import require_fit

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_rows() -> list[str]:
    """A line for each shipped recipe: its name, and the first line of its head."""
    return [f"  {name:<18} {recipe_head(find_recipe(name)).splitlines()[0]}" for name in recipe_names()]


def recipe_head(path: Path) -> str:
    """The comment at the head of a recipe: what it does, on what hardware, in what time, with what result."""
    head = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in head)


def find_recipe(spec: str) -> Path:
    """The file of a recipe named or given by path.

    Raises:
        UsageError: neither a shipped recipe nor a TOML file.
    """
    path, names = Path(spec), recipe_names()
    if spec in names:
        return RECIPES / f"{spec}.toml"
    if path.suffix == ".toml":
        if not path.is_file():
            raise UsageError(f"{spec}: there is no such file.")
        return path
    raise UsageError(
        f"there is no recipe {spec!r}{did_you_mean(spec, names)} Available: {', '.join(names)}; "
        "or give a file that ends in .toml."
    )


def load_recipe(spec: str, changed: Mapping[str, Any] | None = None) -> RunConfig:
    """A recipe by name or path, checked; its default run folder is runs/NAME.

    `changed` is what options will change, by section. With `init`, there or in the recipe, the model has the shape of
    the one that it names.
    """
    path = find_recipe(spec)
    run = str(Path("runs") / path.stem)
    config = read_toml(path, lambda table: with_shape(table, changed or {}, run))
    return dataclasses.replace(config, run=config.run or run, recipe=config.recipe or path.stem)


def configured(recipe: str | Mapping[str, Any], options: Mapping[str, Any]) -> RunConfig:
    """A recipe, by name, path or content, with changed values as in `with_options`.

    Raises:
        ConfigError: as there, or options disagree with the model that `init` names.
    """
    changed = _nested(options)
    if isinstance(recipe, Mapping):
        default = with_options(RunConfig(), with_shape(_nested(recipe), changed, ""))
    else:
        default = load_recipe(recipe, changed)
    config = with_options(default, options)
    require_shape(default, config)
    return config


def defaults_for(spec: str, options: list[str]) -> RunConfig:
    """The recipe that options apply to: with the entries that they name, without its data if they give `--mix`.

    Raises:
        ConfigError: there is no such entry.
    """
    given = {option.partition("=")[0].removeprefix("--") for option in options}
    named = {key: f"{key}.{name}" for key, name in CHOOSING.items() if f"{key}.{name}" in given}
    config = load_recipe(spec, _as_table(options))
    return _open_to(given, config, {key: words_after(options, f"--{name}") for key, name in named.items()})


def _as_table(options: list[str]) -> dict[str, Any]:
    """Options as `with_shape` needs them, before they are parsed: their names, and the values of a few."""
    table: dict[str, Any] = {"model": {}, "batch": {}}
    for word in options:
        option = word.partition("=")[0]
        section, _, name = option.removeprefix("--").replace("-", "_").partition(".")
        value: Any = "".join(words_after(options, option)[-1:])
        if option.startswith("--") and name and section in table:
            table[section][name.removeprefix("no_")] = int(value) if value.isdecimal() else value
        elif option in ("--init", "--run"):
            table[section] = value
    return table


def with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The configuration with changed values: `{"max_steps": 20, "optim": {"lr": 3e-4}}`, or `{"optim.lr": 3e-4}`.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value.
    """
    table = _nested(options)
    sections = {key: table[key] for key in CHOOSING if isinstance(table.get(key), dict)}
    chosen = {key: one[CHOOSING[key]] for key, one in sections.items() if CHOOSING[key] in one}
    return from_table(RunConfig, table, "", _open_to(table.keys(), config, chosen))


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1}` as `{"optim": {"lr": 1}}`."""
    table: dict[str, Any] = {}
    for key, value in options.items():
        section, dot, name = key.partition(".")
        value = {name: value} if dot else value
        table[section] = {**table.get(section, {}), **value} if isinstance(value, Mapping) else value
    return table


def _open_to(given: Collection[str], config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """`chosen`: by section, the entries that replace the recipe's."""
    if config.init not in ("", TO_BE_NAMED) and "model" in chosen:
        require_fit(config.model, {"architecture": class_of("model", chosen["model"]).architecture}, config.init)
    rebuilt = {key: _rebuilt(getattr(config, key), class_of(key, names)) for key, names in chosen.items()}
    config = dataclasses.replace(config, **rebuilt)
    if "mix" in given:
        return dataclasses.replace(config, data="")
    return dataclasses.replace(config, mix=()) if "data" in given else config


def _rebuilt(config: Any, kind: Any) -> Any:
    """The same settings for another entry, with the defaults of its own options."""
    if type(config) is kind:
        return config
    both = ({field.name for field in dataclasses.fields(one)} for one in (config, kind))
    common = set.intersection(*both) - {"architecture"}
    return kind(**{name: getattr(config, name) for name in common})
