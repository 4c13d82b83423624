"""Weights over ranks: every flipped bit is seen, and the rank and the tensor are named."""

import random

import pytest
import torch

from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.replicas import check_replicas, weight_sums

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=17)
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


class Three(World):
    """Three ranks in one process: `others` are what the other two would send."""

    others: list[torch.Tensor]

    def stack(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value, *self.others])


def three(others: list[torch.Tensor]) -> World:
    world = Three(rank=0, local_rank=0, size=3, device=torch.device("cpu"))
    object.__setattr__(world, "others", others)
    return world


def flip(model: GPT, rng: random.Random) -> str:
    name, p = rng.choice(list(model.named_parameters()))
    bits = p.data.view(torch.int32).view(-1)
    bit = rng.randrange(32)
    bits[rng.randrange(len(bits))] ^= -(2**31) if bit == 31 else 1 << bit
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sums_are_those_of_the_bits(dtype: torch.dtype) -> None:
    model = GPT(CONFIG, seed=1).to(dtype)
    sums = weight_sums(model).tolist()
    for p, got in zip(model.parameters(), sums, strict=True):
        data = p.detach().contiguous().view(torch.uint8).numpy().tobytes()
        size = p.element_size()
        words = [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]
        assert got % 2**64 == sum(words) % 2**64


def test_every_flipped_bit_is_seen_and_named() -> None:
    rng = random.Random(0)
    right = weight_sums(GPT(CONFIG, seed=1))
    for _ in range(200):
        model = GPT(CONFIG, seed=1)
        name = flip(model, rng)
        with pytest.raises(Problem, match=rf"step 7: the weights of rank\(s\) 0 differ .* first in {name}"):
            check_replicas(model, three([right, right]), 7)
        with pytest.raises(Problem, match=rf"the weights of rank\(s\) 2 differ .* first in {name}"):
            check_replicas(GPT(CONFIG, seed=1), three([right, weight_sums(model)]), 7)


def test_equal_weights_and_one_rank_alone_are_fine() -> None:
    model = GPT(CONFIG, seed=1)
    check_replicas(model, ALONE, 1)
    check_replicas(model, three([weight_sums(model)] * 2), 1)
