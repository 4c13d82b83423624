"""Two outputs beside each other. In: what the page says and what came; out: how they differ, or nothing."""

import math
import re

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w]*\d)", re.IGNORECASE)


def difference(expected: str, got: str, share: float = 0.0) -> str | None:
    """What is not equal, in one line; None if nothing.

    Words must be equal, but for the number of spaces. Numbers may differ by `share` of the expected one, and by
    one unit of its last digit, because another processor rounds otherwise.
    """
    wanted, found = _lines(expected), _lines(got)
    for number, (one, other) in enumerate(zip(wanted, found, strict=False), start=1):
        if _words(one) != _words(other):
            return f"line {number}: expected {one!r}, got {other!r}"
        for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
            if not _near(a, b, share):
                return f"line {number}: expected {a} within {share:.2%} or a unit of its last digit, got {b}: {other!r}"
    if len(wanted) != len(found):
        return f"expected {len(wanted)} lines, got {len(found)}; the last one is {found[-1] if found else ''!r}"
    return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").split("\n")]


def _words(line: str) -> list[str]:
    """A line with # for each number, without regard to spaces."""
    return NUMBER.sub("#", line).split()


def _near(expected: str, got: str, share: float) -> bool:
    a, b = (float(text.replace(",", "")) for text in (expected, got))
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    mantissa, _, exponent = expected.lower().replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) if "." in mantissa or exponent else 0.0
    return abs(a - b) <= max(share * abs(a), 1.0001 * unit)
