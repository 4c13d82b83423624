"""The half of the pairs that turns, against the record's frequencies. tests/model/test_modern.py has the rest."""

import pytest
import torch

from regpt2.model.kernels.rotary import rotated, rotation_of


@pytest.mark.parametrize("D", [4, 8, 128])
def test_half_of_the_pairs_turn_at_frequencies_from_1_to_1_1024th(D: int) -> None:
    like = torch.empty(0, dtype=torch.float64)
    cos, sin = rotation_of(0, 3000, D, like, half=True)  # (T, D / 2)
    places = torch.arange(3000, dtype=torch.float64)
    for i in range(D // 4):
        frequency = (1 / 1024) ** (i / max(1, D // 4 - 1))
        assert torch.allclose(cos[:, i], (places * frequency).cos(), atol=1e-9)
        assert torch.allclose(sin[:, i], (places * frequency).sin(), atol=1e-9)
    assert cos[:, D // 4 :].eq(1).all() and not sin[:, D // 4 :].any()


def test_what_does_not_turn_is_the_same_at_every_distance() -> None:
    x = torch.randn(1, 1, 9, 8, generator=torch.Generator().manual_seed(1))
    y = rotated(x, rotation_of(5, 9, 8, x, half=True))
    still = [2, 3, 6, 7]  # pairs 2 and 3 of 4: dimension i goes with i + 4
    assert torch.equal(y[..., still], x[..., still])
    assert (y[..., [0, 1, 4, 5]] != x[..., [0, 1, 4, 5]]).all()


def test_each_row_may_be_at_a_place_of_its_own() -> None:
    like = torch.empty(0)
    cos, sin = rotation_of(torch.tensor([0, 7, 3]), 1, 16, like, half=True)  # (B, 1, 1, D / 2)
    whole_cos, whole_sin = rotation_of(0, 8, 16, like, half=True)
    assert torch.equal(cos[:, 0, 0], whole_cos[[0, 7, 3]]) and torch.equal(sin[:, 0, 0], whole_sin[[0, 7, 3]])
