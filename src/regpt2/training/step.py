"""One optimizer update. In: micro-batches and a learning rate; out: better weights, and the update's loss and norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from regpt2.base.ranks.world import World
from regpt2.training.ranks.ordered_sums import PairwiseSum, sum_over_ranks
from regpt2.training.ranks.strategy import gradient_sync, whole


@dataclass(frozen=True)
class StepStats:
    """What is known of an update. Tensors are scalars still on the device: reading one waits for it."""

    loss: Tensor
    """Nats per token, the mean over every target of the update that counts: all micro-steps, all ranks."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping."""
    accepted: Tensor
    """1 where the update was made; 0 where it was skipped: a loss or gradient not finite, or a spike."""
    spike_limit: Tensor
    """The loss above which it was a spike; infinite if nothing was."""
    lr: float
    """The learning rate that the optimizer used, of groups that have no ratio."""
    scale: float
    """The factor that its loss was multiplied by; 1 except in fp16."""


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients from underflow: halved after an overflow, doubled after 2,000 good steps.

    Factors and period as torch.amp.GradScaler has them (growth 2, backoff 0.5, interval 2000, first value 2**16).
    """

    factor: float = 1.0
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Adapt to one step: was its gradient finite?"""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.factor = max(1.0, self.factor / 2)
        elif self.good_steps % 2000 == 0:
            self.factor *= 2


def train_step(
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    lr: float,
    momentum: float | None = None,
    grad_clip: float,
    world: World,
    ordered: bool = False,
    weights: Sequence[float] | None = None,
    scale: LossScale | None = None,
    spike_limit: Tensor | None = None,
    skip_spikes: bool = True,
    before_micro_step: Callable[[int], None] | None = None,
) -> StepStats:
    """Accumulate the gradients of all micro-batches, clip, update. Never asks the device for a number, but for fp16.

    Args:
        batches: inputs and targets, (B, T) each, one pair per micro-step, of equal sizes.
        lr: of groups that have no `lr_ratio`; the others' is that times their ratio.
        momentum: of Muon's group; None: as the optimizer was built.
        grad_clip: the largest norm of the whole gradient; 0 = no clipping.
        ordered: sum the micro-batches in one fixed order, for equal bits on any number of ranks.
        weights: each micro-batch's share of the update's targets that count in the loss, over all ranks, where not
            all do; those of all ranks add up to 1, or to 0 if none counts. None: all weigh the same.
        scale: for fp16 alone.
        spike_limit: on the device: a loss above it is a spike. None: nothing is.
        skip_spikes: an update whose loss is a spike is skipped.
        before_micro_step: called with the micro-step's number, to set the random numbers of dropout.
    """
    factor = scale.factor if scale else 1.0
    # Two ways to sum. As they come, the exchange is hidden behind the backward pass, but the order of the sum, and so
    # the last bits, follow the number of ranks. A fixed order gives equal bits on 1, 2, 4, ... ranks and hides nothing.
    accumulate = accumulate_in_order if ordered else accumulate_as_they_come
    loss = accumulate(trainable, batches, world, weights=weights, factor=factor, before_micro_step=before_micro_step)

    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if factor != 1.0:
        torch._foreach_mul_(gradients, 1.0 / factor)  # before the norm: `grad_clip` is in units of the true gradient
    # The norm of the mean gradient of all ranks, never of one micro-batch: the update may not depend on how it is cut.
    grad_norm = whole(get_total_norm(gradients))
    # Clip first, then ask the guard: it needs the norm from before, which `grad_norm` keeps. A norm that is not finite
    # spoils the gradients here, which harms nothing: that update is skipped whole.
    if grad_clip > 0:
        clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    # Loss and norm are those of all ranks, so each decides the same: one that skipped alone would drift from the rest.
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    limit = torch.full_like(loss, float("inf")) if spike_limit is None else spike_limit
    accepted = (finite & (loss <= limit) if skip_spikes else finite).float()  # on the device: an `if` would wait for it

    _set_rates(optimizer, lr, momentum)
    _update_if(optimizer, accepted)
    optimizer.zero_grad(set_to_none=True)  # None, not zeros: the next backward pass writes instead of adding
    if scale is not None:
        scale.update(bool(finite))  # not `accepted`: a spike says nothing about the scale
    rate = _rate(optimizer)
    return StepStats(loss=loss, grad_norm=grad_norm, accepted=accepted, spike_limit=limit, lr=rate, scale=factor)


def _set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """Give each group what this update has: its rate, and Muon's group its momentum."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
        if momentum is not None and "momentum_warmup_steps" in group:
            group["momentum"] = momentum


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate as the optimizer has it, not as it was asked for: of the group whose ratio is nearest to 1."""
    group = min(optimizer.param_groups, key=lambda group: abs(group.get("lr_ratio", 1.0) - 1.0))
    return float(group["lr"]) / float(group.get("lr_ratio", 1.0))


def accumulate_as_they_come(
    trainable: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    world: World,
    *,
    weights: Sequence[float] | None = None,
    factor: float = 1.0,
    before_micro_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Leave the mean gradient over all micro-batches and ranks, times `factor`, in `.grad`; returns the mean loss."""
    loss_sum = torch.zeros((), device=world.device)  # added up on the device: reading each loss would wait for it
    for i, (inputs, targets) in enumerate(batches):
        if before_micro_step is not None:
            before_micro_step(i)
        # One exchange per update, in its last backward pass: the sums of the passes before travel with it.
        with gradient_sync(trainable, on=i == len(batches) - 1):
            loss = trainable(inputs, targets)  # (B, T) -> ()
            # Gradients add up over micro-steps. Divided here, the sum is their mean, before it travels in the last
            # pass, and no pass over all gradients is needed for it. Times the factor, so that fp16 does not underflow.
            # By its share of what counts, if not all does; the ranks' exchange averages, so times their number.
            part = factor / len(batches) if weights is None else factor * (weights[i] * world.size)
            (loss * part).backward()
        # The plain loss, apart: the one that went backward is scaled.
        loss_sum += loss.detach() if weights is None else loss.detach() * (weights[i] * world.size)
    return world.mean(loss_sum / len(batches) if weights is None else loss_sum)


def accumulate_in_order(
    trainable: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    world: World,
    *,
    weights: Sequence[float] | None = None,
    factor: float = 1.0,
    before_micro_step: Callable[[int], None] | None = None,
) -> Tensor:
    """As `accumulate_as_they_come`, but no bit of the result depends on the number of ranks."""
    n_micro_batches = len(batches) * world.size
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    tree = PairwiseSum()
    for i, (inputs, targets) in enumerate(batches):
        if before_micro_step is not None:
            before_micro_step(i)
        # By the micro-batches of all ranks: one divisor, and so one rounding, on any number of ranks. A weight is
        # such a number too: it is the same wherever the micro-batch is computed.
        loss = trainable(inputs, targets)  # (B, T) -> ()
        loss = loss / n_micro_batches if weights is None else loss * weights[i]
        (loss * factor).backward()
        # The loss is one more leaf: summed in the same order, it has the same bits as well.
        tree.add([*(p.grad.contiguous() for p in parameters if p.grad is not None), loss.detach()])
        for p in parameters:
            p.grad = None  # the tree adds, not the backward pass, whose running sum has another order
    total = tree.total()
    sum_over_ranks(total, world)
    *gradients, mean_loss = total
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    return mean_loss


def _update_if(optimizer: torch.optim.Optimizer, accepted: Tensor) -> None:
    """Make the update, or skip it whole: neither weights nor moments change."""
    # torch marks the optimizers that read `found_inf` on the device, as its GradScaler needs: fused kernels, and those
    # of training/optim/ that do. For the others the number has to be read, which waits for the device.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1.0 - accepted  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(accepted):
        optimizer.step()
