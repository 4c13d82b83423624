"""Is a difference more than chance? In: paired differences; out: mean, interval and p-values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
MOST_FLIPPED = 16  # pairs: 65,536 patterns of signs


@dataclass(frozen=True)
class Paired:
    """The mean of differences, one for each seed, and how certain it is."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    """The 95 % confidence interval, by Student's t."""
    p: float
    """Two-sided, that the true mean is 0: the paired t-test."""
    p_signs: float | None
    """The same by the exact sign-flip test, which needs no normal distribution; it cannot be less than 2^(1-n)."""


def paired(differences: Sequence[float]) -> Paired | None:
    """The paired t-test and, beside it, the sign-flip test; None for fewer than two pairs."""
    n = len(differences)
    if n < 2:
        return None
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1))
    error = sd / math.sqrt(n)
    half = student_t_quantile(1 - ALPHA, n - 1) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Paired(n, mean, sd, mean - half, mean + half, student_t_p(t, n - 1), sign_flip_p(differences))


def student_t_p(t: float, df: int) -> float:
    """The chance of a |T| of at least |t| for Student's t of `df` degrees of freedom.

    The finite sums for whole df: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for j in range(1, (df - 1) // 2 + 1 if odd else df // 2 + 1):
        total += term
        term *= cosine**2 * (2 * j / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


def student_t_quantile(confidence: float, df: int) -> float:
    """The t that |T| stays below with this probability."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_p(middle, df) > 1 - confidence else (low, middle)
    return (low + high) / 2


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """The share of all sign patterns whose sum is at least as far from 0 as the actual one; None for too many pairs."""
    values, n = np.asarray(differences, dtype=np.float64), len(differences)
    if n > MOST_FLIPPED:
        return None
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n)
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-12)))  # tolerates the rounding of a sum


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: keeps the overall error rate at 0.05 when several differences are tested."""
    adjusted, most, left = [1.0] * len(ps), 0.0, len(ps)
    for place in sorted(range(len(ps)), key=lambda place: ps[place]):
        most = max(most, min(1.0, left * ps[place]))
        adjusted[place] = most
        left -= 1
    return adjusted
