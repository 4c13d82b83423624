"""Curves in a terminal. In: curves and a size in characters; out: lines of braille, each character 2 x 4 dots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from regpt2.pages.record import Column

BLANK = 0x2800
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a character, by column and row of the dot."""


@dataclass(frozen=True)
class Curve:
    """A line through points; values that are no number are gaps."""

    x: Column
    y: Column
    style: str


def draw(
    curves: Sequence[Curve], size: tuple[int, int], x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[Text]:
    """Lines of text, from the top. Where curves cross in a character, the last one gives it its color."""
    columns, rows = size
    bits = np.zeros((rows, columns), dtype=np.int64)
    styles = [["" for _ in range(columns)] for _ in range(rows)]
    for curve in curves:
        for x, y in _dots(curve, size, x_range, y_range):
            row, column = y // 4, x // 2
            bits[row, column] |= DOTS[x % 2][y % 4]
            styles[row][column] = curve.style
    lines = []
    for row in range(rows):
        line = Text()
        for column in range(columns):
            line.append(chr(BLANK + int(bits[row, column])) if bits[row, column] else " ", style=styles[row][column])
        lines.append(line)
    return lines


def _dots(
    curve: Curve, size: tuple[int, int], x_range: tuple[float, float], y_range: tuple[float, float]
) -> set[tuple[int, int]]:
    """The dots of a curve, as (x, y) from the top left; steps between points are filled."""
    wide, high = 2 * size[0] - 1, 4 * size[1] - 1
    found: set[tuple[int, int]] = set()
    before: tuple[float, float] | None = None
    for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            before = None
            continue
        at = (_place(x, x_range) * wide, (1 - _place(y, y_range)) * high)
        n_dots = (
            1
            if before is None
            else min(4 * (wide + high), math.ceil(max(abs(at[0] - before[0]), abs(at[1] - before[1]))))
        )
        start = before or at
        for k in range(1, n_dots + 1):
            share = k / n_dots
            dot = (round(start[0] + share * (at[0] - start[0])), round(start[1] + share * (at[1] - start[1])))
            if 0 <= dot[0] <= wide and 0 <= dot[1] <= high:
                found.add(dot)
        before = at
    return found


def _place(value: float, limits: tuple[float, float]) -> float:
    """0 at the lower limit, 1 at the upper one; beyond them, but not by much, so that steps stay countable."""
    low, high = limits
    return min(3.0, max(-3.0, (value - low) / (high - low))) if high > low else 0.5
