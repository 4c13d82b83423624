"""Recipes. In: a name or a path, and options; out: the file, its description, a checked `RunConfig`."""

import dataclasses
from collections.abc import Collection, Mapping
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from regpt2.base.errors import UsageError, did_you_mean
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import from_table, read_toml
from regpt2.model.architecture import config_class
from regpt2.model.language_model import GPTConfig

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


def load_recipe(spec: str) -> RunConfig:
    """A recipe by name or path, checked; its default run folder is runs/NAME."""
    path = find_recipe(spec)
    config = read_toml(path)
    run, recipe = config.run or str(Path("runs") / path.stem), config.recipe or path.stem
    return dataclasses.replace(config, run=run, recipe=recipe)


def defaults_for(spec: str, options: list[str]) -> RunConfig:
    """The recipe that options apply to: in the architecture that they name, without its data if they give `--mix`.

    Raises:
        ConfigError: there is no such architecture.
    """
    words = [word for option in options for word in option.split("=", 1)]
    architectures = [value for name, value in pairwise(words) if name == "--model.architecture"]
    given = {option.partition("=")[0].removeprefix("--") for option in options}
    return _open_to(given, load_recipe(spec), *architectures[-1:])


def with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The configuration with changed values: `{"max_steps": 20, "optim": {"lr": 3e-4}}`, or `{"optim.lr": 3e-4}`.

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
    return from_table(RunConfig, table, "", base)


def _open_to(given: Collection[str], config: RunConfig, architecture: str | None = None) -> RunConfig:
    if architecture is not None:
        config = dataclasses.replace(config, model=_rebuilt(config.model, architecture))
    if "mix" in given:
        return dataclasses.replace(config, data="")
    return dataclasses.replace(config, mix=()) if "data" in given else config


def _rebuilt(model: GPTConfig, architecture: str) -> GPTConfig:
    """The same shape in another architecture, with the defaults of its own switches."""
    kind = config_class(architecture)
    if type(model) is kind:
        return model
    common = {field.name for field in dataclasses.fields(GPTConfig)} - {"architecture", "dropout"}  # modern has none
    return kind(**{name: getattr(model, name) for name in common})
