"""The reference curves: what they end at, how they are read between points, which one a run is held against."""

import math

import numpy as np
import pytest

from regpt2.references import curves
from regpt2.references.curves import Curve, choose, load
from regpt2.references.run_facts import dataset_of
from regpt2.references.scores import comparable

ENDS = {  # as the sources print them
    "fineweb_gpt2_124m_llmc": (19_560, 3.2722),
    "fineweb_gpt2_350m_llmc": (60_000, 2.9282),
    "fineweb_adamw_trapezoid_rotary": (9_536, 3.275959),
    "fineweb_gpt2_124m_stable_linear": (9_536, 3.30),
    "fineweb_modern_muon_baseline": (3_250, 3.2787),
    "fineweb_modern_long_windows": (1_390, 3.2785),
    "fineweb_edu_gpt2_124m_lecture": (19_560, 3.06),
}


def curve(name: str) -> Curve:
    found = choose(name, None, None)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ENDS)
def test_a_curve_ends_where_its_source_says_and_names_it(name: str) -> None:
    steps, loss = ENDS[name]
    of = curve(name)
    assert of.tokens[-1] == steps * 524_288
    assert of.loss[-1] == pytest.approx(loss, abs=1e-9)
    assert of.loss[0] == pytest.approx(math.log(50_257), abs=0.7)
    assert (np.diff(of.tokens) > 0).all()
    assert of.source and of.title and of.dataset in ("fineweb", "fineweb_edu")


def test_every_file_is_a_curve_and_known_here() -> None:
    assert curves.names() == sorted(ENDS) == [of.name for of in load()]


def test_between_two_points_the_loss_is_read_over_log_tokens() -> None:
    of = Curve("x", "", "", "", 1, tokens=np.array([0.0, 100.0, 10_000.0]), loss=np.array([9.0, 5.0, 3.0]))
    assert of.at(1_000) == pytest.approx(4.0)
    assert of.slope(1_000) == pytest.approx(1 / math.log(10))
    assert math.isnan(of.at(99)) and math.isnan(of.at(10_001)), "outside of its points it says nothing"


def test_a_point_left_out_is_found_again_by_its_neighbors() -> None:
    """Every other evaluation is enough: 0.01 nats once the warm-up is over, half the narrowest band."""
    of = curve("fineweb_gpt2_124m_llmc")
    half = Curve("half", "", "", "", of.batch_tokens, of.tokens[::2], of.loss[::2])
    errors = [abs(half.at(t) - loss) for t, loss in zip(of.tokens[5:-1:2], of.loss[5:-1:2], strict=True)]
    assert max(errors[2:]) < 0.015
    assert float(np.median(errors)) < 0.001


@pytest.mark.parametrize(
    ("text", "dataset"),
    [
        ("data/fineweb_edu_10B", "fineweb_edu"),
        ("edu_fineweb10B", "fineweb_edu"),
        ("/mnt/FineWeb-Edu/sample-10BT", "fineweb_edu"),
        ("data/fineweb10B", "fineweb"),
        ("openwebtext", "openwebtext"),
        ("data/owt", "openwebtext"),
        ("tiny_shakespeare data/shakespeare", None),
        ("text_files data/growth", None),
    ],
)
def test_a_data_set_is_known_by_its_names(text: str, dataset: str | None) -> None:
    assert dataset_of(text) == dataset


@pytest.mark.parametrize(
    ("dataset", "n_params", "name"),
    [
        ("fineweb", 124_439_808, "fineweb_gpt2_124m_llmc"),
        ("fineweb", 354_823_168, "fineweb_gpt2_350m_llmc"),
        ("fineweb_edu", 124_439_808, "fineweb_edu_gpt2_124m_lecture"),
        ("fineweb_edu", 354_823_168, None),
        ("fineweb", 123_653_376, None),  # rotary: the same size, another model
        ("fineweb", 162_149_376, "fineweb_modern_muon_baseline"),
        ("fineweb", 275_562_287, "fineweb_modern_long_windows"),
        ("fineweb", 404_967_424, None),  # modern_350m
        ("openwebtext", 124_439_808, None),
        (None, 124_439_808, None),
    ],
)
def test_auto_takes_the_curve_of_this_model_on_this_data_or_none(
    dataset: str | None, n_params: float, name: str | None
) -> None:
    found = choose("auto", dataset, n_params)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("dataset", "n_params", "schedule", "name"),
    [
        ("fineweb", 124_439_808, "cosine", "fineweb_gpt2_124m_llmc"),
        ("fineweb", 124_439_808, "stable_linear", "fineweb_gpt2_124m_stable_linear"),
        ("fineweb", 124_439_808, "constant", "fineweb_gpt2_124m_llmc"),
        ("fineweb_edu", 124_439_808, "stable_linear", "fineweb_edu_gpt2_124m_lecture"),
        ("fineweb", 162_149_376, "cosine", "fineweb_modern_muon_baseline"),
    ],
)
def test_among_several_auto_takes_the_one_of_the_runs_schedule(
    dataset: str, n_params: float, schedule: str, name: str
) -> None:
    found = choose("auto", dataset, n_params, schedule)
    assert found is not None and found.name == name


def test_a_loss_in_long_windows_is_not_compared_with_gpt2s() -> None:
    both, one = ("loss", "loss_1024", "perplexity"), ("loss", "perplexity")
    assert [comparable("val_loss", metric, both) for metric in both] == ["", "loss", "perplexity"]
    assert [comparable("val_loss", metric, one) for metric in one] == list(one)
    assert comparable("lambada", "loss", both) == "loss"
