"""Gradients summed in one fixed order. In: the gradient of each micro-batch; out: their mean, the same bits for any W.

Floating-point sums depend on their order. Here the micro-batches of an update are the leaves of one binary tree,
((0 + 1) + (2 + 3)) + ..., whatever the number of ranks W: a rank sums the subtree of its own micro-batches, which lie
side by side, and the roots of those are then summed by every rank in the same way. It costs log2(micro-steps) more
gradients in memory, W gradients of traffic, and nothing of the exchange is hidden behind the backward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regpt2.base.ranks.world import World

BUCKET_NUMEL = 1 << 23  # elements exchanged at a time: 32 MB in fp32, times the number of ranks


class PairwiseSum:
    """Sums lists of tensors, given one after the other, as a binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + 6)."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, list[Tensor]]] = []  # (leaves, their sum), ever smaller: a binary counter

    def add(self, tensors: list[Tensor]) -> None:
        """The next leaf. Its tensors are kept, and changed."""
        leaves = 1
        while self._waiting and self._waiting[-1][0] == leaves:
            _, before = self._waiting.pop()
            torch._foreach_add_(before, tensors)
            tensors, leaves = before, 2 * leaves
        self._waiting.append((leaves, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all leaves."""
        _, total = self._waiting.pop()
        while self._waiting:
            _, before = self._waiting.pop()
            torch._foreach_add_(before, total)
            total = before
        return total


def sum_over_ranks(tensors: Sequence[Tensor], world: World) -> None:
    """Replace each tensor by its sum over the ranks, as a binary tree over the ranks; contiguous, of one type."""
    if world.size == 1:
        return
    for group in _buckets(tensors):
        rows = world.stack(torch.cat([t.flatten() for t in group]))  # (W, n)
        tree = PairwiseSum()
        for row in rows:
            tree.add([row])
        (flat,) = tree.total()
        for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of about BUCKET_NUMEL elements."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.numel() > room:
            groups.append([])
            room = BUCKET_NUMEL
        groups[-1].append(tensor)
        room -= tensor.numel()
    return groups
