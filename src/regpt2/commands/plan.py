"""Plan a run before it starts. In: a recipe and a machine; out: hours, cost, memory, disk, micro-batch on the screen.

regpt2 plan gpt2_124m --machine H100 --gpus 8 --price 2.5
regpt2 plan gpt2_1558m --machine H100 --gpus 64 --scaling
regpt2 plan gpt2_124m --measure
regpt2 plan demo

Exit code 1: the run does not fit into memory or onto the disk.
"""

import json

from regpt2.base.console import say, wrapped
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.config.initial_shape import require_shape
from regpt2.config.recipe_files import defaults_for, recipe_rows
from regpt2.machine.planning.plan import PlanOptions, for_json, make_plan
from regpt2.machine.planning.show import show


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else UsageError.exit_code
    spec, given = arguments[0], arguments[1:]
    if spec.startswith("-"):
        raise UsageError(f"the recipe comes first: regpt2 plan RECIPE {' '.join(arguments)}. {usage()}")
    if any(argument.split("=")[0] == "--nodes" for argument in given):
        raise UsageError("unknown option --nodes; --gpus is the number of GPUs in all nodes: 16 for 2 nodes of 8.")
    default = PlanOptions(config=defaults_for(spec, given))
    options = parse(PlanOptions, given, f"regpt2 plan {spec}", default=default)
    require_shape(default.config, options.config)
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")
    plan = make_plan(spec, options)
    show(plan)
    if options.json is not None:
        write_atomic(options.json, json.dumps(for_json(plan), indent=1) + "\n")
    return 1 if plan.out_of_memory or plan.lacks else 0


def usage() -> str:
    """The text of `regpt2 plan --help`."""
    return wrapped(
        [
            "usage: regpt2 plan RECIPE [--machine NAME] [--gpus N] [--gpus-per-node N] [--network-gbps G] [--scaling] "
            "[--price P] [--measure] [--json FILE] [--data DIR | --mix DIR=WEIGHT ...] [--init MODEL] "
            "[--section.key VALUE ...]",
            "       regpt2 plan RECIPE --help  (every option, with the recipe's values)",
            "",
            "RECIPE is a TOML file of your own, or one of:",
            *recipe_rows(),
        ]
    )
