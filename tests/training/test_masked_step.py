"""Targets that do not count: the update is that of one mean over all that count, on any micro-batches and ranks."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rank_processes import spawn
from regpt2.base.device import choose_compute
from regpt2.base.ranks.world import World
from regpt2.data.loader import Counted
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.guard import Guard, GuardConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import ParallelConfig, make_trainable, whole
from regpt2.training.step import LossScale, StepStats, train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=57)
COUNTS = (3, 0, 16, 1)  # targets that count in each of four micro-batches of 2 x 8
STRATEGIES = ("ddp", "fsdp", "ordered")
Pair = tuple[Tensor, Tensor]


def micro_batches() -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for count in COUNTS:
        ids = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=generator)
        ignored = torch.randperm(16, generator=generator)[count:]
        targets = ids[:, 1:].flatten().index_fill(0, ignored, -100).view(2, 8)
        pairs.append((ids[:, :-1], targets))
    return pairs


def gradients_of_step(
    world: World, strategy: str = "ddp", pairs: list[Pair] | None = None, scale: LossScale | None = None
) -> tuple[dict[str, Tensor], StepStats]:
    """The gradients that the optimizer sees, taken by one that only looks."""
    model = GPT(CONFIG, seed=3)
    trainable = make_trainable(model, torch.float32, world, ParallelConfig(strategy=strategy), compiled=False)  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}

    class Looking(torch.optim.Optimizer):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            seen.update({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})

    everything = micro_batches() if pairs is None else pairs
    n = len(everything) // world.size
    mine = everything[world.rank * n : (world.rank + 1) * n]
    of = [int((targets >= 0).sum()) for _, targets in everything]
    weights = Counted(tuple(of[world.rank * n : (world.rank + 1) * n]), sum(of)).weights
    stats = train_step(
        trainable,
        Looking(model.parameters(), {}),
        mine,
        lr=0.0,
        grad_clip=0.0,
        world=world,
        ordered=strategy == "ordered",
        weights=weights,
        scale=scale,
    )
    return seen, stats


def plain() -> tuple[dict[str, Tensor], float]:
    """One cross entropy of torch's over the whole logits of all micro-batches, without any code of the step."""
    model = GPT(CONFIG, seed=3)
    inputs, targets = (torch.cat(each) for each in zip(*micro_batches(), strict=True))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "ordered"])
@pytest.mark.parametrize("scale", [None, LossScale(factor=1024.0)])
def test_micro_batches_of_unequal_counts_give_the_mean_over_all_that_count(
    strategy: str, scale: LossScale | None
) -> None:
    gradients, stats = gradients_of_step(ALONE, strategy, scale=scale)
    expected, loss = plain()
    assert_close(gradients, expected)
    assert float(stats.loss) == pytest.approx(loss, rel=1e-5)


def rank_main(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
    choose_compute("fp32", world.device)  # the same kernels in every process
    found = {}
    for strategy in STRATEGIES:
        gradients, stats = gradients_of_step(world, strategy)
        found[strategy] = gradients, stats.loss
    torch.save(found, f"{out}/{rank}.pt")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_two_ranks_of_unequal_counts_give_the_same(tmp_path: object, unused_port: int) -> None:
    """The first has 3 and none, the second 16 and 1."""
    spawn(rank_main, args=(2, unused_port, str(tmp_path)), nprocs=2)
    expected, loss = plain()
    ranks = [torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in range(2)]
    for strategy in STRATEGIES:
        for of_rank in ranks:
            gradients, its_loss = of_rank[strategy]
            assert_close(gradients, expected)
            assert float(its_loss) == pytest.approx(loss, rel=1e-5), strategy
    torch.set_num_threads(1)
    choose_compute("fp32", ALONE.device)
    alone, stats = gradients_of_step(ALONE, "ordered")
    for gradients, its_loss in (of_rank["ordered"] for of_rank in ranks):
        assert torch.equal(its_loss, stats.loss)
        assert all(torch.equal(gradients[name], alone[name]) for name in alone)


def test_a_token_that_does_not_count_has_no_gradient() -> None:
    """A change of ignored targets changes nothing; the logits there have no gradient."""
    model = GPT(CONFIG, seed=3)
    inputs, targets = micro_batches()[0]
    hidden = model.hidden(inputs)
    hidden.retain_grad()
    before = model.hidden
    model.hidden = lambda ids, dtype=None: hidden  # type: ignore[method-assign,misc,assignment]
    model(inputs, targets).backward()
    model.hidden = before  # type: ignore[method-assign]
    assert hidden.grad is not None
    norms = hidden.grad.norm(dim=2)
    assert torch.equal(norms > 0, targets >= 0)


def test_an_update_without_a_target_that_counts_is_made_without_a_gradient() -> None:
    pairs = [(x, torch.full_like(y, -100)) for x, y in micro_batches()]
    gradients, stats = gradients_of_step(ALONE, pairs=pairs)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())
    assert (float(stats.loss), float(stats.grad_norm), float(stats.accepted)) == (0.0, 0.0, 1.0)
    model = GPT(CONFIG, seed=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.0))
    train_step(model, optimizer, pairs, lr=1e-2, grad_clip=1.0, world=ALONE, weights=[0.0] * 4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    guard = Guard(GuardConfig(window=4))
    assert guard.observe(1, 0.0, 0.0, accepted=True, spike_limit=3.0) == []
