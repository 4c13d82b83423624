"""The tests of a difference, against published tables, a famous experiment, brute force and scipy."""

import itertools
import math
import random

import pytest

from regpt2.run.comparing.significance import holm, paired, sign_flip_p, student_t_p, student_t_quantile

# Hours of sleep won by one drug over another, ten patients: Student, The probable error of a mean, 1908.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_quantiles_are_those_of_every_table(df: int, t: float) -> None:
    assert student_t_quantile(0.95, df) == pytest.approx(t, abs=6e-4)


def test_students_own_experiment() -> None:
    found = paired(SLEEP)
    assert found is not None
    assert (found.n, found.mean) == (10, pytest.approx(1.58))
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.low, found.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


def test_student_t_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (*range(1, 40), 199, 1000):
        for t in (0.0, 1e-3, 0.5, 1.0, 2.0, 3.3, 10.0):
            assert student_t_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-13)
            assert student_t_p(-t, df) == student_t_p(t, df)
        assert student_t_quantile(0.95, df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
    generator = random.Random(1)
    for n in (2, 3, 4, 5, 8, 13):
        differences = [generator.gauss(0.3, 1.0) for _ in range(n)]
        found, theirs = paired(differences), stats.ttest_1samp(differences, 0.0)
        interval = theirs.confidence_interval(0.95)
        assert found is not None
        assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, interval.low, interval.high))


def test_all_signs_alike_give_the_least_p_that_there_is() -> None:
    for n in (1, 2, 4, 8, 16):
        assert sign_flip_p([0.1 * (i + 1) for i in range(n)]) == 2.0 ** (1 - n)
    assert sign_flip_p([1.0] * 17) is None, "131,072 patterns are not counted"


def test_the_sign_flip_test_counts_every_pattern() -> None:
    generator = random.Random(2)
    for n in (3, 5, 8):
        differences = [generator.gauss(0.5, 1.0) for _ in range(n)]
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
                for signs in itertools.product((1, -1), repeat=n)]  # fmt: skip
        as_far = sum(one >= abs(sum(differences)) - 1e-12 for one in sums)
        assert sign_flip_p(differences) == as_far / 2**n


def test_no_pair_or_one_gives_no_test_and_equal_runs_no_difference() -> None:
    assert paired([]) is None and paired([0.1]) is None
    same, shifted = paired([0.0, 0.0, 0.0]), paired([0.5, 0.5, 0.5])
    assert same is not None and (same.p, same.low, same.high) == (1.0, 0.0, 0.0)
    assert shifted is not None and shifted.p == 0.0


def test_holm_as_r_has_it() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_a_true_null_is_rejected_as_often_as_alpha_says() -> None:
    generator, n = random.Random(3), 2000
    tests = [paired([generator.gauss(0, 1) for _ in range(4)]) for _ in range(n)]
    rejected = sum(one is not None and one.p < 0.05 for one in tests)
    covered = sum(one is not None and one.low <= 0 <= one.high for one in tests)
    assert abs(rejected - 0.05 * n) < 4 * math.sqrt(n * 0.05 * 0.95)  # four standard deviations of a count
    assert covered == n - rejected, "the interval and the test say the same"
