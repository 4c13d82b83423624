"""GPT-2, reproduced: text to a trained, verified, resumable GPT-2.

The public face is the command `regpt2`; in Python, the verbs and rooms are imported by name:
`from regpt2.model.load import load_model`, `from regpt2.train import train`.
"""

__version__ = "0.1.0"
