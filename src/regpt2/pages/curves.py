"""The curves of a run. In: a `Record`; out: SVG that takes its colors from the page, and a PNG for a README."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from regpt2.base.console import count
from regpt2.pages.markup import Html
from regpt2.pages.record import Column, Record, number, numbers, smooth, thin


@dataclass(frozen=True)
class Ink:
    """What each thing is drawn in."""

    text: str
    faint: str
    grid: str
    train: str
    val: str


PRINT = Ink(text="#23221f", faint="#75726b", grid="#e6e3dc", train="#35689f", val="#c2512f")
# In SVG: stand-ins, which `_as_html` turns into the page's CSS variables, so that curves follow light and dark.
THEMED = Ink(text="#000001", faint="#000002", grid="#000003", train="#000004", val="#000005")

Draw = Callable[[Any, Record, Ink], None]


@dataclass(frozen=True)
class Chart:
    """A drawing with its title; a wide one comes again at the width of a phone, as `svg_phone`."""

    title: str
    svg: Html
    svg_phone: Html | None = None


def charts(record: Record) -> list[Chart]:
    """What there is to draw of this run, the loss first."""
    drawn = []
    if len(record.train["step"]) or record.validations:
        svg, svg_phone = (
            _svg(record, _draw_loss, f"loss{width:.0f}", (width, 3.5), tokens=True) for width in (8.4, 4.4)
        )
        drawn.append(Chart("Loss, nats per token", svg, svg_phone))
    if np.isfinite(numbers(record.validations, "bits_per_byte")).any():
        drawn.append(Chart("Validation, bits per byte", _svg(record, _draw_bits, "bits")))
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_s": "Tokens per second"}
    for column, title in titles.items():
        if np.isfinite(record.train[column]).any():
            drawn.append(Chart(title, _svg(record, _DRAW[column], column)))
    return drawn


def picture(record: Record, title: str, subtitle: str) -> bytes:
    """The PNG: loss and, where known, bits per byte; the learning rate below."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a report needs it)

    with _settings("picture"):
        figure = Figure(figsize=(10, 6.2), dpi=160, facecolor="white")
        has_bits = bool(np.isfinite(numbers(record.validations, "bits_per_byte")).any())
        grid = figure.add_gridspec(
            2,
            2 if has_bits else 1,
            height_ratios=[3.2, 1],
            width_ratios=[1.5, 1] if has_bits else [1],
            left=0.065,
            right=0.975,
            top=0.79,
            bottom=0.075,
            hspace=0.36,
            wspace=0.16,
        )
        panels: list[tuple[Any, str, Draw]] = [(grid[0, 0], "Loss, nats per token", _draw_loss)]
        panels += [(grid[0, 1], "Validation, bits per byte", _draw_bits)] if has_bits else []
        panels += [(grid[1, :], "Learning rate", _draw_lr)]
        for place, name, draw in panels:
            axes = figure.add_subplot(place)
            axes.set_title(name, loc="left", fontsize=10, color=PRINT.text, pad=8)
            _dress(axes, record, PRINT)
            draw(axes, record, PRINT)
        figure.text(0.03, 0.935, plain(title), fontsize=17, color=PRINT.text, parse_math=False)
        figure.text(0.03, 0.885, plain(subtitle), fontsize=10.5, color=PRINT.faint, parse_math=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def plain(text: str) -> str:
    """Text for a drawing: what the font may lack, or markup might use, is shown as a question mark."""
    return re.sub(r"[^\w .,:;+/%()=·-]", "?", text[:120], flags=re.ASCII).replace("\n", " ")


def _settings(salt: str) -> Any:
    """Letters stay text, so that the page's own font is used; ids depend on the drawing alone, never on chance."""
    import matplotlib  # noqa: PLC0415

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "path.simplify": True})


def _svg(
    record: Record, draw: Draw, name: str, inches: tuple[float, float] = (4.4, 2.2), *, tokens: bool = False
) -> Html:
    from matplotlib.figure import Figure  # noqa: PLC0415

    width, height = inches
    with _settings(name):
        figure = Figure(figsize=inches)
        axes = figure.add_axes((0.42 / width, 0.28 / height, 1 - 0.55 / width, 1 - (0.65 if tokens else 0.4) / height))
        _dress(axes, record, THEMED, ticks=4 if width < 5 else 8)
        draw(axes, record, THEMED)
        if tokens and record.tokens:
            _token_axis(axes, record, THEMED)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _as_html(out.getvalue(), name)


def _as_html(svg: str, name: str) -> Html:
    """matplotlib's file as an element of a page: no header, no addresses, ids of its own, colors from the page."""
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S
    )
    svg = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace('xlink:href="#', f'href="#{name}-')
    for role, stand_in in vars(THEMED).items():
        svg = svg.replace(stand_in, f"var(--{role})")
    return Html(svg.replace("<svg", '<svg aria-hidden="true"', 1).strip())


def _dress(axes: Any, record: Record, ink: Ink, ticks: int = 6) -> None:
    """Thin rules instead of a box, steps from 0 to the last, a dotted line wherever the run was taken up again."""
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(ink.grid)
    axes.tick_params(length=0, labelcolor=ink.faint, labelsize=9, pad=5)
    axes.grid(axis="y", color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, max(1.0, record.last_step) * 1.01)
    axes.xaxis.set_major_locator(_locator(ticks))
    axes.xaxis.set_major_formatter(_steps)
    axes.yaxis.set_major_locator(_locator(5, integer=False))
    for resume in record.runs[1:50]:
        axes.axvline(number(resume.get("step")), color=ink.faint, linewidth=0.8, linestyle=":")


def _locator(ticks: int, *, integer: bool = True) -> Any:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    return MaxNLocator(ticks, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _token_axis(axes: Any, record: Record, ink: Ink) -> None:
    """The same ticks above, in tokens: batches may grow, so each is looked up."""
    above = axes.secondary_xaxis("top")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, labelcolor=ink.faint, labelsize=9, pad=4)
    above.xaxis.set_major_locator(axes.xaxis.get_major_locator())
    steps, tokens = (np.concatenate([[0.0], record.train[column]]) for column in ("step", "tokens"))

    def label(step: float, place: int) -> str:
        shown = count(float(np.interp(step, steps, tokens))) if step > 0 else ""
        return shown + (" tokens" if place == 1 else "")

    above.xaxis.set_major_formatter(label)


def _draw_loss(axes: Any, record: Record, ink: Ink) -> None:
    steps, loss = record.train["step"], record.train["loss"]
    middle = smooth(loss)
    _line(axes, steps, loss, color=ink.train, linewidth=0.7, alpha=0.35)
    _line(axes, steps, middle, color=ink.train, linewidth=1.7, label="training")
    val_steps, val_loss = numbers(record.validations, "step"), numbers(record.validations, "loss")
    _line(axes, val_steps, val_loss, color=ink.val, linewidth=1.7, markersize=3.5, label="validation")
    _fit(axes, middle, val_loss, loss)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False, labelcolor=ink.text, handlelength=1.4, fontsize=10)
    else:
        axes.text(0.5, 0.5, "no step recorded yet", ha="center", transform=axes.transAxes, color=ink.faint)


def _fit(axes: Any, middle: Column, val_loss: Column, loss: Column) -> None:
    """Room for the end of the run, where the differences are: the first fall enters from above."""
    top = middle[np.isfinite(middle)]
    seen = np.concatenate([values[np.isfinite(values)] for values in (middle, val_loss, loss[len(loss) // 50 :])])
    if len(top) < 50:
        return
    low, high = float(seen.min()), float(np.quantile(top, 0.95))
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _draw_bits(axes: Any, record: Record, ink: Ink) -> None:
    steps, bits = numbers(record.validations, "step"), numbers(record.validations, "bits_per_byte")
    _line(axes, steps, bits, color=ink.val, linewidth=1.7, markersize=3.5)
    finite = bits[np.isfinite(bits)]
    shown = [value for value in record.baselines.values() if value < 2 * float(finite.max(initial=8.0))]
    for name, value in record.baselines.items():
        if value not in shown:
            continue
        axes.axhline(value, color=ink.faint, linewidth=1, linestyle=(0, (4, 3)))
        place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "xytext": (-2, 3)}
        axes.annotate(
            f"{plain(name)} {value:.2f}", **place, textcoords="offset points", ha="right", color=ink.faint, fontsize=9
        )
    if not shown:
        return
    axes.grid(False)  # the baselines are the rules here
    low, high = min(float(finite.min()), *shown), max(float(finite[-1]), *shown)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.14 * (high - low))


def _draw_lr(axes: Any, record: Record, ink: Ink) -> None:
    _line(axes, record.train["step"], record.train["lr"], color=ink.train, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(_locator(3, integer=False))
    axes.yaxis.set_major_formatter(lambda lr, _: _short(lr))


def _draw_grad_norm(axes: Any, record: Record, ink: Ink) -> None:
    norm = record.train["grad_norm"]
    _line(axes, record.train["step"], norm, color=ink.train, linewidth=0.7, alpha=0.35)
    _line(axes, record.train["step"], smooth(norm), color=ink.train, linewidth=1.5)
    positive = norm[np.isfinite(norm) & (norm > 0)]
    if len(positive) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.tick_params(which="minor", length=0, labelleft=False)
        axes.yaxis.set_major_formatter(lambda norm, _: f"{norm:g}")


def _draw_speed(axes: Any, record: Record, ink: Ink) -> None:
    _line(axes, record.train["step"], record.train["tokens_per_s"], color=ink.train, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda speed, _: count(speed))


_DRAW: dict[str, Draw] = {"lr": _draw_lr, "grad_norm": _draw_grad_norm, "tokens_per_s": _draw_speed}


def _line(axes: Any, x: Column, y: Column, *, markersize: float = 0.0, label: str = "", **style: Any) -> None:
    """A thinned line; a single point, or few that ask for it, get a dot."""
    x, y = thin(x, y)
    n_finite = int(np.isfinite(y).sum())
    if not n_finite:
        return
    dots = markersize and n_finite <= 60
    marker = {"marker": "o", "markersize": markersize or 3.5} if dots or n_finite == 1 else {}
    axes.plot(x, y, solid_joinstyle="round", label=label or "_", **marker, **style)


def _steps(step: float, place: int) -> str:
    """A tick; the first after 0 tells the unit."""
    unit = " step" if step == 1 else " steps"
    return (f"{step:,.0f}" if step < 1e6 else count(step)) + (unit if place == 1 else "")


def _short(value: float) -> str:
    """6e-4 rather than 0.0006."""
    if not value or not math.isfinite(value):
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
