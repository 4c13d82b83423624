"""Is everything ready for a run? In: a recipe, folders; out: a line for each check, ok, warn or FAIL; 1 if any failed.

    regpt2 doctor gpt2_124m --data data/fineweb_edu_10B
    torchrun --standalone --nproc-per-node 8 -m regpt2 -- doctor gpt2_124m

Under torchrun every rank checks its own device, one rank of each machine its disks, and rank 0 prints for all.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.device import pick_device
from regpt2.base.errors import Problem, UsageError
from regpt2.base.options import parse
from regpt2.base.ranks.world import start_world
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.machine.health.examine import conclude, examine, show
from regpt2.machine.health.patient import CheckResult


@dataclass(frozen=True)
class DoctorOptions:
    """Check whether this machine, its disks and the data are ready for a run, and how fast they are."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]")] = ""
    """The recipe to check for; default: GPT-2 124M, without data."""
    data: Path | None = None
    """The prepared data folder; default: the recipe's."""
    run: Path | None = None
    """The run folder, which need not exist; default: the recipe's, else runs/."""
    device: str = ""
    """auto, cpu, cuda, cuda:1 or mps; default: the recipe's."""
    json: Path | None = None
    """Also write the results to this JSON file."""
    quick: bool = False
    """Skip timings and hashes, and check only the precision of the run."""


def main(arguments: list[str]) -> int:
    options = parse(DoctorOptions, arguments, "regpt2 doctor")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")
    config = load_recipe(options.recipe) if options.recipe else RunConfig(run="runs")
    config = dataclasses.replace(
        config,
        data=str(options.data) if options.data else config.data,
        mix=() if options.data else config.mix,
        run=str(options.run) if options.run else config.run,
        device=options.device or config.device,
    )
    device, began_at = pick_device(config.device), time.monotonic()
    try:
        with start_world(device, timeout_s=300) as world:
            found = examine(config, world, of_recipe=bool(options.recipe), quick=options.quick)
    except (Problem, RuntimeError) as error:  # the ranks cannot connect, exchange wrong values, or lose one of them
        show("ranks", CheckResult("FAIL", str(error)))
        return 1
    if world.is_main:
        conclude(found, time.monotonic() - began_at, options.json)
    return int(any(row["status"] == "FAIL" for row in found))
