"""The inside of a model as a page. In: an `Explored`; out: one HTML document that opens offline, light and dark."""

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import LiteralString

from regpt2.base.errors import CheckpointError
from regpt2.base.files import write_atomic
from regpt2.exploring import pictures as drawing
from regpt2.exploring.measure import NO_WPE, Explored
from regpt2.exploring.pictures import Picture
from regpt2.pages.report.page import document
from regpt2.pages.safe_html import Html, fill, join
from regpt2.pages.tables import table

CHANNELS = (150, 200, 250)  # as in the lecture; in a narrower model at the same fraction of the width
LECTURE_WIDTH = 768

WPE: LiteralString = """
<p>Attention by itself does not know the order of tokens; these vectors tell it the position of each. In a trained model
neighboring positions have similar vectors and the channels are smooth waves, like GPT-2's in the lecture. Ragged curves
mean that the model could have been trained for longer. An untrained model shows noise.</p>
<p>Neighboring positions have a mean cosine of {smoothness} here; it is 0 when untrained, near 1 when well trained.</p>
"""
WTE: LiteralString = """
<p>The matrix that turns a token into a vector{and_back}. In an untrained model all have about the same length;
training separates frequent tokens from those that are rare in the data.</p>
<p>The nearest tokens are those whose vectors have the most similar direction. In a trained model they are related:
other days beside a day, the same word in other spellings. In an untrained model they are arbitrary, and their cosines
are small and similar.</p>
"""
HEADS: LiteralString = """
<p>A row is a token, a column a token that it looks at; the weights of a row add up to 1. The future, in gray, is
masked. Untrained heads look evenly at all earlier tokens, which fades down the map; trained heads have habits.</p>
<p>For each of these habits, the head that has it most on this prompt:</p>
"""
ALL_HEADS: LiteralString = """
<p>The same maps, small. Stripes beside the diagonal look at the token before. A strong left edge rests on the first
token, as heads do that have found nothing. Stripes further away point to where the text repeats itself.</p>
"""


def write_page(explored: Explored, folder: Path) -> list[str]:
    """Write `explore.html`, and its pictures as PNG; return the pictures' names.

    Raises:
        CheckpointError: there are weights that are not finite.
    """
    broken = [tensor.name for tensor in explored.tensors if not math.isfinite(tensor.stats["norm"])]
    if broken:
        raise CheckpointError(f"{explored.name}: not every value is finite in {', '.join(broken)}; nothing is drawn.")
    drawn = pictures(explored)
    for name, picture in drawn.items():
        write_atomic(folder / f"{name}.png", picture.light)
    write_atomic(folder / "explore.html", page(explored, drawn))
    return list(drawn)


def pictures(explored: Explored) -> dict[str, Picture]:
    """The pictures of the page, by name."""
    drawn = {}
    if (wpe := explored.wpe) is not None:
        channels = sorted({int(min(1, wpe.shape[1] / LECTURE_WIDTH) * channel) for channel in CHANNELS})
        drawn = {"wpe": drawing.wpe_picture(wpe), "wpe_channels": drawing.channels_picture(wpe, channels)}
    drawn["wte"] = drawing.lengths_picture(explored.lengths)
    if (attention := explored.attention) is not None:
        for habit in attention.habits:
            one = attention.weights[habit.layer, habit.head]
            drawn[f"attention_{habit.name}"] = drawing.head_picture(one, attention.tokens, habit.place)
        drawn["attention_heads"] = drawing.heads_picture(attention.weights)
    return drawn


def page(explored: Explored, pictures: Mapping[str, Picture]) -> Html:
    """The whole document, with what `pictures` drew."""
    parts = [section(explored, pictures) for section in (_positions, _token_embeddings, _heads)]
    return document(
        explored.name,
        headline="inside the model",
        kind="inside a model",
        summary=explored.summary,
        parts=[*parts, _parameters(explored)],
        css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
    )


def _positions(explored: Explored, pictures: Mapping[str, Picture]) -> Html:
    if explored.wpe is None:
        return fill('<h2>Position embeddings</h2>\n<p class="faint">There are none. {why}</p>', why=NO_WPE)
    return fill(
        '<h2>Position embeddings: wpe</h2>\n{words}\n<div class="curves">\n{image}\n{channels}\n</div>',
        words=fill(WPE, smoothness=f"{explored.smoothness:.3f}"),
        image=_figure(pictures["wpe"], "The whole matrix"),
        channels=_figure(pictures["wpe_channels"], "A few of its columns"),
    )


def _token_embeddings(explored: Explored, pictures: Mapping[str, Picture]) -> Html:
    return fill(
        '<h2>Token embeddings: wte</h2>\n{words}\n<div class="curves">\n{lengths}\n<div>\n{neighbors}\n</div>\n</div>',
        words=fill(WTE, and_back=", and the last vector into logits" if explored.tied else ""),
        lengths=_figure(pictures["wte"], "The length of every token's vector"),
        neighbors=_neighbors(explored),
    )


def _neighbors(explored: Explored) -> Html:
    if explored.no_text:
        return fill('<p class="faint">Nearest tokens are left out. {why}</p>', why=explored.no_text)
    rows = []
    for neighbors in explored.neighbors:
        near = (
            fill('<span class="near">{token} {cosine}</span>', token=_token(token), cosine=f"{cosine:.2f}")
            for token, cosine in neighbors.nearest
        )
        rows.append([_token(neighbors.token), join(near, " ")])
    return table("Nearest tokens, with cosines", ("token", "nearest"), rows, "neighbors")


def _heads(explored: Explored, pictures: Mapping[str, Picture]) -> Html:
    if (attention := explored.attention) is None:
        return fill('<h2>Attention</h2>\n<p class="faint">Left out. {why}</p>', why=explored.no_text)
    figures = []
    for habit in attention.habits:
        title = fill(
            '{what} <span class="faint">{place}: {share} of its weight; evenly spread {even}</span>',
            what=habit.what.capitalize(),
            place=habit.place,
            share=f"{habit.share:.0%}",
            even=f"{habit.even_share:.0%}",
        )
        figures.append(_figure(pictures[f"attention_{habit.name}"], title))
    return fill(
        "<h2>Attention</h2>\n<p>The prompt, {shown}: {tokens}</p>\n{words}\n"
        '<div class="curves">\n{figures}\n</div>\n<h3>Every head</h3>\n{all_words}\n'
        '<div class="scroll" tabindex="0" role="region" aria-label="Attention maps of every head">\n{heads}\n</div>',
        shown=attention.shown,
        tokens=join(map(_token, attention.tokens), " "),
        words=fill(HEADS),
        figures=join(figures),
        all_words=fill(ALL_HEADS),
        heads=_figure(pictures["attention_heads"], "Layers by heads"),
    )


def _parameters(explored: Explored) -> Html:
    total = sum(explored.parts.values())
    parts = [[part, f"{n:,}", f"{n / total:.1%}"] for part, n in explored.parts.items()]
    parts.append(["total", f"{total:,}", "100.0%"])
    rows = [
        [tensor.name, tensor.shape, f"{tensor.n_params:,}", *(f"{value:.4g}" for value in tensor.stats.values())]
        for tensor in explored.tensors
    ]
    return fill(
        "<h2>Parameters</h2>\n<p>{about_head}</p>\n{parts}\n"
        "<details>\n<summary>All {n} tensors</summary>\n{tensors}\n</details>",
        about_head=explored.about_head,
        parts=table("Parameters of each part", ("part", "parameters", "share"), parts),
        n=len(rows),
        tensors=table("Every tensor", ("tensor", "shape", "parameters", *explored.tensors[0].stats), rows),
    )


def _figure(picture: Picture, title: str) -> Html:
    return fill(
        "<figure>\n<figcaption>{title}</figcaption>\n"
        '<picture><source srcset="{dark}" media="screen and (prefers-color-scheme: dark)">'
        '<img src="{light}" alt="{alt}" width="{width}"></picture>\n</figure>',
        title=title,
        dark=_data(picture.dark),
        light=_data(picture.light),
        alt=picture.alt,
        width=picture.width,
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _token(token: str) -> Html:
    return fill('<span class="token" translate="no">{token}</span>', token=token)
