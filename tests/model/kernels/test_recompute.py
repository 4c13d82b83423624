"""What is computed again instead of kept: the same bits, less kept, the last matrix product not repeated."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regpt2.model.gpt import GPT, MLP, GPTConfig
from regpt2.model.kernels import recompute

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=57)


@pytest.fixture(autouse=True)
def even_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_WORTH", 1)


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def loss_and_gradients(dtype: torch.dtype, dropout: float) -> list[Tensor]:
    model = GPT(GPTConfig(**{**vars(CONFIG), "dropout": dropout}), seed=3).to(dtype).train()
    ids = torch.randint(0, CONFIG.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1))
    torch.default_generator.manual_seed(5)  # of dropout
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_the_same_bits(
    dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = loss_and_gradients(dtype, dropout)
    monkeypatch.setattr("regpt2.model.gpt.recomputed", plainly)
    expected = loss_and_gradients(dtype, dropout)
    assert len(got) == len(expected) == 1 + 4 + 12 * CONFIG.n_layer
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_finite_differences_agree() -> None:
    mlp = MLP(CONFIG).double()
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(mlp, (x,))


class Calls(TorchDispatchMode):
    """Counts what the kernels are really asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_only_gelu_is_done_twice() -> None:
    mlp, x = MLP(CONFIG), torch.randn(4, 16)
    with Calls() as calls:
        mlp(x).sum().backward()
    assert calls.n["gelu"] == 2
    assert calls.n["addmm"] == 2  # c_fc and c_proj, once each
    with torch.no_grad(), Calls() as calls:
        mlp(x)
    assert (calls.n["gelu"], calls.n["addmm"]) == (1, 2)


def kept_numel(mlp: MLP, x: Tensor) -> int:
    """Elements that autograd keeps for the backward pass, weights left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == len(x):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    return sum(kept.values())


def test_what_gelu_gives_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = MLP(CONFIG), torch.randn(5, 16)
    assert kept_numel(mlp, x) == x.numel() * (1 + 4)  # what c_fc takes in and what it gives
    monkeypatch.setattr(recompute, "_WORTH", 1 << 20)
    assert kept_numel(mlp, x) == x.numel() * (1 + 4 + 4)
