"""The modern GPT: model/modern.py."""

from regpt2.model.modern import ModernConfig, ModernGPT

Config, Model = ModernConfig, ModernGPT
