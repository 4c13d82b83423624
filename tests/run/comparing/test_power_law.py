"""A fitted power law, against planted laws, scipy's least squares, and a search by brute force."""

import math
from itertools import product

import numpy as np
import pytest

from regpt2.run.comparing.scaling.law import exponents_of, fit, floors_of, predicted

E, A, EXPONENT = 1.2, 40.0, 0.35
SIZES = np.array([25e3, 50e3, 100e3, 200e3, 400e3])
N_SETS = 200


def true_loss(x: np.ndarray | float) -> np.ndarray | float:
    return E + A * x**-EXPONENT


def noisy(generator: np.random.Generator, n_sizes: int, n_seeds: int, sd: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.repeat(SIZES[:n_sizes], n_seeds)
    return x, true_loss(x) + generator.normal(0, sd, len(x))


def test_a_law_without_noise_is_found_exactly_whatever_the_unit_of_x() -> None:
    for unit in (1.0, 1e-4, 1e12):
        law = fit(SIZES * unit, true_loss(SIZES))
        assert (law.floor, law.exponent) == (pytest.approx(E, abs=1e-6), pytest.approx(EXPONENT, abs=1e-6))
        assert law.amount_at_one == pytest.approx(A * unit**EXPONENT, rel=1e-5)
        assert law(SIZES * unit) == pytest.approx(true_loss(SIZES), abs=1e-9)
    pure = fit(SIZES, A * SIZES**-0.2, with_floor=False)
    assert (pure.floor, pure.exponent, pure.amount_at_one) == (0, pytest.approx(0.2), pytest.approx(A))


def test_the_fit_is_that_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(1)
    for n_sizes, n_seeds in ((4, 1), (4, 3), (5, 2)):
        x, y = noisy(generator, n_sizes, n_seeds, 0.003)
        law = fit(x, y)
        start = (E, law.amount, EXPONENT)
        theirs, _ = optimize.curve_fit(lambda x, e, a, k: e + a * (x / law.unit) ** -k, x, y, p0=start, ftol=1e-14)
        assert [law.floor, law.amount, law.exponent] == pytest.approx(theirs, abs=1e-5)  # both stop near the minimum


def test_no_law_of_a_fine_grid_has_fewer_squares() -> None:
    x, y = noisy(np.random.default_rng(2), 5, 2, 0.02)
    law = fit(x, y)
    ours = ((law(x) - y) ** 2).sum()
    for floor, exponent in product(np.linspace(0, y.min(), 60), np.geomspace(0.01, 2, 120)):
        powers = x**-exponent
        amount = max(0, (powers @ (y - floor)) / (powers @ powers))
        assert ((floor + amount * powers - y) ** 2).sum() >= ours * (1 - 1e-9)


@pytest.mark.parametrize(("n_sizes", "n_seeds"), [(4, 2), (5, 1), (3, 3)])
def test_intervals_hold_what_they_state_in_about_95_of_100_sets(n_sizes: int, n_seeds: int) -> None:
    generator, ahead, sd = np.random.default_rng(3), 2 * SIZES[n_sizes - 1], 0.003
    hits = np.zeros(4)
    for _ in range(N_SETS):
        law = fit(*noisy(generator, n_sizes, n_seeds, sd))
        came = float(true_loss(ahead)) + generator.normal(0, sd, n_seeds).mean()
        hits += [
            E in floors_of(law),
            EXPONENT in exponents_of(law),
            true_loss(ahead) in predicted(law, ahead, 0),
            came in predicted(law, ahead, n_seeds),
        ]
    shares = hits / N_SETS
    # Four standard deviations of a count below 0.95; above, the switch to the larger of two variances costs some width.
    assert (shares > 0.95 - 4 * math.sqrt(0.95 * 0.05 / N_SETS)).all() and (shares < 1).any(), shares


@pytest.mark.parametrize("sd", [0.003, 0.02, 0.2])
def test_an_interval_ends_where_a_search_over_all_laws_does(sd: float) -> None:
    """All E >= 0, A >= 0 and exponents of a fine grid whose squares stay within the limit: that is the definition."""
    x, y = noisy(np.random.default_rng(7), 4, 3, sd)
    law, ahead = fit(x, y), 2 * SIZES[3]
    t = {1: 12.706, 9: 2.262}[law.freedom]  # any table of Student's t, two-sided, 95 %
    means = np.repeat(y.reshape(4, 3).mean(1), 3) if law.lacks else y
    limit = ((law(x) - means) ** 2).sum() + law.variance * t**2
    likely, seen = floors_of(law), []
    reach = likely.high - likely.low
    grid = np.linspace(max(0, likely.low - reach), likely.high + reach, 400)[:, None]
    for exponent in np.geomspace(0.001, 4, 1500):
        powers, floors = x**-exponent, grid
        best = (means - floors) @ powers / (powers @ powers)  # A for each E
        left = limit - ((floors + best[:, None] * powers - means) ** 2).sum(1)
        spread = np.sqrt(np.maximum(0, left) / (powers @ powers))
        inside = (left >= 0) & (best + spread >= 0)
        ends = [np.maximum(0, best - spread)[inside], (best + spread)[inside]]
        seen += [(floors[inside, 0] + end * ahead**-exponent) for end in ends]
    values, found = np.concatenate(seen), predicted(law, ahead, 0)
    width = found.high - found.low
    assert found.low <= values.min() + 1e-3 * width and found.high >= values.max() - 1e-3 * width
    assert [values.min(), values.max()] == pytest.approx([found.low, found.high], abs=0.03 * width)


def test_seeds_that_share_their_luck_do_not_make_the_prediction_too_sure() -> None:
    """The same seed has the same order of the data at every size: all its losses are off alike."""
    generator, ahead, hits = np.random.default_rng(4), 2 * SIZES[4], 0
    for _ in range(100):
        luck = generator.normal(0, 0.004, 2)
        x, y = noisy(generator, 5, 2, 0.002)
        law = fit(x, y + np.tile(luck, 5))
        hits += float(true_loss(ahead)) + luck.mean() + generator.normal(0, 0.002, 2).mean() in predicted(law, ahead, 2)
    assert hits >= 90


def test_an_e_that_the_points_do_not_determine_reaches_zero_and_widens_the_prediction() -> None:
    generator = np.random.default_rng(5)
    x, y = noisy(generator, 4, 4, 0.02)
    law, sure = fit(x, y), fit(x, y, with_floor=False)
    assert floors_of(law).low == 0 < floors_of(law).high < y.min()
    wide, narrow = predicted(law, 1e9, 2), predicted(sure, 1e9, 2)
    assert wide.high - wide.low > narrow.high - narrow.low
    assert wide.low <= narrow.low + 0.05, "laws with E = 0 are among those that count"
    precise = fit(*noisy(generator, 5, 2, 1e-4))
    assert floors_of(precise).low > 1


def test_neither_the_fit_nor_an_interval_takes_e_below_zero_or_a_law_that_rises() -> None:
    assert fit(SIZES, 5 - 0.3 * np.log(SIZES)).floor == 0, "it falls faster than any power law with E above 0"
    x, y = noisy(np.random.default_rng(5), 4, 2, 0.05)
    assert 0 == floors_of(fit(x, y)).low < floors_of(fit(x, y)).high < 2 * y.max(), "a law that rises has any E"


def test_the_noise_of_new_runs_adds_its_variance() -> None:
    """With so little noise the law is a plane, where variances add."""
    law = fit(*noisy(np.random.default_rng(9), 5, 2, 1e-5))
    halves = [(one.high - one.low) / 2 for one in (predicted(law, 8e5, n_runs) for n_runs in (0, 1, 4))]
    t = 2.365  # seven degrees of freedom, any table
    for half, n_runs in zip(halves[1:], (1, 4), strict=True):
        assert half**2 - halves[0] ** 2 == pytest.approx(t**2 * law.variance / n_runs, rel=0.02)


def test_a_narrow_interval_of_the_exponent_is_not_rounded_to_a_grid() -> None:
    law = fit(*noisy(np.random.default_rng(8), 5, 2, 1e-5))
    found = exponents_of(law)
    assert found.low < law.exponent < found.high and found.high - found.low < 0.002
    assert EXPONENT in found


def test_sizes_off_the_law_by_more_than_seeds_are_seen_and_widen_it() -> None:
    x, y = noisy(np.random.default_rng(6), 5, 3, 0.001)
    bent = y + np.where(x == SIZES[2], 0.05, 0)
    assert not fit(x, y).lacks and fit(x, bent).lacks
    assert fit(x, bent).freedom == 2, "five sizes less three parameters: seeds do not count"
    assert fit(x, bent).variance > 100 * fit(x, y).variance


def test_three_runs_leave_nothing_for_an_interval() -> None:
    law = fit(SIZES[:3], true_loss(SIZES[:3]))
    assert law.freedom == 0 and math.isnan(law.variance)
    for one in (exponents_of(law), floors_of(law), predicted(law, 1e6, 1)):
        assert math.isnan(one.low) and math.isnan(one.high)
    pure = fit(SIZES[:3], true_loss(SIZES[:3]), with_floor=False)
    assert pure.freedom == 1 and float(pure(1e6)) in predicted(pure, 1e6, 1)


def test_a_loss_that_rises_has_no_falling_law() -> None:
    law = fit(SIZES, [1.0, 1.1, 1.2, 1.3, 1.4])
    assert law.amount == pytest.approx(0, abs=1e-9) and law.floor == pytest.approx(1.2)
