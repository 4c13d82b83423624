"""The choice of an id: each filter, alone and together with the others, is that of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.sampling.draw import Choice, candidates, drawn, penalized

V = 60


def some_logits(seed: int = 0) -> Tensor:
    return torch.randn(8, V, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(logits: Tensor, choice: Choice) -> Tensor:  # (B, V) -> (B, V)
    p, ids = candidates(logits, choice)
    whole = p if ids is None else torch.zeros(len(p), V).scatter_(1, ids, p)
    return whole / whole.sum(dim=1, keepdim=True)


def of_transformers(logits: Tensor, ids: Tensor, choice: Choice) -> Tensor:
    """In the order in which `generate` puts them (transformers 5, generation/utils.py, _get_logits_processor)."""
    transformers: Any = pytest.importorskip("transformers")
    logits = transformers.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty)(ids, logits)
    warpers = [transformers.TemperatureLogitsWarper(choice.temperature)]
    if choice.top_k:
        warpers.append(transformers.TopKLogitsWarper(choice.top_k))
    warpers += [transformers.TopPLogitsWarper(choice.top_p), transformers.MinPLogitsWarper(choice.min_p)]
    for warper in warpers:
        logits = warper(ids, logits)
    return logits.softmax(dim=1)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(top_k=0),
        Choice(temperature=0.6, top_k=0),
        Choice(top_k=5),
        Choice(top_k=0, top_p=0.7),
        Choice(top_k=0, min_p=0.1),
        Choice(top_k=0, min_p=1.0),
        Choice(top_k=0, repetition_penalty=1.7),
        Choice(top_k=0, repetition_penalty=0.5),
        Choice(1.4, 20, 0.9, 0.05, 1.3),
        Choice(2.5, 30, 0.8, 0.2, 3.0),
        Choice(0.3, 0, 0.95, 0.01, 1.1),
    ],
    ids=str,
)
def test_what_may_be_drawn_is_what_transformers_would_draw_from(choice: Choice) -> None:
    logits, ids = some_logits(), torch.randint(V, (8, 25), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(8, V, dtype=torch.bool).scatter_(1, ids, True)
    found = probabilities(penalized(logits, seen, choice.repetition_penalty), choice)
    expected = of_transformers(logits, ids, choice)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)  # fp32


def test_min_p_keeps_the_likeliest_and_what_reaches_its_part() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
    assert (probabilities_of(logits, Choice(top_k=0, min_p=0.45)) > 0).tolist() == [[True, True, False, False]]
    assert (probabilities_of(logits, Choice(top_k=0, min_p=1.0)) > 0).tolist() == [[True, False, False, False]]


def probabilities_of(logits: Tensor, choice: Choice) -> Tensor:
    p, ids = candidates(logits, choice)
    assert ids is not None
    return torch.zeros_like(logits).scatter_(1, ids, p)


def test_a_single_candidate_takes_no_random_number() -> None:
    random = torch.Generator().manual_seed(3)
    before = random.get_state()
    logits = some_logits()
    assert torch.equal(drawn(*candidates(logits, Choice(temperature=0)), random), logits.argmax(dim=1))
    assert torch.equal(random.get_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_p": -0.1}, "min_p = -0.1 must be from 0"),
        ({"min_p": 1.1}, "min_p = 1.1 must be from 0"),
        ({"min_p": float("nan")}, "min_p = nan must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty = nan must be above 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Choice(**values)  # type: ignore[arg-type]
