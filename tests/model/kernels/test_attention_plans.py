"""cuDNN's attention builds a plan for each new shape: how many shapes may meet it, in evaluations and generation."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.evals.scoring.endings import Question, _batches, _passes
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels import attention
from regpt2.model.kernels.attention import is_worth_a_plan
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.generate import generate

Shape = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> set[Shape]:
    """The shapes in which torch may take cuDNN's kernel, as if this CPU were a GPU."""
    seen: set[Shape] = set()
    real: Callable[..., Tensor] = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        if torch.backends.cuda.cudnn_sdp_enabled():
            seen.add((tuple(q.shape), tuple(k.shape)))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "_PLANS", ("cpu",))
    return seen


def attend(T: int, S: int) -> Tensor:
    q, k = torch.zeros(1, 2, T, 8, requires_grad=True), torch.zeros(1, 2, S, 8)
    return attention.causal_attention(q, k, k)


@pytest.mark.parametrize(("T", "S"), [(300, 300), (512, 512), (1, 700)])
def test_training_may_take_any_kernel(planned: set[Shape], T: int, S: int) -> None:
    attend(T, S)
    assert planned == {((1, 2, T, 8), (1, 2, S, 8))}


def test_without_gradients_only_whole_windows_may_be_planned(planned: set[Shape]) -> None:
    with torch.no_grad():
        for T, S in ((300, 300), (1000, 1000), (1, 700), (1, 256), (512, 512)):
            attend(T, S)
    assert planned == {((1, 2, 512, 8), (1, 2, 512, 8))}
    assert torch.backends.cuda.cudnn_sdp_enabled(), "what was switched off stays off"


@pytest.mark.parametrize("model", [GPT, ModernGPT])
def test_generation_plans_at_most_one_shape(planned: set[Shape], model: type[GPT] | type[ModernGPT]) -> None:
    """A prompt of 320 ids and 40 more."""
    config = (GPTConfig if model is GPT else ModernConfig)(n_layer=1, n_head=2, n_embd=16, block_size=400, vocab_size=9)
    generate(model(config).eval(), torch.zeros(1, 320, dtype=torch.int64), 40, top_k=0)  # type: ignore[arg-type]
    assert not planned
    generate(model(config).eval(), torch.zeros(1, 256, dtype=torch.int64), 3, top_k=0)  # type: ignore[arg-type]
    assert len(planned) <= 1


def hellaswag_like(n: int) -> list[Question]:
    """Contexts and endings about as long as HellaSwag's: a third of films, two thirds of instructions."""
    chance = random.Random(0)

    def question(i: int) -> Question:
        most, ending = (150, 55) if chance.random() < 2 / 3 else (45, 25)
        context = [i, *range(chance.randint(most // 5, most))]
        return Question(context, tuple([0] * chance.randint(ending // 5, ending) for _ in range(4)))

    return [question(i) for i in range(n)]


def test_all_of_hellaswag_meets_hundreds_of_shapes_and_plans_at_most_sixteen() -> None:
    shapes = set()
    for batch in _batches(hellaswag_like(10_042), 1024, 64 * 1024):
        c = len(batch.contexts[0])
        shapes.add((len(batch.contexts), c, c))
        for endings in _passes(batch.endings):
            T = len(endings[0].ids) - 1
            shapes.add((len(endings), T, c + T))
    worth = {shape for shape in shapes if is_worth_a_plan(*shape[1:], with_gradient=False)}
    assert len(shapes) > 500
    assert len(worth) <= 16
