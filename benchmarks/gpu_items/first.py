"""Is a training step right on this card? Without these checks no number counts.

Loss and gradients in the usual precision (bf16) against fp64, eager and compiled; head and loss against the plain
formula; a step that never waits for the GPU, eager and compiled. Compiled checks come last, because they take longest.
"""

import copy

import torch
from torch import Tensor

from gpu_items import Check
from gpu_items._right import FIRST, compare_with_fp64, run_tests
from regpt2.base.device import Precision, can_compile, choose_compute, device_name, pick_device
from regpt2.base.ranks.world import World
from regpt2.machine.health.agreement import trials
from regpt2.machine.speed.rates import attention_kernel
from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels.loss import linear_cross_entropy, reference_cross_entropy
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step

# N tokens, C = n_embd, V = padded_vocab_size

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # at most, of one number
ROUNDINGS = 8
"""Rounding of a logit, its gradient and the matmul of it; in fp32 also of sums over thousands of terms."""


def run(check: Check) -> None:
    device = pick_device(check.device)
    usual = choose_compute("auto", device)
    check.keep("device", device=device_name(device), **versions())
    if device.type == "cuda":
        check.keep(
            "attention at B=64, H=12, T=1024, D=64", kernel=attention_kernel(lambda: attend(device, usual.dtype))
        )
    compare_with_fp64(check, device, usual.precision, compiled=False)
    for softcap in (0.0, 15.0):
        head_and_loss(check, device, usual.dtype, softcap)
    run_tests(check, device, "waits_for_the_device" if check.smoke else FIRST)
    if can_compile(device):
        compare_with_fp64(check, device, usual.precision, compiled=True)
        compiled_step_never_waits(check, device, usual.precision)


def versions() -> dict[str, str]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else ""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "", "cudnn": str(cudnn)}


def attend(device: torch.device, dtype: torch.dtype) -> Tensor:
    q = torch.randn(64, 12, 1024, 64, device=device, dtype=dtype, requires_grad=True)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def head_and_loss(check: Check, device: torch.device, dtype: torch.dtype, softcap: float) -> None:
    """Several chunks, the last one shorter, against whole logits in fp32 (in fp64 where the compute type is fp32)."""
    N, C, V, vocab_size = (70, 32, 320, 257) if check.smoke else (5000, 768, 50_304, 50_257)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(device, dtype)
    weight = (0.2 * torch.randn(V, C, generator=generator)).to(device, dtype).float()  # logits of some units
    targets = torch.randint(0, vocab_size, (N,), generator=generator).to(device)
    torch.set_float32_matmul_precision("highest")

    def both(of_type: torch.dtype, *, ours: bool) -> list[Tensor]:
        leaves = [
            z.to(of_type if i == 0 or not ours else z.dtype).requires_grad_() for i, z in enumerate((hidden, weight))
        ]
        chunks = {"chunk_tokens": -(-N // 4) + 1} if ours else {}
        call = linear_cross_entropy if ours else reference_cross_entropy
        loss = call(*leaves, targets, vocab_size, softcap=softcap, **chunks)
        return [z.detach().double() for z in (loss, *torch.autograd.grad(loss, leaves))]

    got, wanted = both(dtype, ours=True), both(exact, ours=False)
    off = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    most = ROUNDINGS * ROUNDING[dtype] * (32 if dtype == torch.float32 else 1)
    far = [name for name, one in zip(("loss", "d_hidden", "d_weight"), off, strict=True) if not one <= most]
    check.judge(
        f"head and loss against the plain formula{', softcap' if softcap else ''}",
        loss_off=off[0],
        hidden_gradient_off=off[1],
        weight_gradient_off=off[2],
        ok=not far,
        why=", ".join(f"{name} is off by more than {most:.0e}" for name in far),
    )
    choose_compute("auto", device)  # restore its own setting of fp32 matmuls


def compiled_step_never_waits(check: Check, device: torch.device, precision: Precision) -> None:
    """CUDA itself raises if the CPU waits for a number in the middle of the step."""
    torch.compiler.reset()
    world = World(rank=0, local_rank=0, size=1, device=device)
    trial, _ = trials(GPTConfig(), 1024)  # compiled before, so its code is in the cache
    model = copy.deepcopy(trial.model).to(device)
    trainable = make_trainable(model, choose_compute(precision, device).dtype, world, compiled=True)
    optimizer = build_optimizer(model, OptimConfig(), world, compiled=True)
    batches = [(trial.ids.to(device), trial.targets.to(device))] * 2

    def step() -> None:
        train_step(trainable, optimizer, batches, lr=1e-3, grad_clip=1.0, world=world)

    step()  # the first one compiles and sets up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        check.keep("a compiled step never waits for the device", ok=False, why=str(error).split("\n")[0][:300])
    else:
        check.keep("a compiled step never waits for the device", ok=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
