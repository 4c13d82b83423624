"""GPT-2: model/gpt.py."""

from regpt2.model.gpt import GPT, GPTConfig

Config, Model = GPTConfig, GPT
