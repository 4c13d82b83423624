"""Are the weights the same on every rank? In: each rank's weights; out: nothing, or a problem naming rank and tensor.

Ranks start equal and make equal updates. If they drift apart, something has flipped a bit, lost an exchange or computed
wrongly on one of them, and the loss does not show it.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.training.ranks.strategy import is_sharded


@torch.no_grad()
def weight_sums(model: nn.Module, averages: Mapping[str, Tensor] | None = None) -> Tensor:
    """For each parameter, then for each average, the sum of its bits read as integers, modulo 2**64.

    One flipped bit always changes it.
    """
    held = [*model.parameters(), *(averages or {}).values()]
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack([p.view(as_integers[p.element_size()]).sum(dtype=torch.int64) for p in held])


def check_replicas(model: nn.Module, world: World, step: int, averages: Mapping[str, Tensor] | None = None) -> None:
    """Compare the weights of all ranks, and their averages if there are any (training/ranks/weight_average.py).

    Where weights lie in shards there is nothing to compare.

    Raises:
        Problem: they differ; it names the first parameter and the ranks in the minority, on every rank.
    """
    if world.size == 1 or is_sharded(model):
        return
    rows = world.stack(weight_sums(model, averages)).cpu()  # (W, number of parameters)
    (common, _), *others = Counter(tuple(row) for row in rows.tolist()).most_common()
    if not others:
        return
    right = torch.tensor(common)
    apart = [rank for rank, row in enumerate(rows) if not torch.equal(row, right)]
    first = int((rows[apart[0]] != right).nonzero()[0])
    names = [*(name for name, _ in model.named_parameters()), *(f"the average of {name}" for name in averages or {})]
    raise Problem(
        f"step {step}: the weights of rank(s) {', '.join(map(str, apart))} differ from the other ranks', first in "
        f"{names[first]}: a fault of memory, network or hardware on one of them. Nothing was saved since the last "
        "comparison; run the same command again to resume from the checkpoint before. If it happens again, do not use "
        "that machine."
    )
