"""Bars drawn. In: `Bar`s from top to bottom; out: a PNG for a README."""

from collections.abc import Sequence
from dataclasses import dataclass

from regpt2.pages.charts.draw import PRINT, heading, plain, png


@dataclass(frozen=True)
class Bar:
    """A name, a length, and words at its end. A bar without a length is its words alone."""

    name: str
    value: float | None
    text: str
    ink: str = "train"
    """A role of `PRINT`."""


def bars_picture(bars: Sequence[Bar], title: str, subtitle: str) -> bytes:
    """The PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a picture needs it)

    rows = len(bars)
    inches = 1.25 + 0.34 * rows
    figure = Figure(figsize=(10, inches), dpi=160, facecolor="white")
    axes = figure.add_axes((0.2, 0.2 / inches, 0.77, 0.34 * rows / inches))
    longest = max((bar.value for bar in bars if bar.value is not None), default=1.0)
    for row, bar in enumerate(bars):
        if bar.value is not None:
            axes.barh(row, bar.value, height=0.66, color=PRINT[bar.ink])
        ink = PRINT["faint" if bar.value is None else "text"]
        at = (bar.value or 0.0) + 0.008 * longest
        axes.text(
            at, row, plain(bar.text.replace("'", ""), 100), va="center", fontsize=9.5, color=ink, parse_math=False
        )
    names = [plain(bar.name, 40) for bar in bars]
    axes.set_yticks(range(rows), names, fontsize=10, color=PRINT["text"], parse_math=False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * longest)  # room for the words of the longest
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(PRINT["grid"])
    heading(figure, title, subtitle, (1 - 0.45 / inches, 1 - 0.78 / inches))
    return png(figure)
