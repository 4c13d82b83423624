"""The architectures by name. In: a name, or a configuration; out: its class of configuration, or the model."""

from dataclasses import fields

from regpt2.base.errors import ConfigError, did_you_mean
from regpt2.model.gpt import GPT
from regpt2.model.language_model import GPTConfig, LanguageModel
from regpt2.model.modern import ModernConfig, ModernGPT

ARCHITECTURES: dict[str, tuple[type[GPTConfig], type[LanguageModel]]] = {
    "gpt2": (GPTConfig, GPT),
    "modern": (ModernConfig, ModernGPT),
}


def config_class(name: object) -> type[GPTConfig]:
    """The configuration of an architecture; a ConfigError if the name is unknown."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        nearest, known = did_you_mean(str(name)[:80], ARCHITECTURES), ", ".join(ARCHITECTURES)
        raise ConfigError(f"model.architecture = {name!r:.80}{nearest} Available: {known}.")
    return ARCHITECTURES[name][0]


def build_model(config: GPTConfig, *, seed: int = 0) -> LanguageModel:
    """The model of this shape, with fresh weights; on the device "meta" without any."""
    return ARCHITECTURES[config.architecture][1](config, seed=seed)


def switches_on(config: GPTConfig) -> list[str]:
    """The settings that a model has switched on and GPT-2 does not have."""
    common = {field.name for field in fields(GPTConfig)}
    return [field.name for field in fields(config) if field.name not in common and getattr(config, field.name)]
