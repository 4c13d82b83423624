"""A power law as a picture. In: sizes, laws, predictions; out: points, fits, a band, what was held out, log-log."""

import math
from typing import Any

import numpy as np

from regpt2.base.console import count
from regpt2.pages.charts.draw import plain
from regpt2.run.comparing.scaling.forecast import Forecast, Size
from regpt2.run.comparing.scaling.law import predicted
from regpt2.run.comparing.scaling.sizes import VARIABLES

N_BAND, N_CURVE = 25, 120  # points; the band costs a profile each


def description(found: Forecast) -> str:
    """The picture in words, for screen readers."""
    points = "; ".join(
        f"{count(size.x)}: {size.mean:.4f}{', held out' * size.is_held_out}" for size in found.sizes if size.losses
    )
    return f"Loss over {VARIABLES[found.over]}. {points}. {found.answer()}"


def paint(figure: Any, ink: dict[str, str], found: Forecast, where: Any = None) -> None:
    """Both axes logarithmic: dots for seeds, diamonds for means, the law with its band, and twice the largest size."""
    width, height = figure.get_size_inches()
    axes = where or figure.add_axes((0.55 / width, 0.52 / height, 1 - 0.75 / width, 1 - 0.67 / height))
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = [size for size in found.sizes if size.losses]
    if found.laws:
        _laws(axes, ink, found)
    for size in sizes:
        _size(axes, ink, size)
    _ticks(axes, ink, found, brief=width < 5)
    axes.set_xlabel(VARIABLES[found.over], color=ink["faint"], fontsize=9)
    if found.laws:
        axes.legend(frameon=False, labelcolor=ink["text"], handlelength=2.2, fontsize=9, loc="upper right")


def _laws(axes: Any, ink: dict[str, str], found: Forecast) -> None:
    fitted = found.laws[found.main]
    first, last = found.sizes[0].x, found.ahead
    x = np.geomspace(first, last, N_CURVE)
    fits = [size for size in found.sizes if not size.is_held_out]
    name = f"law fitted to {len(fits)} sizes" if len(fits) < len(found.sizes) else "law fitted to all sizes"
    axes.plot(x, fitted.law(x), color=ink["train"], linewidth=1.7, label=plain(name))
    if fitted.has_interval:
        at = np.geomspace(first, last, N_BAND)
        ends = [predicted(fitted.law, float(one), found.n_seeds) for one in at]
        low, high = [one.low for one in ends], [one.high for one in ends]
        axes.fill_between(at, low, high, color=ink["train"], alpha=0.14, linewidth=0, label="its 95 % interval")
    bare = found.laws[-1]
    if bare is not fitted:
        axes.plot(
            x, bare.law(x), color=ink["faint"], linewidth=1.1, linestyle=(0, (2, 1.5)), label="pure power law, E = 0"
        )
    if found.whole is not None and len(fits) < len(found.sizes):
        value, ends_ahead = float(found.whole.law(last)), found.ahead_interval()
        axes.plot([last], [value], "s", color=ink["run3"], markersize=6, label="all sizes: twice the largest")
        if math.isfinite(ends_ahead.low):
            axes.plot([last, last], [ends_ahead.low, ends_ahead.high], color=ink["run3"], linewidth=2)


def _size(axes: Any, ink: dict[str, str], size: Size) -> None:
    color = ink["val" if size.is_held_out else "train"]
    axes.plot([size.x] * len(size.losses), size.losses, "o", color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
    face = ink["paper"] if size.is_held_out else color
    label = "held out" if size.is_held_out else "_"
    axes.plot(
        [size.x], [size.mean], "D", color=color, markersize=6.5, markerfacecolor=face, markeredgewidth=1.6, label=label
    )


def _ticks(axes: Any, ink: dict[str, str], found: Forecast, *, brief: bool) -> None:
    """The sizes themselves below; round losses at the left. Limits fit the points, not a wide band."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(ink["grid"])
    axes.grid(axis="y", color=ink["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    at = [size.x for size in found.sizes] + [found.ahead]
    apart = 0.16 if brief else 0.09  # of the width: ticks nearer to each other would overlap
    whole, kept = math.log(at[-1] / at[0]), [at[0]]
    for x in at[1:]:
        if math.log(x / kept[-1]) > apart * whole:
            kept.append(x)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x < 1e15 else f"{x:.2g}")
    losses = [loss for size in found.sizes for loss in size.losses] or [1.0]
    if found.whole is not None:
        losses.append(float(found.whole.law(found.ahead)))
    low, high = min(losses), max(losses)
    margin = (high / low) ** 0.15 if high > low else 1.02
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(low / margin, high * margin)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_ylim(low / margin, high * margin)
    axes.tick_params(which="both", length=0, labelcolor=ink["faint"], labelsize=9, pad=5)
