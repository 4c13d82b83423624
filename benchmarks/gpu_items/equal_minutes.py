"""GPT-2 and the modern recipes for equal minutes on the same data: losses, tokens/s, MFU, and a report of each.

The data are in GPT-2's tokens, with more than 65,536 of them for validation. Of `modern_124m_long` the figure beside
the others' `loss` is `loss_1024`.
"""

from pathlib import Path

from gpu_items import Check
from gpu_items._real_run import require_training, train_for

RECIPES = ("modern_124m", "modern_124m_long", "gpt2_124m")


def run(check: Check) -> None:
    require_training(check)
    recipes = (check.recipe,) if check.smoke else RECIPES
    for done, recipe in enumerate(recipes):
        train_for(check, recipe, check.left_s / (len(recipes) - done), f"equal_minutes-{Path(recipe).stem}")
