"""Start or resume a training run. In: a recipe and options; out: a run folder (see run/loop.py).

regpt2 train demo
regpt2 train gpt2_124m --run runs/mine --max-steps 1000
regpt2 train gpt2_124m --run runs/mine --init hf:gpt2 --data data/mine
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regpt2.base.console import say, wrapped
from regpt2.base.device import is_out_of_memory, undetermined_operation
from regpt2.base.errors import Problem, UsageError
from regpt2.base.options import parse
from regpt2.config.initial_shape import require_shape
from regpt2.config.recipe_files import defaults_for, find_recipe, recipe_head, recipe_rows
from regpt2.config.run import RunConfig
from regpt2.run.loop import train


def main(arguments: list[str]) -> int:
    """`regpt2 train RECIPE [options]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else UsageError.exit_code
    spec, options = arguments[0], arguments[1:]
    if spec.startswith("-"):
        raise UsageError(f"the recipe comes first: regpt2 train RECIPE {' '.join(arguments)}. {usage()}")
    # `--data DIR` and the like are fields of RunConfig: one parser, and help that shows the recipe's own values.
    default = defaults_for(spec, options)
    config = parse(
        RunConfig,
        options,
        f"regpt2 train {spec}",
        about=recipe_head(find_recipe(spec)),
        default=default,
    )
    require_shape(default, config)
    with failures_named(config):
        return train(config).exit_code


@contextmanager
def failures_named(config: RunConfig) -> Iterator[None]:
    """What torch raises for want of memory, or of a deterministic kernel, as a Problem that names the way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if operation := undetermined_operation(error):
            raise Problem(
                f"{operation} has no deterministic form on this device in torch {torch.__version__}; train without "
                "--deterministic (and without --parallel.strategy ordered), or with another torch."
            ) from error
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise Problem(
            f"out of memory with micro_batch = {config.batch.micro_batch} x seq_len = {config.batch.seq_len} ({said}); "
            "lower --batch.micro-batch: the update stays the same."
        ) from error


def usage() -> str:
    """What `regpt2 train --help` prints: the recipes."""
    return wrapped(
        [
            "usage: regpt2 train RECIPE [--run DIR] [--data DIR | --mix DIR=WEIGHT ...] [--init MODEL] "
            "[--max-steps N] [--seed N] [--resume auto|never|must] [--save-every N] "
            "[--eval-every N] [--sample-every N] [--section.key VALUE ...]",
            "       regpt2 train RECIPE --help  (every option, with the recipe's values)",
            "       torchrun --standalone --nproc-per-node 8 -m regpt2 -- train RECIPE",
            "",
            "RECIPE is a TOML file of your own, or one of:",
            *recipe_rows(),
        ]
    )
