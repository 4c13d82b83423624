"""The architectures by name. In: a name, or a configuration; out: its class of configuration, or the model."""

from dataclasses import fields
from typing import Any

from regpt2.base import shelves
from regpt2.base.errors import ConfigError
from regpt2.model.language_model import GPTConfig, LanguageModel

SHELF = "model.architectures"


def config_class(name: object) -> type[GPTConfig]:
    """The configuration of an architecture.

    Raises:
        ConfigError: there is none of this name.
    """
    kind: type[GPTConfig] = _entry(name).Config
    return kind


def build_model(config: GPTConfig, *, seed: int = 0) -> LanguageModel:
    """The model of this shape, with fresh weights; on the device "meta" without any."""
    model: LanguageModel = model_class(config.architecture)(config, seed=seed)
    return model


def model_class(name: str) -> Any:
    """The class of an architecture's models: a LanguageModel, made from its configuration and a seed."""
    return _entry(name).Model


def _entry(name: object) -> Any:
    entry = shelves.load(SHELF, str(name)[:80])
    if entry.Config.architecture != name:
        raise ConfigError(f"{entry.__file__}: Config.architecture = {entry.Config.architecture!r} must be {name!r}.")
    return entry


def switches_on(config: GPTConfig) -> list[str]:
    """The settings that a model has switched on and GPT-2 does not have."""
    common = {field.name for field in fields(GPTConfig)}
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        is_on = value != field.default if type(field.default) is int else bool(value)  # a whole number begins as off
        if is_on and field.name not in (*common, "end_of_text"):  # an id is no switch
            found.append(field.name)
    return found
