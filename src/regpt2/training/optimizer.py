"""The optimizer of a run. In: a model and a config; out: a torch optimizer from the shelf, and its state by name."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regpt2.base import shelves
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.ranks.world import World
from regpt2.training.ranks.strategy import shard_like

NamedParameters = list[tuple[str, Tensor]]

_RATES = {  # learning rates of their own, and why one may have no effect
    "embedding_lr": "this model has no embedding.",
    "head_lr": "this model's head is its embedding (optim.embedding_lr).",
    "value_embedding_lr": "this model has no value embeddings (model.value_embeddings).",
    "scalar_lr": "this model has no learned scalars (model.x0_mixing, unet_skips, value_embeddings).",
}
_FUSED_ON = ("cpu", "cuda")  # not "mps": its kernel ignores found_inf, so a bad update would be made


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the matrices of the blocks. AdamW trains the other parameters, with the other options of `optim`.

    The values are those of the tuned baseline of KellerJordan/modded-nanogpt (records/track_3_optimization of
    June 2026), except the iteration: Keller Jordan's first one, which needs 5 steps instead of 12.
    """

    lr: float = 0.025
    """Peak learning rate: an update changes a matrix by about this much in each singular direction."""
    weight_decay: float = 0.05
    """Pulls those matrices towards zero."""
    momentum: float = 0.95
    """Decay of the running mean of gradients, per update."""
    momentum_from: float = 0.0
    """Its value in the first update, from where it rises linearly; 0 = `momentum` all along."""
    momentum_warmup_steps: int = 0
    """Updates over which it rises."""
    nesterov: bool = True
    """Look ahead: mix the newest gradient into the mean a second time."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """a, b, c: an iteration makes a s + b s^3 + c s^5 of a singular value s. Baseline: 2, -1.5, 0.5 and 12 steps."""

    def __post_init__(self) -> None:
        _check_positive("optim.muon.lr", self.lr)
        _check_not_negative("optim.muon.weight_decay", self.weight_decay)
        for name in ("momentum", "momentum_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.muon.{name} = {getattr(self, name)} must be at least 0 and below 1.")
        if self.momentum_warmup_steps < 0:
            raise ConfigError(
                f"optim.muon.momentum_warmup_steps = {self.momentum_warmup_steps} must be at least 0 (0 = none)."
            )
        if self.ns_steps < 1:
            raise ConfigError(f"optim.muon.ns_steps = {self.ns_steps} must be at least 1.")
        if not all(map(math.isfinite, self.ns_coefficients)):
            raise ConfigError(f"optim.muon.ns_coefficients = {self.ns_coefficients} must be finite.")

    def momentum_at(self, step: int) -> float:
        """The momentum of update `step`, from 1: the first has `momentum_from`, as in modded-nanogpt."""
        done = step - 1
        if not self.momentum_from or done >= self.momentum_warmup_steps:
            return self.momentum
        return self.momentum_from + (self.momentum - self.momentum_from) * done / self.momentum_warmup_steps


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """GPT-3's AdamW (arXiv:2005.14165, appendix B)."""

    name: str = "adamw"
    """The optimizer: an entry of the shelf training/optim/."""
    lr: float = 6e-4
    """Peak learning rate."""
    embedding_lr: float = 0.0
    """Peak learning rate of wte and wpe; 0 = lr."""
    head_lr: float = 0.0
    """Peak learning rate of an untied output head; 0 = lr."""
    value_embedding_lr: float = 0.0
    """Peak learning rate of value embeddings (modern model); 0 = lr."""
    scalar_lr: float = 0.0
    """Peak learning rate of the learned scalars that mix streams (modern model); 0 = lr."""
    ema: float = 0.0
    """Decay per update of an exponential average of the weights, 0.999 say, which then is the model; 0 = none."""
    weight_decay: float = 0.1
    """Pulls matrices, not vectors, towards zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares, per update."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        _check_positive("optim.lr", self.lr)
        if not self.eps > 0:
            raise ConfigError(f"optim.eps = {self.eps} must be above 0: weights that never had a gradient are 0 / eps.")
        for name in ("embedding_lr", "head_lr", "value_embedding_lr", "scalar_lr", "weight_decay", "grad_clip"):
            _check_not_negative(f"optim.{name}", getattr(self, name))
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema = {self.ema} must be at least 0 (no average) and below 1; 0.999 is usual.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas = {self.betas} must each be at least 0 and below 1.")
        if self.name not in shelves.entries("training.optim"):
            shelves.load("training.optim", self.name)  # raises, and lists the names

    @property
    def options(self) -> Any:
        """The optimizer's own, if it has any."""
        return shelves.own_options(self, self.name)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {value} must be above 0 and finite.")


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name} = {value} must be at least 0 and finite.")


class NeverCompiled(torch.optim.Optimizer):
    """An optimizer that does not import torch's compiler, which takes 1.2 s of every start.

    torch wraps these methods so that torch.compile leaves them alone, and a wrapper imports the whole compiler when it
    is first called. Nobody compiles our updates, so we take the functions inside: the same code, and the same bits.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(NeverCompiled, torch.optim.AdamW):
    """torch's, whose update has a wrapper too: one for updates that are differentiated, which ours are not."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    world: World | None = None,
    *,
    ordered: bool = False,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer named in `config`, over all parameters of `model` that are not frozen.

    Args:
        world: ranks with the same weights and gradients, which may share the work of an update.
        ordered: no bit may depend on the number of ranks, so each makes the whole update.
        compiled: many small kernels may be compiled into one.

    Raises:
        ConfigError: this optimizer cannot work on shards of weights.
    """
    if world is None or ordered:
        world = World(rank=0, local_rank=0, size=1, device=next(model.parameters()).device)
    entry = shelves.load("training.optim", config.name)
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = entry.build(learning, config, world, compiled)
    return optimizer


def parameter_groups(named_parameters: NamedParameters, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters of equal learning rate and decay together; vectors do not decay.

    `lr_ratio` is a group's learning rate relative to `config.lr`: the schedule moves all of them alike.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in named_parameters:
        decay = config.weight_decay if p.dim() >= 2 else 0.0
        lr = getattr(config, _rate_of(name)) or config.lr
        groups.setdefault((lr, decay), []).append(p)
    return [
        {"params": parameters, "lr": lr, "lr_ratio": lr / config.lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _rate_of(name: str) -> str:
    """The option that is this parameter's learning rate."""
    if name in ("wte.weight", "wpe.weight"):
        return "embedding_lr"
    if name.startswith("wve."):
        return "value_embedding_lr"
    if name.rpartition(".")[2] in ("mix", "value_mix", "skips"):
        return "scalar_lr"
    return "head_lr" if name == "lm_head.weight" else "lr"


def can_fuse(parameters: list[Tensor]) -> bool:
    """True if every parameter's device has a fused AdamW that honors `found_inf`."""
    return all(p.device.type in _FUSED_ON and p.dtype.is_floating_point for p in parameters)


def assign(old: Tensor, new: Tensor, skipped: Tensor | None) -> None:
    """Copy `new` into `old`, unless `skipped` is true: then `old` keeps every bit. The host does not wait for it."""
    old.copy_(new if skipped is None else torch.where(skipped, old, new))


def unused_options(config: OptimConfig, model: nn.Module) -> list[str]:
    """A sentence for each option that was set but has no effect with this optimizer and this model."""
    ignored: tuple[str, ...] = getattr(shelves.load("training.optim", config.name), "IGNORES", ())
    unused = [
        f"optim.{name} has no effect with optim.name = {config.name!r}."
        for name in ignored
        if getattr(config, name) != getattr(OptimConfig(), name)
    ]
    muon = config.muon
    if "muon" not in ignored and bool(muon.momentum_from) != bool(muon.momentum_warmup_steps):
        set_one, other = "momentum_from", "momentum_warmup_steps"
        if not muon.momentum_from:
            set_one, other = other, set_one
        unused.append(f"optim.muon.{set_one} has no effect without optim.muon.{other}.")
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    rates = {_rate_of(name) for name in learns}
    frozen = "the model's own weights are frozen, its adapters train (lora.rank)."
    for option, why in _RATES.items():
        if getattr(config, option) and not learns["wte.weight"]:
            unused.append(f"optim.{option} has no effect: {frozen}")
        elif getattr(config, option) and option not in rates:
            unused.append(f"optim.{option} has no effect: {why}")
    return unused


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/kind` -> tensor, not copied. Empty before the first update."""
    return {
        f"{name}/{kind}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state_tensors` gave; a CheckpointError if it is of other parameters or shapes."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, kind = key.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(
                f"the optimizer state belongs to another model: it has {key!r}, the model has no {name!r}."
            )
        p = parameters[name]
        if value.dim() and value.shape != p.shape:
            raise CheckpointError(f"optimizer state {key!r} is {tuple(value.shape)}, expected {tuple(p.shape)}.")
        if value.dim():
            value = shard_like(value.to(p.device), p)
        else:  # a counter of steps: on the device for fused kernels only
            value = value.to(p.device) if optimizer.defaults.get("fused") else value.clone()
        found.setdefault(name, {})[kind] = value
    missing = sorted(set(parameters) - set(found)) if found else []
    if missing:
        raise CheckpointError(f"the optimizer state lacks {len(missing)} parameters, the first is {missing[0]!r}.")
    for name, state in found.items():
        optimizer.state[parameters[name]] = state
