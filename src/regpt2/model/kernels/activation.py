"""The two forms of GELU. In: MODEL as it was typed, and what its file states; out: the form to use, with a warning.

GELU is x times the share of the normal distribution below x: by erf, or in GPT-2 by a tanh that approximates it.
A model trained with one and used with the other has logits that are a little off.
"""

from pathlib import Path
from typing import Literal

from regpt2.base.console import warn

Activation = Literal["gelu_tanh", "gelu"]
GELU_FORMS: dict[Activation, Literal["tanh", "none"]] = {"gelu_tanh": "tanh", "gelu": "none"}  # as torch calls them


def split_activation(spec: str) -> tuple[str, Activation | None]:
    """`ckpt.pt:gelu_tanh` -> `ckpt.pt` and the form of GELU to use it with; None where MODEL names none."""
    for activation in GELU_FORMS:
        if spec.endswith(f":{activation}") and not Path(spec).exists():
            return spec.removesuffix(f":{activation}"), activation
    return spec, None


def choose_activation(source: str, stated: Activation, doubt: str | None, asked: Activation | None) -> Activation:
    """The form that was asked for, else the one that the file states or that is likely; a warning if it is unsure.

    Args:
        source: the model's name, for messages.
        stated: what the file states, or what is likely.
        doubt: a sentence, where the file does not state it.
        asked: what `split_activation` found.
    """
    if asked is None and doubt is not None:
        other = "gelu" if stated == "gelu_tanh" else "gelu_tanh"
        warn(f"{source} {doubt} If it has the other one, give {source}:{other} as MODEL.")
    if asked not in (None, stated) and doubt is None:
        warn(f"{source} has activation = {stated!r}; using {asked!r} instead, as MODEL asks.")
    return asked or stated
