"""How a chart writes its values. In: a number; out: text. A format is data: a page writes values likewise."""

import math
from dataclasses import dataclass

from regpt2.base.console import count

MILLION = 1e6


@dataclass(frozen=True)
class Format:
    """One way to write numbers; `live/chart.js` knows the same kinds."""

    kind: str
    """digits, percent, short, count, general"""
    digits: int = 4

    def __call__(self, value: float) -> str:
        """The number as text."""
        match self.kind:
            case "digits":  # after the point, at most
                fixed = f"{value:.{self.digits}f}".rstrip("0").rstrip(".")
                return fixed if abs(value) < MILLION else count(value)
            case "percent":
                return f"{100 * value:.{self.digits}g} %"
            case "short":
                return _short(value)
            case "count":
                return count(value)
        return f"{value:.{self.digits}g}"


def _short(value: float) -> str:
    """6e-4 rather than 0.0006."""
    if not value or not math.isfinite(value):
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
