"""GPT-2, reproduced: text to a trained, verified, resumable GPT-2. The public face is the command `regpt2`."""

__version__ = "0.1.0"
