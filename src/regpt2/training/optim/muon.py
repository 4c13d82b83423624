"""Muon for the matrices of the blocks, AdamW for the rest. In: gradients; out: weights one update further, and state.

Jordan 2024, https://kellerjordan.github.io/posts/muon/: a matrix moves along its momentum after all singular values of
that have been made about 1, so that rare directions count as much as frequent ones. Matrices of one shape are stacked
and go through that together, each rank taking its share of a stack.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.model.flops import blocks_with_attention
from regpt2.model.language_model import GPTConfig
from regpt2.training.optimizer import (
    AdamW,
    NamedParameters,
    NeverCompiled,
    OptimConfig,
    assign,
    can_fuse,
    parameter_groups,
)

# A stack is (n, R, C): n matrices of one shape, lying down, so R <= C.

IGNORES = ()
MEANS = (1, 2)
PARTS = {"attn.c_attn.weight": 3}  # queries, keys and values: three matrices, one upon the other
EPS = 1e-7  # below the norm of any matrix that had a gradient


def newton_schulz(stack: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """The same singular vectors, all singular values near 1: (n, R, C) -> (n, R, C).

    Each step makes a s + b s^3 + c s^5 of every singular value s. Divided by the norm, none is above 1 at first.
    """
    a, b, c = coefficients
    x: Tensor = stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@dataclass(frozen=True)
class Matrix:
    """One of the matrices that a parameter holds, one upon the other."""

    parameter: Tensor
    part: int
    parts: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows in a tensor of the parameter's shape: a view, lying down."""
        rows = tensor.chunk(self.parts)[self.part]
        return rows.mT if rows.shape[0] > rows.shape[1] else rows

    @property
    def scale(self) -> float:
        """Of its updates: a matrix that makes many numbers of few may move further."""
        rows, columns = self.parameter.shape[0] // self.parts, self.parameter.shape[1]
        return math.sqrt(max(1.0, rows / columns))


class Muon(NeverCompiled):
    """Two methods with one state and one list of groups, of which the first is Muon's.

    Momentum is whole on every rank: gradients are too, so nothing is exchanged for it, and a checkpoint serves any
    number of ranks. In shards it would save 0.34 GB a rank at 124M, and cost an exchange at each checkpoint.
    """

    found_inf: Tensor | None = None
    """1 on the device where an update is to be skipped."""

    def __init__(
        self, group: dict[str, Any], matrices: list[Matrix], adamw: AdamW, world: World, compiled: bool
    ) -> None:
        super().__init__([group, *adamw.param_groups], adamw.defaults)
        self._step_supports_amp_scaling = bool(adamw.defaults["fused"])  # torch's word for: looks at found_inf
        self._adamw, self._world = adamw, world
        self._orthogonalize = torch.compile(newton_schulz, dynamic=False) if compiled else newton_schulz
        self._stacks: dict[torch.Size, list[Matrix]] = {}
        for matrix in matrices:
            self._stacks.setdefault(matrix.of(matrix.parameter).shape, []).append(matrix)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        group, *rest = self.param_groups
        self._adamw.state, self._adamw.param_groups = self.state, rest
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        skipped = None if self.found_inf is None else self.found_inf > 0
        for stack in self._stacks.values():
            self._update(stack, group, skipped)

    def _update(self, stack: list[Matrix], group: dict[str, Any], skipped: Tensor | None) -> None:
        directions = self._directions(stack, group, skipped)
        for matrix, direction in zip(stack, directions, strict=False):  # the last of these may be padding
            weight = matrix.of(matrix.parameter)
            kept = weight * (1 - group["lr"] * group["weight_decay"])
            assign(weight, kept.add(direction, alpha=-group["lr"] * matrix.scale), skipped)

    def _directions(self, stack: list[Matrix], group: dict[str, Any], skipped: Tensor | None) -> Tensor:
        """Move all momenta; orthogonalize this rank's share of the stack; get the others' from the other ranks."""
        share = _share(len(stack), self._world.size)
        first, shape = share * self._world.rank, stack[0].of(stack[0].parameter).shape
        mine = stack[0].parameter.new_zeros((share, *shape), dtype=_working_type(stack[0].parameter))
        for i, matrix in enumerate(stack):
            assert matrix.parameter.grad is not None, "every matrix of a block has a gradient"
            gradient = matrix.of(matrix.parameter.grad)
            momentum = matrix.of(self.state[matrix.parameter]["momentum"])
            assign(momentum, momentum.lerp(gradient, 1 - group["momentum"]), skipped)
            if first <= i < first + share:
                mine[i - first] = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        directions = self._orthogonalize(mine, group["ns_steps"], group["ns_coefficients"])
        return self._world.stack(directions).flatten(0, 1)  # (ranks, share, R, C) -> (ranks * share, R, C)


def _share(n: int, ranks: int) -> int:
    """Matrices for each rank out of a stack of n."""
    return -(-n // ranks)


def matmul_flops(model: GPTConfig, config: OptimConfig, ranks: int) -> float:
    """Of one update, on each of the ranks that share it: in an iteration x x^T, its square, and that times x."""
    L, C = model.n_layer, model.n_embd
    stacks = (
        (4 * blocks_with_attention(model), C, C),
        (2 * L, C, 4 * C),
    )  # queries, keys, values and c_proj; the two of the MLP
    return float(config.muon.ns_steps * sum(_share(n, ranks) * (4 * R * R * S + 2 * R**3) for n, R, S in stacks))


def _working_type(p: Tensor) -> torch.dtype:
    """bf16 where a GPU multiplies it: its rounding is far less than what the iteration leaves undone anyway."""
    fast = p.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else p.dtype


def build(
    named_parameters: NamedParameters, config: OptimConfig, world: World, compiled: bool
) -> torch.optim.Optimizer:
    """Muon for every matrix of a block; AdamW for embeddings, head, biases and norms.

    Raises:
        ConfigError: the weights lie in shards: a piece of a matrix has other singular values.
    """
    if any(hasattr(p, "full_tensor") for _, p in named_parameters):
        raise ConfigError(
            "optim.name = 'muon' needs whole matrices, and parallel.strategy = 'fsdp' cuts them; take "
            "--parallel.strategy ddp, which shares Muon's work over the ranks, or --optim.name adamw."
        )
    in_blocks = {name: p for name, p in named_parameters if name.startswith("h.") and p.dim() == 2}
    matrices = []
    for name, p in in_blocks.items():
        parts = PARTS.get(name.split(".", 2)[2], 1)
        matrices += [Matrix(p, part, parts) for part in range(parts)]
    group = {"params": list(in_blocks.values()), **vars(config.muon), "lr_ratio": config.muon.lr / config.lr}
    rest = parameter_groups([(name, p) for name, p in named_parameters if name not in in_blocks], config)
    fused = can_fuse([p for _, p in named_parameters])
    adamw = AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    return Muon(group, matrices, adamw, world, compiled)
