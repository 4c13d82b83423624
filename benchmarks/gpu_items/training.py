"""A short real run: `regpt2 train RECIPE --data DIR` for the available time; its report and its losses.

It makes as many updates as fit by the headline's speed. The weights are deleted, the record and the report kept.
"""

from gpu_items import Check
from gpu_items._real_run import require_training, train_for


def run(check: Check) -> None:
    require_training(check)
    train_for(check, check.recipe, check.left_s, "training")
