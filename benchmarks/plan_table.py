"""What the two recipes of 124M cost on each card, by `regpt2 plan`. In: the prices below; out: README.md's table.

    python benchmarks/plan_table.py            # print the table
    python benchmarks/plan_table.py --write    # put it into README.md

Nothing of it is measured: each row is what this command says, with the micro-batch that it calls the best:

    regpt2 plan gpt2_124m --machine 4090 --gpus 1 --price 0.34
"""

import argparse
from dataclasses import replace
from pathlib import Path

from regpt2.base.console import duration
from regpt2.config.recipe_files import defaults_for
from regpt2.machine.planning.micro_batch import best
from regpt2.machine.planning.plan import PlanOptions, RunPlan, make_plan
from tables import line, rewrite

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by benchmarks/plan_table.py: begin -->", "<!-- made by benchmarks/plan_table.py: end -->"
RECIPES = ("gpt2_124m", "modern_124m")
# Name, GPUs, dollars for an hour of one. Prices: RunPod's cheapest list prices in March 2026, as quoted by
# deploybase.ai/articles/runpod-gpu-pricing (A100 and H100: SXM). They move; --price takes yours.
CARDS = (
    ("3090", 1, 0.22),
    ("4090", 1, 0.34),
    ("5090", 1, 0.69),
    ("L40S", 1, 0.79),
    ("A100-80", 1, 1.39),
    ("H100", 1, 2.69),
    ("H200", 1, 3.59),
    ("H100", 8, 2.69),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md instead of printing it")
    if parser.parse_args().write:
        rewrite(README, BEGIN, END, table())
    else:
        print(table())


def table() -> str:
    """A row for each card."""
    heads = ["card", "$ an hour", *(f"`{recipe}`: time, money, memory (micro-batch)" for recipe in RECIPES)]
    return "\n".join([line(heads), line(["---"] * len(heads)), *(line(row(*card)) for card in CARDS)])


def row(machine: str, gpus: int, price: float) -> list[str]:
    """What one card, or several, would take."""
    plans = [planned(recipe, machine, gpus, price) for recipe in RECIPES]
    return [plans[0].target.name, f"{price:.2f}", *map(cell, plans)]


def cell(plan: RunPlan) -> str:
    """Time, money and the memory of each GPU."""
    money = plan.hours * plan.target.ranks * (plan.price or 0)
    memory = f"{sum(plan.memory.values()) / 1e9:.0f} GB ({plan.setup.micro_batch})"
    return f"{duration(3600 * plan.hours)}, ${money:,.0f}, {memory}"


def planned(recipe: str, machine: str, gpus: int, price: float) -> RunPlan:
    """The plan with the micro-batch that the plan calls the best, as if no data were prepared here."""
    config = replace(defaults_for(recipe, []), data="")
    options = PlanOptions(machine=machine, gpus=gpus, price=price, config=config)
    plan = make_plan(recipe, options)
    chosen = best(plan.choices, plan.setup)
    assert chosen is not None, f"{recipe} does not fit into {machine}"
    batch = replace(config.batch, micro_batch=chosen.setup.micro_batch)
    return make_plan(recipe, replace(options, config=replace(config, batch=batch)))


if __name__ == "__main__":
    main()
