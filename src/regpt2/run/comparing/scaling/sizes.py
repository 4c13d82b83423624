"""Sizes for a power law. In: `model.n_embd=64,128` or `budget=1M,3M`; out: arms, and what the law is a function of."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from regpt2.base.errors import UsageError
from regpt2.config.run import RunConfig
from regpt2.model.architecture import build_model
from regpt2.model.flops import flops_per_token
from regpt2.model.language_model import GPTConfig
from regpt2.run.comparing.runs import Arm

LEAST_FITTED = 3
VARIABLES = {"parameters": "non-embedding parameters", "tokens": "tokens", "flops": "FLOPs of training"}
_TABLES = ("wte.", "wpe.", "wve.", "lm_head.")  # a row for each token or position


def non_embedding(config: GPTConfig) -> int:
    """Parameters without the tables that have a row for each token or position.

    Kaplan et al. (arXiv:2001.08361, section 2.1) found that the loss of small models follows this count.
    """
    with torch.device("meta"):
        model = build_model(config)
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(_TABLES))


def sized(arm: Arm, config: RunConfig) -> Arm:
    """The arm with its parameters and the FLOPs of its training."""
    flops = flops_per_token(config.model, config.batch.seq_len) * arm.tokens
    return replace(arm, weights=non_embedding(config.model), flops=flops)


def size_of(arm: Arm, over: str) -> float:
    """The arm's size in the law's variable."""
    return float({"parameters": arm.weights, "tokens": arm.tokens, "flops": arm.flops}[over])


def variable(arms: Sequence[Arm], over: str, hold_out: int) -> str:
    """What the law is a function of: the one that is asked for, or parameters or tokens if it alone varies, else FLOPs.

    Raises:
        UsageError: it does not vary from arm to arm, or too few sizes remain to fit.
    """
    if over and over not in VARIABLES:
        raise UsageError(f"--over {over} must be one of {', '.join(VARIABLES)}.")
    vary = [name for name in ("parameters", "tokens") if len({size_of(arm, name) for arm in arms}) > 1]
    if not vary:
        raise UsageError(
            "--scaling changes neither parameters nor tokens; change sizes (model.n_embd=...) or budget=...."
        )
    over = over or (vary[0] if len(vary) == 1 else "flops")
    sizes = [size_of(arm, over) for arm in arms]
    if len(set(sizes)) < len(sizes):
        same = next(arm.label for arm in arms if sizes.count(size_of(arm, over)) > 1)
        raise UsageError(
            f"--scaling over {VARIABLES[over]} needs another number at every size, and {same} has the same as "
            f"another; change the size or the budget, or use --over with another of {', '.join(VARIABLES)}."
        )
    require_enough(len(arms), hold_out)
    return over


def require_enough(n_sizes: int, hold_out: int) -> None:
    """Refuse too few sizes for a law.

    Raises:
        UsageError: fewer than three are fitted.
    """
    if hold_out < 0:
        raise UsageError(f"--hold-out {hold_out} must be at least 0.")
    if n_sizes - hold_out < LEAST_FITTED:
        raise UsageError(
            f"{n_sizes} sizes with {hold_out} held out leave {max(0, n_sizes - hold_out)} to fit, expected at least "
            f"{LEAST_FITTED}; give more sizes, or a smaller --hold-out."
        )
