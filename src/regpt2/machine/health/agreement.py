"""Does a device compute correctly? In: a small model, a device, a precision; out: the difference from exact results.

The exact results are from the lecture's plain GPT-2 (lecture_steps.py), a head written out and torch's plain AdamW, in
fp64 on the CPU: none of them uses a fast kernel.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.device import Precision, choose_compute
from regpt2.base.ranks.world import World
from regpt2.machine.speed.lecture_steps import PLAIN, LectureGPT, unfused_adamw
from regpt2.model.files.fill_model import load_into, tensors_of
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.loss import linear_cross_entropy
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable

# B sequences, T tokens, C = n_embd, H = n_head, N = B * T tokens, V = padded_vocab_size

_ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}  # half a unit of the last place
_FP16_FACTOR = 2.0**16  # scale of the loss at the start of training


@dataclass(frozen=True)
class Trial:
    """A small model, a batch, and its loss and gradients in fp64."""

    model: GPT
    ids: Tensor
    targets: Tensor
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Relative differences of a loss and its gradients from the exact ones."""

    loss: float
    length: float  # of the whole gradient, along the exact one: rounding errors cancel in it, a wrong factor does not
    gradient: float  # the norm of the whole difference
    tensor: float  # the difference for the worst tensor
    worst: str  # its name

    def fault(self, precision: Precision) -> str:
        """The figures that rounding does not explain, in words; "" if it explains all."""
        named = {"tensor": f"gradient of {self.worst}", "length": "gradient's length", "gradient": "whole gradient"}
        off = {name: abs(getattr(self, name)) for name in tolerances(precision)}
        too_far = [name for name, most in tolerances(precision).items() if not off[name] <= most]  # NaN is too far
        return ", ".join(
            f"{named.get(name, name)} is off by {off[name]:.1e} (rounding: {tolerances(precision)[name]:.0e})"
            for name in too_far
        )


def tolerances(precision: Precision) -> dict[str, float]:
    """The most that rounding explains, for each figure of an `Agreement`.

    About 60 roundings lie between a weight and its gradient, forward and backward through two blocks. As a random walk
    they add up to 8; to more in a tensor whose terms nearly cancel, such as a bias. In means over many numbers they
    cancel: the loss, and the length. In fp32 sums of up to V terms round too; other types keep their sums in fp32.
    Measured: 0.02, 0.3, 3 and 23 roundings in bf16; 1.3, 0.8, 19 and 30 in fp32.
    """
    unit = _ROUNDING[precision] * (32 if precision == "fp32" else 1)
    return {"loss": 0.5 * unit, "length": unit, "gradient": 8 * unit, "tensor": 64 * unit}


def trials(model: GPTConfig, seq_len: int) -> tuple[Trial, Trial]:
    """Two small GPT-2s that use a large model's kernels: one with its heads and sequences, one with its vocabulary."""
    long = GPTConfig(
        n_layer=2,
        n_head=2,
        n_embd=2 * (model.n_embd // model.n_head),
        block_size=min(model.block_size, 2048),
        vocab_size=500,
        vocab_multiple=model.vocab_multiple,
        activation=model.activation,
    )
    wide = dataclasses.replace(long, vocab_size=model.vocab_size)
    return make_trial(long, 1, min(2048, seq_len)), make_trial(wide, 12, min(16, seq_len))


def make_trial(config: GPTConfig, micro_batch: int, seq_len: int) -> Trial:
    """Loss and gradients with the whole logits and the whole square of attention, for fixed weights and ids."""
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_attn.weight"):
                p.mul_(4)  # fresh weights attend to all tokens alike, which hides errors
            elif name.endswith("bias"):
                p.normal_(std=0.02, generator=generator)
    ids = torch.randint(0, config.vocab_size, (micro_batch, seq_len + 1), generator=generator)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    plain = LectureGPT(config, PLAIN, torch.float64).double()
    load_into(plain, tensors_of(model))
    loss = plain(ids, targets)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    names = [name for name, _ in plain.named_parameters()]
    return Trial(model, ids, targets, loss.item(), dict(zip(names, gradients, strict=True)))


def agreement(trial: Trial, device: torch.device, precision: Precision, *, compiled: bool) -> Agreement:
    """Compare loss and gradients of training's own pass with the exact ones."""
    loss, gradients = _on_device(trial, device, precision, compiled)
    differences = {name: (gradients[name] - g).norm() / g.norm() for name, g in trial.gradients.items()}
    worst = max(differences, key=lambda name: float(differences[name].nan_to_num(math.inf)))
    got, wanted = _flat(gradients, trial), _flat(trial.gradients, trial)
    return Agreement(
        loss=loss / trial.loss - 1,
        length=float(got @ wanted / (wanted @ wanted)) - 1,
        gradient=float((got - wanted).norm() / wanted.norm()),
        tensor=float(differences[worst]),
        worst=worst,
    )


def _on_device(
    trial: Trial, device: torch.device, precision: Precision, compiled: bool
) -> tuple[float, dict[str, Tensor]]:
    compute = choose_compute(precision, device)
    alone = World(rank=0, local_rank=0, size=1, device=device)
    model = copy.deepcopy(trial.model).to(device)
    if compiled:
        torch.compiler.reset()  # else shapes seen before would give a kernel for any shape
    factor = _FP16_FACTOR if compute.needs_scaler else 1.0
    loss = make_trainable(model, compute.dtype, alone, compiled=compiled)(
        trial.ids.to(device), trial.targets.to(device)
    )
    (loss * factor).backward()
    gradients = {name: p.grad.cpu().double() / factor for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def _flat(gradients: Mapping[str, Tensor], trial: Trial) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in trial.gradients])


def head_difference(model: GPTConfig, n_tokens: int, device: torch.device, precision: Precision) -> float:
    """The head at its real size, its logits and the loss's gradient: the worst row of some, relative to the exact row.

    On Apple's GPUs a head of 50,304 rows was wrong from 9 x 1024 tokens on (pytorch#109457), and correct below.
    """
    compute = choose_compute(precision, device)
    generator = torch.Generator().manual_seed(4)
    weight = 0.02 * torch.randn(model.padded_vocab_size, model.n_embd, generator=generator)
    weight = weight.to(device, compute.dtype)
    hidden = torch.randn(n_tokens, model.n_embd, generator=generator).to(device, compute.dtype).requires_grad_()
    targets = torch.randint(0, model.vocab_size, (n_tokens,), generator=generator)
    factor = _FP16_FACTOR if compute.needs_scaler else 1.0
    loss = factor * linear_cross_entropy(hidden, weight, targets.to(device), model.vocab_size)
    (gradient,) = torch.autograd.grad(loss, hidden)
    rows = torch.linspace(0, n_tokens - 1, 16).long()
    got_logits, got_gradient, x = (_rows(z, rows) for z in (F.linear(hidden, weight), gradient, hidden))

    w = weight.cpu().double()
    logits = x @ w.T
    p = torch.softmax(logits[:, : model.vocab_size], dim=1)
    p[torch.arange(len(rows)), targets[rows]] -= 1
    gradient = p @ w[: model.vocab_size] / n_tokens
    return max(_worst_row(got_logits, logits), _worst_row(got_gradient / factor, gradient))


def _rows(z: Tensor, rows: Tensor) -> Tensor:
    return z.detach()[rows.to(z.device)].cpu().double()


def _worst_row(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).nan_to_num(math.inf).max())


def adamw_difference(trial: Trial, device: torch.device) -> float:
    """Two updates by training's AdamW and by torch's plain loop in fp64 on the CPU: the largest difference, in lr.

    fp32 explains 2e-4: a weight of 1 is rounded to 6e-8, twice, and lr is 6e-4.
    """
    config = OptimConfig()
    model, exact = copy.deepcopy(trial.model).to(device), copy.deepcopy(trial.model).double()
    optimizers = build_optimizer(model, config), unfused_adamw(exact, config)
    for factor in (1.0, -0.5):
        for name, p in (*model.named_parameters(), *exact.named_parameters()):
            p.grad = (factor * trial.gradients[name].float()).to(p.device, p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    apart = torch.stack([(got.detach().cpu().double() - p.detach()).abs().max() for got, p in pairs])
    return float(apart.nan_to_num(math.inf).max()) / config.lr
