"""Panels drawn. In: `Panel`s; out: SVG that takes its colors from the page, and a PNG for a README."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regpt2.base.console import count
from regpt2.pages.charts.panels import Panel, Rule, Trace
from regpt2.pages.safe_html import Html, fill

RUN_COLORS = ("#35689f", "#bb4a29", "#2b7a55", "#8a5aa8", "#8a6a00", "#257384", "#b0457b", "#55534d")


LETTER_IN = 0.078
"""Inches of a letter of the labels, about: fonts differ."""
LINE_IN = 0.17
"""Inches from a line to the one below it."""
MARKER_IN = 0.17
"""Markers that are closer are beads on a string: then there are none, or a few that tell runs apart."""

PRINT = {  # the color of each role
    "paper": "#ffffff", "text": "#23221f", "faint": "#6f6c65", "grid": "#e6e3dc", "train": "#35689f", "val": "#bb4a29"
} | {f"run{place}": color for place, color in enumerate(RUN_COLORS, start=1)}  # fmt: skip
# In SVG placeholders, which `_as_html` turns into the page's CSS variables: curves follow its light or dark theme.
THEMED = {role: f"#0000{place:02x}" for place, role in enumerate(PRINT, start=1)}


Paint = Callable[[Any, dict[str, str]], object]
"""Draws into a matplotlib figure, in the colors of these roles."""


def svg(panel: Panel, inches: tuple[float, float], name: str = "") -> Html:
    """A panel as an element of a page, with a description for screen readers."""
    width, height = inches

    def paint(figure: Any, ink: dict[str, str]) -> None:
        above = 0.65 if panel.across.tokens_at else 0.4
        left = 0.55 if panel.tick.kind == "percent" else 0.42  # room for the labels
        axes = figure.add_axes((left / width, 0.28 / height, 1 - (left + 0.13) / width, 1 - above / height))
        draw(axes, panel, ink, ticks=4 if width < 5 else 8)

    return painted(paint, inches, name or panel.name, panel.description())


def painted(paint: Paint, inches: tuple[float, float], name: str, description: str) -> Html:
    """A drawing as an element of a page; `name` is unique on the page, `description` is for screen readers."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a report needs it)

    with settings(name):
        figure = Figure(figsize=inches)
        paint(figure, THEMED)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _as_html(out.getvalue(), name, plain(description, 2000))


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG; the same figure gives the same bytes."""
    out = io.BytesIO()
    with settings("picture"):
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def overview(panels: Sequence[Panel], title: str, subtitle: str) -> Any:
    """A matplotlib figure: loss and, beside it, HellaSwag, CORE or bits per byte; the learning rate below."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    by_name = {panel.name: panel for panel in panels}
    beside = by_name.get("hellaswag") or by_name.get("core") or by_name.get("bits")
    columns = 2 if beside else 1
    with settings("picture"):
        figure = Figure(figsize=(10, 6.2), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, columns, height_ratios=[3.2, 1], width_ratios=[1.5, 1][:columns],
            left=0.065, right=0.975, top=0.79, bottom=0.075, hspace=0.4, wspace=0.17,
        )  # fmt: skip
        for place, panel in (((0, 0), by_name.get("loss")), ((0, 1), beside), ((1, slice(None)), by_name.get("lr"))):
            if panel is not None:
                print_panel(figure.add_subplot(grid[place]), panel, ticks=4 if panel is beside else 6)
        heading(figure, title, subtitle, (0.935, 0.885))
    return figure


def heading(figure: Any, title: str, subtitle: str, heights: tuple[float, float], *, size: float = 17) -> None:
    """Title and subtitle above a figure, at these shares of its height; a smaller title may take two lines."""
    across = round(122 / size * figure.get_figwidth())  # characters that fit
    lines = textwrap.wrap(plain(title, 2 * across), across)[:2] if size < 17 else [plain(title)]
    above = "top" if size < 17 else "baseline"
    figure.text(
        0.03,
        heights[0],
        "\n".join(lines),
        fontsize=size,
        color=PRINT["text"],
        parse_math=False,
        va=above,
        linespacing=1.3,
    )
    figure.text(0.03, heights[1], plain(subtitle), fontsize=10.5, color=PRINT["faint"], parse_math=False)


def column(panels: Sequence[Panel]) -> Any:
    """A matplotlib figure of these panels, one below the other."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    with settings("column"):
        figure = Figure(figsize=(10, 3.2 * len(panels)), dpi=160, facecolor="white", layout="constrained")
        for place, panel in enumerate(panels, start=1):
            print_panel(figure.add_subplot(len(panels), 1, place), panel, ticks=6)
    return figure


def print_panel(axes: Any, panel: Panel, ticks: int) -> None:
    """Draw a panel below its title, in the colors of paper."""
    axes.set_title(panel.title, loc="left", fontsize=10, color=PRINT["text"], pad=8)
    draw(axes, panel, PRINT, ticks=ticks, above=False)


def plain(text: str, most: int = 120) -> str:
    """Text for a drawing; characters that the font may lack, or that could be markup, become question marks."""
    return re.sub(r"[^\w .,:;+/%()=·±~^-]", "?", text[:most], flags=re.ASCII).replace("\n", " ")


def settings(salt: str) -> Any:
    """Letters stay text, so that the page's font applies; ids are not random, so that a redraw gives equal bytes."""
    import matplotlib  # noqa: PLC0415

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "path.simplify": True})


def _as_html(markup: str, name: str, label: str) -> Html:
    """matplotlib's file as an element of a page: no header, no URLs, unique ids, the page's colors."""
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", markup, flags=re.S)
    head, body = markup[: markup.index(">")], markup[markup.index(">") :]
    markup = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head) + body
    markup = re.sub(r'\bid="', f'id="{name}-', markup).replace("url(#", f"url(#{name}-")
    markup = markup.replace('xlink:href="#', f'href="#{name}-')
    for role, stand_in in THEMED.items():
        markup = markup.replace(stand_in, f"var(--{role})")
    return Html(markup.replace("<svg", fill('<svg role="img" aria-label="{label}"', label=label), 1).strip())


def draw(axes: Any, panel: Panel, ink: dict[str, str], *, ticks: int, above: bool = True) -> None:
    """Draw a panel into axes, with about `ticks` ticks; `above`: also a scale of tokens along the upper edge."""
    _dress(axes, panel, ink, ticks)
    if above and panel.across.tokens_at:
        _token_axis(axes, panel, ink)
    for trace in panel.traces:
        _trace(axes, trace, ink, brief=ticks < 5)
    if panel.log:
        axes.set_yscale("log")
        axes.tick_params(which="minor", length=0, labelleft=False)
        axes.yaxis.set_major_locator(_log_locator(*axes.get_ylim()))
    else:
        axes.yaxis.set_major_locator(_locator(5, integer=False))
    axes.yaxis.set_major_formatter(lambda value, _: panel.tick(value))
    if panel.from_zero:
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    elif limits := panel.limits():
        axes.set_ylim(*limits)
    for rule in panel.rules:
        _rule(axes, rule, panel, ink)
    if panel.name == "loss" and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="upper right", frameon=False, labelcolor=ink["text"], handlelength=2.2, fontsize=9.5)


def _dress(axes: Any, panel: Panel, ink: dict[str, str], ticks: int) -> None:
    """Thin rules instead of a box, from 0 to the last step; a dotted line where the run was resumed."""
    across = panel.across
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(ink["grid"])
    axes.tick_params(length=0, labelcolor=ink["faint"], labelsize=9, pad=5)
    axes.grid(axis="y", color=ink["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    last = max(1.0, across.last)
    axes.set_xlim(-0.01 * last, 1.01 * last)  # markers at both ends are whole
    low, high = axes.get_xlim()
    places = [float(place) for place in _locator(ticks).tick_values(low, high) if low <= place <= high]
    axes.set_xticks(places, [_across(x, place, across.unit) for place, x in enumerate(places)])
    _keep_inside(axes, axes.get_xticklabels(), places)
    for step in across.resumes:
        axes.axvline(step, color=ink["faint"], linewidth=0.8, linestyle=":")


def _keep_inside(axes: Any, labels: Sequence[Any], places: Sequence[float]) -> None:
    """Let a last label that would leave the picture end at its tick."""
    box, whole_in, (low, high) = axes.get_position(), axes.figure.get_figwidth(), axes.get_xlim()
    at = box.x0 + box.width * (places[-1] - low) / (high - low)
    if LETTER_IN * len(labels[-1].get_text()) / 2 > (1 - at) * whole_in:
        labels[-1].set_horizontalalignment("right")


def _locator(ticks: int, *, integer: bool = True) -> Any:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    return MaxNLocator(ticks, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _log_locator(low: float, high: float) -> Any:
    """Ticks at powers of ten, and where these are few at 2 and 5 too."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    return LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,))


def _token_axis(axes: Any, panel: Panel, ink: dict[str, str]) -> None:
    """The same ticks above, in tokens. Each is looked up: a batch ramp makes the scale nonlinear."""
    tokens_at = panel.across.tokens_at
    assert tokens_at is not None
    above = axes.secondary_xaxis("top")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, labelcolor=ink["faint"], labelsize=9, pad=4)
    places = axes.get_xticks()
    tokens = [count(tokens) if step > 0 else "" for step, tokens in zip(places, tokens_at(places), strict=True)]
    above.set_xticks(places, [shown + " tokens" * (place == 1) for place, shown in enumerate(tokens)])
    _keep_inside(axes, above.get_xticklabels(), places)


def _trace(axes: Any, trace: Trace, ink: dict[str, str], *, brief: bool) -> None:
    """A line, with markers where there is room for them, or where it is a single point."""
    finite = np.isfinite(trace.x) & np.isfinite(trace.y)
    n, look = int(finite.sum()), trace.look
    if not n:
        return
    style: dict[str, Any] = {"color": ink[look.ink], "linewidth": look.width, "alpha": look.alpha}
    room = axes.get_position().width * axes.figure.get_figwidth() / MARKER_IN
    if n == 1 or (look.marker and n <= room):
        style |= {"marker": look.marker or "o", "markersize": 3.5}
    elif look.marker and look.ink.startswith("run"):  # one of several
        style |= {"marker": look.marker, "markersize": 4, "markevery": (n // 16, max(1, n // 8))}
    named = trace.label if brief else trace.about or trace.label
    label = plain(named, 60) if named else "_"
    axes.plot(trace.x, trace.y, linestyle=look.dash, solid_joinstyle="round", label=label, **style)
    if trace.spread is not None and np.isfinite(trace.spread).any():
        low, high = trace.y - trace.spread, trace.y + trace.spread
        axes.fill_between(trace.x, low, high, color=ink[look.ink], alpha=0.16, linewidth=0)


def _rule(axes: Any, rule: Rule, panel: Panel, ink: dict[str, str]) -> None:
    """A level, its name above it: at the left, or at the right if the rule asks for it or a curve is in the way."""
    axes.axhline(rule.value, color=ink["faint"], linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    text = f"{plain(rule.label, 40)} {panel.tick(rule.value)}"
    left_is_crossed, right_is_crossed = (_is_crossed(axes, panel, rule.value, text, side) for side in ("left", "right"))
    on_right = rule.on_right or (left_is_crossed and not right_is_crossed)
    at, shift, side = (1, -2, "right") if on_right else (0, 2, "left")
    axes.annotate(
        text, xy=(at, rule.value), xycoords=("axes fraction", "data"),
        xytext=(shift, 4), textcoords="offset points", ha=side, color=ink["faint"], fontsize=9,
        bbox={"facecolor": ink["paper"], "alpha": 0.75, "linewidth": 0, "pad": 0},
    )  # fmt: skip


def _is_crossed(axes: Any, panel: Panel, value: float, text: str, side: str) -> bool:
    """Would a curve go through the name of a level, above it at this side?"""
    box, (left, right), (low, high) = axes.get_position(), axes.get_xlim(), axes.get_ylim()
    across = LETTER_IN * len(text) / (box.width * axes.figure.get_figwidth()) * (right - left)
    above = value + LINE_IN / (box.height * axes.figure.get_figheight()) * (high - low)
    x = np.linspace(left, left + across, 50) if side == "left" else np.linspace(right - across, right, 50)
    for trace in (one for one in panel.traces if one.look.alpha == 1):
        known = np.isfinite(trace.x) & np.isfinite(trace.y)
        y = np.interp(x, trace.x[known], trace.y[known], np.nan, np.nan) if known.any() else np.full(50, np.nan)
        if ((np.fmin(y[1:], y[:-1]) < above) & (np.fmax(y[1:], y[:-1]) > value)).any():
            return True
    return False


def _across(x: float, place: int, unit: str) -> str:
    """The label of a tick; the first after 0 has the unit."""
    shown = f"{x:,.0f}" if unit == "steps" and x < 1e6 else count(x)
    unit = unit.removesuffix("s") if shown == "1" else unit
    return shown + (f" {unit}" if place == 1 else "")
