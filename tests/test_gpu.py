"""On a GPU (`make gpu-check`): the same mathematics as on the CPU, compiled or not; exact resume; sampling; memory."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from regpt2.base import shelves
from regpt2.base.device import be_deterministic, can_compile
from regpt2.base.ranks.world import World
from regpt2.config.recipe_files import load_recipe
from regpt2.machine.speed.rates import attention_kernel
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.loss import IGNORED, gpu_kernel, linear_cross_entropy, reference_cross_entropy
from regpt2.model.modern import ModernConfig
from regpt2.sampling.generate import generate
from regpt2.training.guard import Guard, GuardConfig
from regpt2.training.host_copy import HostCopies
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step

DEVICE = os.environ.get("REGPT2_TEST_DEVICE", "cuda")
"""A CPU only to see that the tests themselves work (`python benchmarks/gpu_check.py --smoke`)."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]

SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=50257)
MODERN = ModernConfig(n_layer=4, n_head=2, n_embd=256, block_size=256, zero_init=False, document_mask=True)


@pytest.fixture(autouse=True)
def compiler_forgets() -> None:
    """After eight models in one process the compiler would leave the rest uncompiled; after two it guesses shapes."""
    torch.compiler.reset()


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, SHAPE.vocab_size, (4, 257), generator=torch.Generator().manual_seed(0)).to(device)
    for row, n_tokens in enumerate((300, 100, 33, 7)):  # of a document; the last id ends one and begins the next
        ids[row, ::n_tokens] = SHAPE.vocab_size - 1
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(
    shape: GPTConfig, device: str, dtype: torch.dtype, *, compiled: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    torch.set_float32_matmul_precision("highest")
    world = World(rank=0, local_rank=0, size=1, device=torch.device(device))
    model = build_model(shape, seed=1).to(device)
    loss = make_trainable(model, dtype, world, compiled=compiled)(*batch(device))
    loss.backward()
    return loss.item(), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


# fp32: rounding 2**-24 over sums of some thousand terms; bf16: 2**-8 a rounding, some dozen in a row
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, MODERN], ids=["gpt2", "modern"])
def test_loss_and_gradients_are_those_of_the_cpu_in_fp32(
    shape: GPTConfig, dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    expected, wanted = loss_and_gradients(shape, "cpu", torch.float32, compiled=False)
    loss, gradients = loss_and_gradients(shape, DEVICE, dtype, compiled=compiled)
    assert loss == pytest.approx(expected, abs=tolerance)
    for name, g in gradients.items():
        assert float((g - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_learns(tmp_path: Path, tiny_recipe: Path, tiny_data: Path, precision: str) -> None:
    pytest.importorskip("tyro", reason="the training loop needs tyro")
    from test_train import losses

    from regpt2.run.loop import train

    config = dataclasses.replace(
        load_recipe(str(tiny_recipe)),
        data=str(tiny_data),
        run=str(tmp_path / "run"),
        device=DEVICE,
        precision=precision,
        compile="off",
    )
    train(config)
    found = losses(tmp_path / "run")
    assert found[12] < found[1] - 0.5


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_resumed_run_equals_an_uninterrupted_run(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, compile: str
) -> None:
    pytest.importorskip("tyro", reason="the training loop needs tyro")
    from test_train import evals, losses, state_of

    from regpt2.run.loop import train

    config = dataclasses.replace(
        load_recipe(str(tiny_recipe)),
        data=str(tiny_data),
        run=str(tmp_path / "a"),
        device=DEVICE,
        precision="bf16",
        compile=compile,
        deterministic=True,
    )
    train(config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step-{step:08d}")
    train(dataclasses.replace(config, run=str(tmp_path / "b")))
    assert state_of(tmp_path / "a") == state_of(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert evals(tmp_path / "a") == evals(tmp_path / "b")


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
def test_a_bad_step_is_skipped_without_asking_the_device(name: str) -> None:
    world = World(rank=0, local_rank=0, size=1, device=torch.device(DEVICE))
    model = GPT(SHAPE, seed=1).to(DEVICE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(name=name), world)
    handle = model.ln_f.register_forward_hook(lambda *hook: hook[2] * float("nan"))
    stats = train_step(model, optimizer, [batch(DEVICE)], lr=1e-2, grad_clip=1.0, world=world)
    handle.remove()
    assert not bool(stats.accepted)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert bool(train_step(model, optimizer, [batch(DEVICE)], lr=1e-2, grad_clip=1.0, world=world).accepted)


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """CUDA itself raises where the CPU waits for a number in the middle of the step."""
    if DEVICE != "cuda":
        pytest.skip("only CUDA can tell")
    world = World(rank=0, local_rank=0, size=1, device=torch.device(DEVICE))
    model = GPT(SHAPE, seed=1).to(DEVICE)
    trainable = make_trainable(model, torch.bfloat16, world, compiled=False)
    optimizer = build_optimizer(model, OptimConfig(name=name), world)
    batches = [batch(DEVICE)] * 2
    guard = Guard(GuardConfig(spikes="skip", window=2), world.device)

    def step() -> None:
        limit = guard.spike_limit
        guard.take_in(train_step(trainable, optimizer, batches, lr=1e-3, grad_clip=1.0, world=world, spike_limit=limit))

    step()  # the first one sets up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cached_sampling_on_the_gpu_is_that_of_the_cpu_without_a_cache() -> None:
    model = GPT(SHAPE, seed=1)
    with torch.no_grad():  # as it begins, a model repeats its last token, whatever came before
        for p in model.h.parameters():
            if p.dim() == 2:
                p.normal_(std=2 / p.shape[1] ** 0.5, generator=torch.Generator().manual_seed(2))
    prompt = torch.arange(20).view(2, 10)
    on_cpu = generate(model, prompt, 20, temperature=0, use_cache=False)
    assert len(on_cpu[0].unique()) > 20
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(generate(model.to(DEVICE), prompt.to(DEVICE), 20, temperature=0).cpu(), on_cpu)


def test_the_loss_never_holds_the_whole_logits() -> None:
    """(B*T, V) logits of this batch in fp32 would be 3.3 GB."""
    if DEVICE != "cuda":
        pytest.skip("only CUDA counts its memory")
    hidden = torch.randn(16_384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_304, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50_257, (16_384,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets, 50_257, chunk_tokens=1024).backward()
    assert torch.cuda.max_memory_allocated() < 1.5e9


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_losss_operator_is_the_formula_in_fp64(dtype: torch.dtype, tolerance: float, softcap: float) -> None:
    """Of 1,000 tokens in chunks of 256, some ignored, 47 columns padding; in bf16 logits are rounded to 2^-9."""
    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 64, generator=generator).to(dtype)
    weight = torch.randn(50_304, 64, generator=generator) / 8
    weight[50_257:] = 0.0
    targets = torch.randint(0, 50_257, (1000,), generator=generator)
    targets[900:] = IGNORED
    exact = [hidden.double().requires_grad_(), weight.to(dtype).double().requires_grad_()]
    expected = reference_cross_entropy(*exact, targets, 50_257, softcap=softcap)
    wanted = [expected, *torch.autograd.grad(expected, exact)]
    ours = [hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()]
    loss = linear_cross_entropy(*ours, targets.to(DEVICE), 50_257, softcap=softcap, chunk_tokens=256)
    for got, right in zip([loss, *torch.autograd.grad(loss, ours)], wanted, strict=True):
        assert float((got.double().cpu() - right).norm() / right.norm()) < tolerance


def test_the_losss_kernel_runs_where_triton_does() -> None:
    if DEVICE != "cuda" or not can_compile(torch.device(DEVICE)):
        pytest.skip("no Triton here")
    assert gpu_kernel(torch.device("cuda", 0)) is not None


def test_strict_determinism_keeps_cudnns_attention_away() -> None:
    world = World(rank=0, local_rank=0, size=1, device=torch.device(DEVICE))
    trainable = make_trainable(GPT(SHAPE, seed=1).to(DEVICE), torch.bfloat16, world, compiled=False)
    be_deterministic(torch.device(DEVICE))
    try:
        assert attention_kernel(lambda: trainable(*batch(DEVICE))) != "cuDNN"
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_gradients_no_kernel_is_planned_for_an_odd_length() -> None:
    model = GPT(SHAPE, seed=1).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        assert attention_kernel(lambda: model(batch(DEVICE)[0][:, :77])) != "cuDNN"


def test_a_checkpoints_copies_use_their_buffers_again() -> None:
    weight, copies = torch.arange(1000.0, device=DEVICE), HostCopies()
    first = copies.take({"w": weight})["w"]
    assert torch.equal(first, torch.arange(1000.0))
    address = first.data_ptr()
    weight += 1
    second = copies.take({"w": weight})["w"]
    assert torch.equal(second, torch.arange(1000.0) + 1)
    if DEVICE == "cuda":
        assert second.is_pinned()
        assert second.data_ptr() == address
