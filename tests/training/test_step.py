"""The update: the same gradient however it is cut into micro-steps and ranks; skipped whole when it is not finite."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rank_processes import spawn
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels import recompute
from regpt2.model.kernels.loss import reference_cross_entropy
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import InComputeType, ParallelConfig, make_trainable, whole
from regpt2.training.step import LossScale, StepStats, train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=57)
B, T = 8, 8


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, CONFIG.vocab_size, (B, T + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def gradients_of_step(
    dtype: torch.dtype,
    n_micro_steps: int,
    world: World = ALONE,
    rows: slice = slice(None),
    parallel: ParallelConfig | None = None,
) -> tuple[dict[str, Tensor], StepStats]:
    """The gradients that the optimizer sees, taken by one that only looks."""
    model = GPT(CONFIG, seed=3).to(dtype)
    trainable = make_trainable(model, dtype, world, parallel, compiled=False)
    seen: dict[str, Tensor] = {}

    class Looking(torch.optim.Optimizer):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            seen.update({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})

    x, y = (z[rows] for z in batch())
    micro = list(zip(x.chunk(n_micro_steps), y.chunk(n_micro_steps), strict=True))
    ordered = parallel is not None and parallel.strategy == "ordered"
    optimizer = Looking(model.parameters(), {})
    return seen, train_step(trainable, optimizer, micro, lr=0.0, grad_clip=0.0, world=world, ordered=ordered)


def plain_gradients(dtype: torch.dtype) -> dict[str, Tensor]:
    """One big batch through the whole logits, without any code of the step."""
    model = GPT(CONFIG, seed=3).to(dtype)
    x, y = batch()
    reference_cross_entropy(model.hidden(x).flatten(0, 1), model.wte.weight, y.flatten(), CONFIG.vocab_size).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two whole gradients, relative to the norm of the second."""
    assert a.keys() == b.keys()
    whole_a, whole_b = (torch.cat([g[name].double().flatten() for name in b]) for g in (a, b))
    return float((whole_a - whole_b).norm() / whole_b.norm())


def rank_main(
    rank: int, world_size: int, port: int, dtype: torch.dtype, n_micro_steps: int, parallel: ParallelConfig, out: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    world = World(rank=rank, local_rank=rank, size=world_size, device=torch.device("cpu"))
    recompute._WORTH = 1  # as for a large model: GELU is computed again in the backward pass
    rows = slice(rank * B // world_size, (rank + 1) * B // world_size)
    gradients, stats = gradients_of_step(dtype, n_micro_steps, world, rows, parallel)
    torch.save((gradients, float(stats.loss), float(stats.grad_norm)), f"{out}/{rank}.pt")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


# Sums in another order differ by a few units in the last place: 2**-53 = 1.1e-16 and 2**-24 = 6e-8 of their size.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n_micro_steps", [1, 2, 4, 8])
def test_micro_steps_give_the_gradient_of_one_big_batch(dtype: torch.dtype, n_micro_steps: int) -> None:
    gradients, stats = gradients_of_step(dtype, n_micro_steps)
    expected = plain_gradients(dtype)
    assert difference(gradients, expected) < TOLERANCE[dtype]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert float(stats.grad_norm) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "strategy", "reduce_dtype"),
    [
        (torch.float64, "ddp", "fp32"),
        (torch.float32, "ddp", "fp32"),
        (torch.float32, "ddp", "bf16"),
        (torch.float32, "fsdp", "fp32"),
        (torch.float32, "fsdp", "bf16"),
        (torch.float64, "ordered", "fp32"),
    ],
)
def test_two_ranks_with_two_micro_steps_give_the_gradient_of_one_big_batch(
    dtype: torch.dtype, strategy: str, reduce_dtype: str, tmp_path: object, unused_port: int
) -> None:
    parallel = ParallelConfig(strategy=strategy, reduce_dtype=reduce_dtype)  # type: ignore[arg-type]
    spawn(rank_main, args=(2, unused_port, dtype, 2, parallel, str(tmp_path)), nprocs=2)
    expected = plain_gradients(dtype)
    alone, stats = gradients_of_step(dtype, 4)
    if reduce_dtype == "bf16":  # 8 bits of each number; and the norm is that of the rounded gradient
        tolerance, norm_tolerance = 2**-8, 2**-8
    else:
        tolerance, norm_tolerance = TOLERANCE[dtype], 1e-5
    for rank in range(2):
        gradients, loss, norm = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        assert difference(gradients, expected) < tolerance
        assert difference(gradients, alone) < tolerance
        assert (difference(gradients, alone) > 1e-6) == (reduce_dtype == "bf16")
        assert loss == pytest.approx(float(stats.loss), rel=1e-6)
        assert norm == pytest.approx(float(stats.grad_norm), rel=norm_tolerance)


def test_a_mean_of_means_over_unequal_parts_would_be_caught() -> None:
    """The planted bug: unequal micro-batches, each averaged by itself, do not give the gradient of the batch."""
    model = GPT(CONFIG, seed=3).double()
    x, y = batch()
    for rows in (slice(0, 6), slice(6, 8)):
        (model(x[rows], y[rows]) / 2).backward()
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert difference(wrong, plain_gradients(torch.float64)) > 1e-3


def run_steps(n: int, *, config: OptimConfig, grad_clip: float, poison_at: int = -1) -> tuple[GPT, list[StepStats]]:
    model = GPT(CONFIG, seed=3)
    optimizer = build_optimizer(model, config)
    x, y = batch()
    stats = []
    for step in range(n):
        if step == poison_at:
            handle = model.ln_f.register_forward_hook(lambda *_: _[2] * float("nan"))
        stats.append(train_step(model, optimizer, [(x, y)], lr=config.lr, grad_clip=grad_clip, world=ALONE))
        if step == poison_at:
            handle.remove()
    return model, stats


def test_adamw_steps_equal_a_scalar_adamw_in_numpy() -> None:
    """Twenty updates, clipping and decay groups included, against the textbook written out."""
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    model, stats = run_steps(20, config=config, grad_clip=0.5)
    reference = GPT(CONFIG, seed=3).double()
    m = {name: np.zeros(p.shape) for name, p in reference.named_parameters()}
    v = {name: np.zeros(p.shape) for name, p in reference.named_parameters()}
    x, y = batch()
    for t in range(1, 21):
        reference.zero_grad()
        hidden = reference.hidden(x).flatten(0, 1)
        reference_cross_entropy(hidden, reference.wte.weight, y.flatten(), CONFIG.vocab_size).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
        assert float(stats[t - 1].grad_norm) == pytest.approx(norm, rel=1e-4)
        for name, p in reference.named_parameters():
            w, g = p.detach().numpy(), p.grad.numpy() * min(1.0, 0.5 / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            if w.ndim >= 2:
                w *= 1 - config.lr * 0.1
            w -= config.lr * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # Adam divides by the root of the second moment: entries with tiny gradients amplify fp32 rounding, hence 2e-4.
        assert torch.allclose(p.double(), q, atol=2e-4), name


@pytest.mark.parametrize("at", [0, 5])
def test_a_step_that_is_not_finite_is_skipped_whole_and_the_next_is_made(at: int) -> None:
    config = OptimConfig(lr=1e-2)
    poisoned, stats = run_steps(at + 4, config=config, grad_clip=1.0, poison_at=at)
    clean, _ = run_steps(at + 3, config=config, grad_clip=1.0)
    assert [int(s.accepted) for s in stats] == [1] * at + [0] + [1] * 3
    for (name, p), (_, q) in zip(poisoned.named_parameters(), clean.named_parameters(), strict=True):
        assert torch.equal(p, q), f"{name}: a skipped step left a trace"


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_above_the_limit_is_skipped_if_spikes_are(skip: bool) -> None:
    model, scale = GPT(CONFIG, seed=3), LossScale(factor=64.0, good_steps=7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    stats = train_step(
        model,
        build_optimizer(model, OptimConfig()),
        [batch()],
        lr=1e-2,
        grad_clip=1.0,
        world=ALONE,
        scale=scale,
        spike_limit=torch.tensor(1.0),
        skip_spikes=skip,
    )
    assert float(stats.accepted) == 1.0 - skip
    assert all(torch.equal(p, before[name]) == skip for name, p in model.named_parameters())
    assert float(stats.spike_limit) == 1.0
    assert scale == LossScale(factor=64.0, good_steps=8), "its gradient was finite: a good step of the loss scale"


@pytest.mark.parametrize("config", [OptimConfig(), OptimConfig(embedding_lr=0.3), OptimConfig(name="muon")], ids=str)
def test_the_rate_that_it_tells_is_the_one_that_the_optimizer_used(config: OptimConfig) -> None:
    model = GPT(CONFIG, seed=3)
    optimizer, used = build_optimizer(model, config), list[dict[float, float]]()
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append({group["lr_ratio"]: group["lr"] for group in optimizer.param_groups})
    )
    told = [
        train_step(model, optimizer, [batch()], lr=lr, grad_clip=1.0, world=ALONE).lr for lr in (1e-3, 7e-4, 3.3e-5)
    ]
    assert told == [rates[1.0] for rates in used] == [1e-3, 7e-4, 3.3e-5]


def test_the_logged_loss_is_the_mean_over_micro_steps() -> None:
    _, one = gradients_of_step(torch.float64, 1)
    _, four = gradients_of_step(torch.float64, 4)
    assert float(one.loss) == pytest.approx(float(four.loss), rel=1e-7)
    assert float(one.loss) == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1)


def test_a_scaled_loss_gives_the_same_update() -> None:
    weights = []
    for scale in (None, LossScale(factor=1024.0)):
        model = GPT(CONFIG, seed=3)
        optimizer = build_optimizer(model, OptimConfig())
        train_step(model, optimizer, [batch()], lr=1e-2, grad_clip=1.0, world=ALONE, scale=scale)
        weights.append(model.wte.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-6)


def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_2000_good_steps() -> None:
    scale = LossScale(factor=64.0)
    scale.update(False)
    assert scale.factor == 32.0
    for _ in range(2000):
        scale.update(True)
    assert scale.factor == 64.0


def test_in_bf16_the_gradients_are_those_of_fp32_within_its_rounding() -> None:
    model, x, y = GPT(CONFIG, seed=3), *batch()
    InComputeType(model, torch.bfloat16)(x, y).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = plain_gradients(torch.float32)
    assert all(g.dtype == torch.float32 for g in got.values())
    # bf16 keeps 8 bits: 2**-8 a rounding, and some dozen of them in a row, most of which cancel
    assert difference(got, expected) < 0.03


def overlap_main(rank: int, port: int, out: str) -> None:
    """Note in which order blocks end their backward pass and buckets of gradients become ready."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=128, block_size=8, vocab_size=57))
    trainable = torch.nn.parallel.DistributedDataParallel(InComputeType(model, torch.bfloat16), bucket_cap_mb=0.5)
    order: list[str] = []

    def note_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        order.append("bucket")
        ready: torch.futures.Future[Tensor] = torch.futures.Future()
        ready.set_result(bucket.buffer())
        return ready

    trainable.register_comm_hook(None, note_bucket)
    for i, block in enumerate(model.h):
        block.register_full_backward_hook(lambda *_, i=i: order.append(f"h{i}"))
    for _ in range(2):  # the first pass only finds the order of the buckets
        order.clear()
        trainable(*batch()).backward()
    if rank == 0:
        with open(f"{out}/order.txt", "w") as file:
            file.write(" ".join(order))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_in_bf16_gradients_are_ready_while_the_backward_pass_goes_on(tmp_path: Path, unused_port: int) -> None:
    """Or the ranks' exchange of gradients could not hide behind the computation."""
    spawn(overlap_main, args=(unused_port, str(tmp_path)), nprocs=2)
    order = (tmp_path / "order.txt").read_text().split()
    assert "bucket" in order[: order.index("h0")], order


def test_training_in_bf16_moves_every_weight_and_keeps_masters_in_fp32() -> None:
    model = GPT(CONFIG, seed=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = make_trainable(model, torch.bfloat16, ALONE, compiled=False)
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(5):
        train_step(trainable, optimizer, [batch()], lr=1e-4, grad_clip=1.0, world=ALONE)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert not torch.equal(p, before[name]), f"{name} never moved"
    assert all(s.dtype == torch.float32 for state in optimizer.state.values() for s in state.values())
