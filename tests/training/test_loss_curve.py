"""A hundred updates on the fast path (blocks, recomputed GELU, fused loss and AdamW) beside the plainest in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from regpt2.base.ranks.world import World
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels import attention, recompute
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=257)
BATCH = BatchConfig(batch_tokens=256, micro_batch=4, seq_len=64)
STEPS, LR, GRAD_CLIP = 100, 6e-4, 1.0
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def pairs(tiny_data: Path) -> Pairs:
    with open_tokens(tiny_data, "train") as tokens:
        loader = Loader(tokens, BATCH, seed=1)
        micro_batches = [loader.batch(step).micro_batches[0] for step in range(1, STEPS + 1)]
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in micro_batches]


def fast_curve(dtype: torch.dtype, pairs: Pairs) -> list[float]:
    model = GPT(CONFIG, seed=3)
    trainable = make_trainable(model, dtype, ALONE, compiled=False)
    optimizer = build_optimizer(model, OptimConfig(lr=LR))
    return [
        float(train_step(trainable, optimizer, [pair], lr=LR, grad_clip=GRAD_CLIP, world=ALONE).loss) for pair in pairs
    ]


@pytest.fixture(scope="module")
def expected(pairs: Pairs) -> list[float]:
    """transformers' model with its softmax over whole rows, F.cross_entropy over whole logits, AdamW as a loop."""
    ours = GPT(CONFIG, seed=3)
    sizes = {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "n_embd": CONFIG.n_embd, "vocab_size": 257}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    unused: Any = {"bos_token_id": None, "eos_token_id": None}
    shape = GPT2Config(n_positions=64, attn_implementation="eager", **sizes, **no_dropout, **unused)
    model: Any = GPT2LMHeadModel(shape).float()
    with torch.no_grad():
        for (name, p), (_, q) in zip(model.transformer.named_parameters(), ours.named_parameters(), strict=True):
            p.copy_(q.T if p.dim() == 2 and name.startswith("h.") else q[: len(p)])  # its linear layers are transposed
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    losses = []
    for x, y in pairs:
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.seconds
# Sums in another order; the 8 bits of bf16 in every activation, which a mean over 256 tokens does not all cancel.
@pytest.mark.parametrize(("dtype", "largest", "mean"), [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 2e-3, 5e-4)])
def test_the_loss_curve_is_that_of_plain_fp32(
    dtype: torch.dtype,
    largest: float,
    mean: float,
    expected: list[float],
    pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(recompute, "_WORTH", 1)
    apart = [abs(a - b) for a, b in zip(fast_curve(dtype, pairs), expected, strict=True)]
    assert expected[0] - expected[-1] > 2.0, "nothing was learned"
    assert max(apart) < largest
    assert sum(apart) / len(apart) < mean
