"""Pictures of the inside of a model. In: arrays; out: `Picture`s, each a PNG on light and on dark paper."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from regpt2.exploring.measure import Array

FONT = "DejaVu Sans"  # matplotlib brings it

# L layers, H heads, T tokens, C = n_embd, V = vocab_size


@dataclass(frozen=True)
class Palette:
    """The colors of `page.css`, and scales of color for numbers."""

    paper: str
    text: str
    faint: str
    grid: str
    future: str
    lines: tuple[str, str, str]
    signed: tuple[str, ...]  # from negative through the paper to positive
    weight: tuple[str, ...]  # from nothing to all


LIGHT = Palette(
    paper="#fdfcf9",
    text="#23221f",
    faint="#6f6c65",
    grid="#e6e3dc",
    future="#efece5",
    lines=("#35689f", "#bb4a29", "#4d8a57"),
    signed=("#7a2412", "#c2512f", "#eec4ae", "#fdfcf9", "#b4cce4", "#35689f", "#16365a"),
    weight=("#fdfcf9", "#b4cce4", "#35689f", "#0f2a49"),
)
DARK = Palette(
    paper="#17181a",
    text="#e4e1d9",
    faint="#9c9890",
    grid="#2e3034",
    future="#25272a",
    lines=("#7fb2e8", "#f0906e", "#86c490"),
    signed=("#ffd3c0", "#f0906e", "#74412f", "#17181a", "#2c4a69", "#7fb2e8", "#d9ebff"),
    weight=("#17181a", "#27466a", "#7fb2e8", "#eaf4ff"),
)

Draw = Callable[[Any, Any, Palette], None]


@dataclass(frozen=True)
class Picture:
    """The same drawing on light and dark paper, with a text alternative."""

    light: bytes
    dark: bytes
    alt: str
    width: int
    """On a page, in pixels of 1/96 inch."""


def wpe_picture(wpe: Array) -> Picture:  # (block_size, C)
    """The position embeddings as the lecture shows them: a row for each position, a column for each channel."""

    def draw(figure: Any, axes: Any, ink: Palette) -> None:
        image = _image(axes, wpe, ink.signed, bound := 3 * float(wpe.std()) or 1.0, low=-bound)
        _dress(axes, ink, xlabel="channel", ylabel="position")
        _color_bar(figure, axes, image, ink)

    positions, channels = wpe.shape
    return _picture((4.4, 3.7), draw, f"The matrix wpe, {positions:,} positions by {channels:,} channels, in color.")


def channels_picture(wpe: Array, channels: Sequence[int]) -> Picture:  # (block_size, C)
    """A few columns of the position embeddings, as curves."""

    def draw(figure: Any, axes: Any, ink: Palette) -> None:
        for channel, color in zip(channels, ink.lines, strict=False):
            axes.plot(wpe[:, channel], color=color, linewidth=1.1, label=f"channel {channel}")
        axes.grid(axis="y", color=ink.grid, linewidth=0.8)
        axes.margins(x=0.01, y=0.05)
        _dress(axes, ink, xlabel="position")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=ink.text, handlelength=1.2)

    named = ", ".join(map(str, channels))
    return _picture((4.4, 3.7), draw, f"Channels {named} of wpe as curves over {len(wpe):,} positions.")


def lengths_picture(lengths: Array) -> Picture:  # (V,)
    """The length of every token's embedding."""

    def draw(figure: Any, axes: Any, ink: Palette) -> None:
        size, alpha = (1.5, 0.35) if len(lengths) > 2000 else (4, 0.9)
        axes.plot(lengths, ".", markersize=size, markeredgewidth=0, alpha=alpha, color=ink.lines[0])
        axes.grid(axis="y", color=ink.grid, linewidth=0.8)
        axes.margins(x=0.02)
        axes.set_ylim(0, 1.05 * float(lengths.max()) or 1.0)
        _dress(axes, ink, xlabel="token id", ylabel="length")

    low, middle, high = np.quantile(lengths, (0, 0.5, 1))
    words = f"A dot for each of {len(lengths):,} tokens: embeddings {low:.3g} to {high:.3g} long, median {middle:.3g}."
    return _picture((4.4, 3.3), draw, words)


def heads_picture(weights: Array) -> Picture:  # (L, H, T, T)
    """The attention weights of every head: a row of maps for each layer."""
    L, H, T, _ = weights.shape
    tiles = np.full((L, H, T + 1, T + 1), -1, dtype=np.float32)  # below zero: the gap between maps
    tiles[..., :T, :T] = _without_future(weights)
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(L * (T + 1), H * (T + 1))[:-1, :-1]
    cell = min(1.3, 7.8 / H)  # inches

    def draw(figure: Any, axes: Any, ink: Palette) -> None:
        _image(axes, mosaic, ink.weight, 1.0, future=ink.future, gamma=0.5)
        _dress(axes, ink, xlabel="head", ylabel="layer")
        every = max(1, round(0.16 / cell))
        for axis, n in ((axes.xaxis, H), (axes.yaxis, L)):
            axis.set_ticks([i * (T + 1) + (T - 1) / 2 for i in range(0, n, every)], labels=range(0, n, every))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")

    words = f"{L} rows, one for each layer, of {H} attention maps, one for each head."
    return _picture((0.6 + cell * H, 0.6 + cell * L), draw, words)


def head_picture(weights: Array, tokens: Sequence[str], what: str) -> Picture:  # (T, T)
    """The attention weights of one head, with the tokens along both sides."""

    def draw(figure: Any, axes: Any, ink: Palette) -> None:
        image = _image(axes, _without_future(weights), ink.weight, 1.0, future=ink.future, gamma=0.5)
        axes.set_aspect("equal")
        _dress(axes, ink)
        labels = [drawable(token) for token in tokens]
        letters = {"fontsize": min(9.0, 240 / len(tokens)), "color": ink.text, "parse_math": False}
        axes.set_xticks(range(len(tokens)), labels, **letters)
        axes.set_yticks(range(len(tokens)), labels, **letters)
        axes.xaxis.tick_top()
        for label in axes.get_xticklabels():  # a single letter has room to stand upright
            label.set_rotation(90 if len(label.get_text()) > 1 else 0)
        for label in (one for one in axes.get_yticklabels() if one.get_text() == "␣"):
            label.set_verticalalignment("bottom")  # its ink is at the foot of the line
        _color_bar(figure, axes, image, ink, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])

    words = f"Attention map of {what}: a row for each of {len(tokens)} tokens, a column for each that it looks at."
    return _picture((4.4, 4.1), draw, words)


def drawable(token: str) -> str:
    """A token as a label: shortened, with an escape for what the font lacks or cannot show."""
    shown = "".join(c if c.isprintable() and ord(c) in _letters() else _escape(c) for c in token)
    return shown if len(shown) <= 12 else shown[:11] + "…"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@cache
def _letters() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.font_manager import FontProperties, findfont  # noqa: PLC0415
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    return frozenset(FT2Font(findfont(FontProperties(family=FONT))).get_charmap())


def _without_future(weights: Array) -> Array:
    """The weights, with NaN where a token may not look."""
    T = weights.shape[-1]
    return np.where(np.tri(T, dtype=bool), weights, np.float32(np.nan))


def _picture(inches: tuple[float, float], draw: Draw, alt: str) -> Picture:
    return Picture(_png(inches, draw, LIGHT), _png(inches, draw, DARK), alt, width=round(96 * inches[0]))


def _png(inches: tuple[float, float], draw: Draw, ink: Palette) -> bytes:
    """The bytes depend on the arrays alone."""
    import matplotlib  # noqa: PLC0415  (slow to import; only pictures need it)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with matplotlib.rc_context({"font.family": FONT, "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained", facecolor=ink.paper)
        draw(figure, figure.subplots(), ink)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=180, metadata={"Software": None})
    return out.getvalue()


def _image(
    axes: Any,
    values: Array,
    colors: Sequence[str],
    high: float,
    *,
    low: float = 0.0,
    future: str = "none",
    gamma: float = 1.0,
) -> Any:
    """The values in color, from `low` to `high`; lower ones are blank, NaN has the color `future`."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # noqa: PLC0415

    scale = LinearSegmentedColormap.from_list("", colors)
    extremes = {"bad": future, "under": "none" if gamma != 1 else colors[0]}
    norm = PowerNorm(gamma, low, high)
    return axes.imshow(values, cmap=scale.with_extremes(**extremes), norm=norm, aspect="auto", interpolation="nearest")


def _dress(axes: Any, ink: Palette, *, xlabel: str = "", ylabel: str = "") -> None:
    axes.set_facecolor(ink.paper)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=ink.faint)
    axes.set_xlabel(xlabel, color=ink.faint)
    axes.set_ylabel(ylabel, color=ink.faint)


def _color_bar(figure: Any, axes: Any, image: Any, ink: Palette, ticks: Sequence[float] | None = None) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=ticks, format="%g")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=ink.faint)
