"""The inside of a model as a page. In: an `Explored`; out: one HTML document that opens offline, light and dark."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

from regpt2.exploring import pictures as drawing
from regpt2.exploring.pictures import Array, Picture
from regpt2.pages import PAGE_CSS
from regpt2.pages.safe_html import Html, fill, join

CHANNELS = (150, 200, 250)  # as in the lecture; in a narrower model as far from the left as there
LECTURE_WIDTH = 768

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name}: inside the model</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kicker">regpt2 · inside a model</p>
<h1>{name}</h1>
<p class="faint">{summary}</p>
</header>
<main>
{main}
</main>
</body>
</html>
"""

WPE: LiteralString = """
<p>Attention by itself knows no order; these vectors tell a token where it stands. In a trained model neighboring
positions are nearly alike and the channels run as smooth waves, as GPT-2's do in the lecture; curves that are still
ragged say that it could have been trained longer. In an untrained one all is noise.</p>
<p>From one position to the next the cosine is {smoothness} here; it is 0 without training, close to 1 after much.</p>
"""
NO_WPE = "Positions are in attention instead: queries and keys are rotated by them."
WTE: LiteralString = """
<p>The matrix that turns a token into a vector{and_back}. Untrained, all are about as long;
with training, tokens that the data often has and those that it hardly ever has part ways.</p>
<p>Neighbors are the tokens whose vectors point most nearly the same way. Trained, they are akin: other days beside
a day, the same word in other spellings. Untrained, they are any tokens, with cosines that are small and alike.</p>
"""
HEADS: LiteralString = """
<p>A row is a token, a column one that it looks at, and a row's weights add up to 1. The future, in gray, is not to be
seen. Untrained heads look evenly at all that came before, which fades down the map; trained ones have a habit.</p>
<p>For each of these habits the head that has it most, on this prompt:</p>
"""
ALL_HEADS: LiteralString = """
<p>The same maps, small. Stripes beside the diagonal look at the token before; a strong left edge rests on the first
token, as heads do that have found nothing; stripes further off go back to where the text repeats itself.</p>
"""


@dataclass(frozen=True)
class TensorFigures:
    """A tensor in numbers."""

    name: str
    shape: str
    n_params: int
    mean: float
    std: float
    norm: float
    min: float
    max: float


@dataclass(frozen=True)
class Neighbors:
    """A token, and those nearest to it with their cosines."""

    token: str
    nearest: list[tuple[str, float]]


@dataclass(frozen=True)
class Habit:
    """What some head looks at: the head that does so most, and how much of its weight goes there."""

    name: str
    what: str
    layer: int
    head: int
    share: float
    even_share: float
    """The same share for a head that looks evenly at all that came before."""

    @property
    def place(self) -> str:
        """Which head it is."""
        return f"layer {self.layer}, head {self.head}"


@dataclass(frozen=True)
class Attention:
    """What every head looks at in a prompt, or in its beginning."""

    tokens: list[str]
    n_prompt: int
    """Tokens of the whole prompt."""
    weights: Array
    """(layers, heads, tokens, tokens)"""
    habits: list[Habit]

    @property
    def shown(self) -> str:
        """How much of the prompt is looked at."""
        n = len(self.tokens)
        unit = "token" if self.n_prompt == 1 else "tokens"
        return f"{n} {unit}" if n == self.n_prompt else f"the first {n} of {self.n_prompt:,} {unit}"


@dataclass(frozen=True)
class Explored:
    """All that a page shows. Names and tokens come from files and are not trusted."""

    name: str
    summary: str
    tensors: list[TensorFigures]
    parts: dict[str, int]
    """Parameters of each part."""
    tied: bool
    """Is the head the token embeddings once more?"""
    wpe: Array | None
    """None: positions are not embedded."""
    smoothness: float
    """The mean cosine of the embeddings of neighboring positions; 0 where there are none."""
    lengths: Array
    """Of every token's embedding."""
    neighbors: list[Neighbors]
    attention: Attention | None
    no_text: str
    """Why there are no neighbors and no attention; empty where there are."""

    @property
    def about_head(self) -> str:
        """Whose weights it has."""
        if self.tied:
            return (
                "The head is tied: wte.weight is both the token embedding and the projection to logits, counted once."
            )
        return "The head has weights of its own, lm_head.weight."


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
    own = Path(__file__).with_name("page.css")
    css = "".join(file.read_text(encoding="utf-8") for file in (PAGE_CSS, own))
    sections = (
        _positions(explored, pictures),
        _token_embeddings(explored, pictures),
        _heads(explored, pictures),
        _parameters(explored),
    )
    return fill(_PAGE, name=explored.name, css=Html(css), summary=explored.summary, main=join(sections))


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
        return fill('<p class="faint">Neighbors are left out. {why}</p>', why=explored.no_text)
    rows = []
    for neighbors in explored.neighbors:
        near = (
            fill('<span class="near">{token} {cosine}</span>', token=_token(token), cosine=f"{cosine:.2f}")
            for token, cosine in neighbors.nearest
        )
        rows.append([_token(neighbors.token), join(near, " ")])
    return _table("Neighbors, with cosines", ("token", "nearest"), rows, "neighbors")


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
        '<div class="curves">\n{figures}\n</div>\n<h3>Every head</h3>\n{all_words}\n{heads}',
        shown=attention.shown,
        tokens=join(map(_token, attention.tokens), " "),
        words=fill(HEADS),
        figures=join(figures),
        all_words=fill(ALL_HEADS),
        heads=_scrolling(_figure(pictures["attention_heads"], "Layers by heads"), "Attention maps of every head"),
    )


def _parameters(explored: Explored) -> Html:
    total = sum(explored.parts.values())
    parts = [[part, f"{n:,}", f"{n / total:.1%}"] for part, n in explored.parts.items()]
    parts.append(["total", f"{total:,}", "100.0%"])
    figures = ("mean", "std", "norm", "min", "max")
    rows = [
        [tensor.name, tensor.shape, f"{tensor.n_params:,}", *(f"{getattr(tensor, name):.4g}" for name in figures)]
        for tensor in explored.tensors
    ]
    return fill(
        "<h2>Parameters</h2>\n<p>{about_head}</p>\n{parts}\n"
        "<details>\n<summary>All {n} tensors</summary>\n{tensors}\n</details>",
        about_head=explored.about_head,
        parts=_table("Parameters of each part", ("part", "parameters", "share"), parts),
        n=len(rows),
        tensors=_table("Every tensor", ("tensor", "shape", "parameters", *figures), rows),
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


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: LiteralString = "figures") -> Html:
    """A table whose first column names the rows."""
    heads = join((fill('<th scope="col">{name}</th>', name=name) for name in head), "")
    lines = (
        fill('<tr><th scope="row">{first}</th>{cells}</tr>', first=first, cells=join(map(_cell, cells), ""))
        for first, *cells in rows
    )
    template = (
        '<table class="{kind}">\n<caption>{title}</caption>\n<thead><tr>{heads}</tr></thead>\n'
        "<tbody>\n{rows}\n</tbody>\n</table>"
    )
    return _scrolling(fill(template, kind=kind, title=title, heads=heads, rows=join(lines)), title)


def _cell(value: str) -> Html:
    return fill("<td>{value}</td>", value=value)


def _scrolling(content: Html, name: str) -> Html:
    """What may be wider than a phone: it scrolls by itself, by keyboard too."""
    template = '<div class="scroll" tabindex="0" role="region" aria-label="{name}">\n{content}\n</div>'
    return fill(template, name=name, content=content)
