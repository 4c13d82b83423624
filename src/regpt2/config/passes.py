"""Length and dropout by the size of the data. In: a configuration, the data opened; out: plain numbers, and warnings.

A run that reads little text many times learns it by heart: its validation loss falls, then rises.
"""

import dataclasses
from bisect import bisect_right
from contextlib import suppress

from regpt2.base.errors import ConfigError
from regpt2.config.run import RunConfig
from regpt2.data.loader import BatchConfig
from regpt2.data.mixture import WORTHWHILE_EPOCHS, Mixture

DROPOUT_BELOW = ((1_000_000, 0.2), (10_000_000, 0.1))
"""Pairs of a number of tokens and the dropout for less training data than that; more data gets none."""


def settle(config: RunConfig, data: Mixture) -> RunConfig:
    """The configuration with `max_epochs` and `dropout_by_size` turned into max_steps and model.dropout.

    A function of the configuration and the sizes of the data alone, so a resume finds the same numbers.
    """
    max_steps, model = config.max_steps, config.model
    if config.max_epochs:
        max_steps = min(max_steps, max(1, steps_within(config.batch, config.max_epochs * _pass_tokens(data))))
    if config.dropout_by_size and not model.dropout:
        dropout = next((share for below, share in DROPOUT_BELOW if data.n_tokens < below), 0.0)
        with suppress(ConfigError):  # a plugin's model may have none
            model = dataclasses.replace(model, dropout=dropout)
    return dataclasses.replace(config, max_steps=max_steps, model=model, max_epochs=0.0, dropout_by_size=False)


def settled_line(before: RunConfig, after: RunConfig, data: Mixture) -> str:
    """What `settle` chose, in words; empty if it had nothing to choose."""
    parts = []
    if before.max_epochs:
        epochs = after.batch.tokens_until(after.max_steps) / _pass_tokens(data)
        text = f"{epochs:.3g} epochs are {after.max_steps:,} updates"
        capped = after.max_steps == before.max_steps
        parts.append(f"{text} (max_steps; max_epochs = {before.max_epochs:g} allows more)" if capped else text)
    if before.dropout_by_size:
        parts.append(f"dropout {after.model.dropout:g}")
    return f"{data.n_tokens:,} tokens of training data: {'; '.join(parts)}" if parts else ""


def _pass_tokens(data: Mixture) -> float:
    """Tokens of a run that reads all of the data once; of a mixture, its most repeated part."""
    return min(stream.n_tokens / weight for stream, weight in zip(data.streams, data.weights, strict=True))


def steps_within(batch: BatchConfig, tokens: float) -> int:
    """The most updates that take no more than `tokens`."""
    return bisect_right(range(1, int(tokens) // batch.seq_len + 2), tokens, key=batch.tokens_until)


def repetition_warnings(config: RunConfig, data: Mixture) -> list[str]:
    """A warning for each data set that the run reads more often than is worth it, with what can be done."""
    if config.batch.one_batch:  # repeating is what it is for
        return []
    n_tokens = config.batch.tokens_until(config.max_steps)
    return [
        f"this run reads the {one['tokens']:,} tokens of {one['name']} {one['epochs']:.1f} times. Beyond "
        f"{WORTHWHILE_EPOCHS} times repeated text is worth less and less (arXiv:2305.16264), and a model learns it by "
        f"heart: the validation loss may rise. {_mends(config, n_tokens / one['epochs'], mixed=len(data.shares) > 1)}"
        for one in data.described(n_tokens)
        if one["epochs"] > WORTHWHILE_EPOCHS
    ]


def _mends(config: RunConfig, pass_tokens: float, *, mixed: bool) -> str:
    fewer = max(1, steps_within(config.batch, WORTHWHILE_EPOCHS * pass_tokens))
    mends = [f"train less (--max-steps {fewer} for {WORTHWHILE_EPOCHS} times)", "add text"]
    mends += ["lower its weight"] if mixed else []
    mends += [] if config.model.dropout else ["use dropout (--model.dropout 0.1 or 0.2)"]
    if config.stop_after_worse:
        return f"It stops after {config.stop_after_worse} validations that are worse. To mend it, {_listed(mends)}."
    return f"To mend it, {_listed([*mends, 'stop when it gets worse (--keep-best --stop-after-worse 5)'])}."


def _listed(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} or {items[-1]}"
