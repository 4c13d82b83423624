"""Ordered sums: one binary tree, whatever the number of ranks; the same bits for 1, 2 and 4 of them."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rank_processes import spawn
from regpt2.base.device import choose_compute
from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.ordered_sums import PairwiseSum, _buckets
from regpt2.training.ranks.strategy import ParallelConfig, make_trainable
from regpt2.training.step import train_step

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=257, dropout=0.1)
N_MICRO_BATCHES, MICRO_BATCH, STEPS = 8, 2, 6


def tree_sum(leaves: np.ndarray) -> np.float32:
    """The definition: the largest power of two of leaves on the left, the rest on the right."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << (len(leaves) - 1).bit_length() - 1
    return np.float32(tree_sum(leaves[:left]) + tree_sum(leaves[left:]))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_the_sum_is_that_tree(n: int, seed: int) -> None:
    leaves = np.random.default_rng(seed).standard_normal(n).astype(np.float32) * np.float32(10) ** np.arange(n).astype(
        np.float32
    ).clip(0, 6)
    tree = PairwiseSum()
    for leaf in leaves:
        tree.add([torch.tensor(leaf)])
    assert float(tree.total()[0]) == float(tree_sum(leaves))


@settings(max_examples=100, deadline=None)
@given(per_rank=st.sampled_from([1, 2, 4, 8]), n_ranks=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_blocks_of_a_power_of_two_can_be_summed_apart(per_rank: int, n_ranks: int, seed: int) -> None:
    leaves = torch.randn(per_rank * n_ranks, generator=torch.Generator().manual_seed(seed))
    whole, roots = PairwiseSum(), PairwiseSum()
    for leaf in leaves.clone():
        whole.add([leaf.clone()])
    for block in leaves.chunk(n_ranks):
        part = PairwiseSum()
        for leaf in block:
            part.add([leaf.clone()])
        roots.add(part.total())
    assert torch.equal(whole.total()[0], roots.total()[0])


def test_buckets_hold_every_tensor_once_in_order() -> None:
    tensors = [torch.empty(n) for n in (3, 9_000_000, 1, 1, 8_000_000, 2)]
    groups = _buckets(tensors)
    assert [id(t) for group in groups for t in group] == [id(t) for t in tensors]
    assert [len(group) for group in groups] == [1, 1, 4]


def train_a_little(world: World, *, strategy: str) -> tuple[GPT, list[float]]:
    """A few updates on fixed data, dropout on; each rank computes its block of the micro-batches."""
    torch.set_num_threads(1)
    choose_compute("fp32", world.device)  # the same kernels in every process, whatever other tests have set
    model = GPT(CONFIG, seed=3)
    trainable = make_trainable(model, torch.float32, world, ParallelConfig(strategy=strategy), compiled=False)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    n = N_MICRO_BATCHES // world.size
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 257, (N_MICRO_BATCHES, MICRO_BATCH, 17), generator=torch.Generator().manual_seed(step))
        mine = ids[world.rank * n : (world.rank + 1) * n]
        stats = train_step(
            trainable,
            optimizer,
            [(x[:, :-1], x[:, 1:]) for x in mine],
            lr=1e-2,
            grad_clip=1.0,
            world=world,
            ordered=strategy == "ordered",
            before_micro_step=lambda i, step=step: torch.manual_seed(100 * step + world.rank * n + i),
        )
        losses += [float(stats.loss), float(stats.grad_norm)]
    return model, losses


def rank_main(rank: int, size: int, port: int, strategy: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
    model, losses = train_a_little(world, strategy=strategy)
    torch.save((dict(model.state_dict()), losses), f"{out}/{size}-{rank}.pt")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def on_ranks(size: int, port: int, strategy: str, out: str) -> tuple[dict[str, Tensor], list[float]]:
    spawn(rank_main, args=(size, port, strategy, out), nprocs=size)
    results = [torch.load(f"{out}/{size}-{rank}.pt", weights_only=True) for rank in range(size)]
    for state, losses in results[1:]:
        assert losses == results[0][1]
        assert all(torch.equal(state[name], tensor) for name, tensor in results[0][0].items())
    return results[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ordered_ranks_equal_one_rank_bit_for_bit(size: int, tmp_path: object, unused_port: int) -> None:
    alone = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    model, losses = train_a_little(alone, strategy="ordered")
    state, their_losses = on_ranks(size, unused_port, "ordered", str(tmp_path))
    assert their_losses == losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_without_the_order_four_ranks_differ_from_one_in_some_bits(tmp_path: object, unused_port: int) -> None:
    """Or the test above would prove nothing."""
    alone = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    model, losses = train_a_little(alone, strategy="ddp")
    state, their_losses = on_ranks(4, unused_port, "ddp", str(tmp_path))
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert their_losses == pytest.approx(losses, abs=1e-3)


def test_what_cannot_be_ordered_is_refused() -> None:
    ordered = ParallelConfig(strategy="ordered")
    ordered.check(world_size=1, grad_accum_steps=6)
    ordered.check(world_size=3, grad_accum_steps=4)
    with pytest.raises(ConfigError, match=r"needs 1, 2, 4, 8, \.\.\. micro-steps per rank, not 6"):
        ordered.check(world_size=2, grad_accum_steps=6)
    with pytest.raises(ConfigError, match="reduce_dtype must be 'fp32'"):
        ParallelConfig(strategy="ordered", reduce_dtype="bf16")
