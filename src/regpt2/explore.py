"""Look inside a model. In: a model; out: its tensors with shapes, counts and statistics, and pictures if wanted.

regpt2 explore hf:gpt2
regpt2 explore runs/gpt2_124m --pictures pictures
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from torch import Tensor

from regpt2.base.console import say
from regpt2.base.files import write_atomic
from regpt2.model.load import LoadedModel, load_model, tensors_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {  # a parameter belongs to the first part that is in its name
    "token embeddings = head": "wte",
    "position embeddings": "wpe",
    "attention": ".attn.",
    "MLP": ".mlp.",
    "LayerNorm": "ln_",
}
_COLUMNS = (150, 200, 250)  # as in the lecture; in a narrower model as far from the left as there
_LECTURE_WIDTH = 768


@dataclass(frozen=True)
class ExploreOptions:
    """Names, shapes, parameter counts and statistics of a model's tensors."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, an exported or Hugging Face folder, or hf:gpt2."""
    pictures: Path | None = None
    """A folder for wpe.png and wte.png: the position and the token embeddings."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 explore`."""
    options = tyro.cli(ExploreOptions, args=argv, prog="regpt2 explore")
    loaded = load_model(options.model)
    say(describe(loaded))
    if options.pictures is not None:
        draw(loaded, options.pictures)
        say(f"{options.pictures / 'wpe.png'} and wte.png are written.")
    return 0


def describe(loaded: LoadedModel) -> str:
    """The model in words and tables. Every parameter counts once, the padding rows of the vocabulary not at all."""
    config, tensors = loaded.model.config, tensors_of(loaded.model)
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    tokenizer = "not named" if loaded.tokenizer is None else loaded.tokenizer.name
    head = (
        f"{loaded.source}{step}: GPT-2 with {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
        f"{config.block_size:,} positions, {config.vocab_size:,} tokens (tokenizer {tokenizer})"
    )
    width = max(map(len, tensors))
    columns = ("shape", "parameters", "mean", "std", "min", "max")
    title = "{:<{width}} {:>14} {:>12} {:>9} {:>9} {:>9} {:>9}".format("tensor", *columns, width=width)
    return "\n".join([head, "", title, *(_row(name, t, width) for name, t in tensors.items()), "", *_parts(tensors)])


def _row(name: str, tensor: Tensor, width: int) -> str:
    shape = " x ".join(map(str, tensor.shape))
    figures = (tensor.mean(), tensor.std(correction=0), tensor.min(), tensor.max())
    return f"{name:<{width}} {shape:>14} {tensor.numel():>12,} " + " ".join(f"{float(x):>9.4f}" for x in figures)


def _parts(tensors: Mapping[str, Tensor]) -> list[str]:
    """Parameters of each part, and of the whole."""
    counts = dict.fromkeys(PARTS, 0)
    for name, tensor in tensors.items():
        counts[next(part for part, mark in PARTS.items() if mark in name)] += tensor.numel()
    total = sum(counts.values())
    lines = [f"{part:<24} {n:>14,} {n / total:>7.1%}" for part, n in counts.items()]
    return [
        *lines,
        f"{'total':<24} {total:>14,}",
        "",
        "The head is tied: wte.weight is both the token embedding and the projection to logits, counted once.",
    ]


def draw(loaded: LoadedModel, folder: Path) -> None:
    """Write `wpe.png` and `wte.png` into `folder`."""
    tensors = tensors_of(loaded.model)
    write_atomic(folder / "wpe.png", _png(_wpe_figure(tensors["wpe.weight"])))
    write_atomic(folder / "wte.png", _png(_wte_figure(tensors["wte.weight"])))


def _wpe_figure(wpe: Tensor) -> "Figure":  # (block_size, C)
    """The lecture's picture: the matrix, and three of its columns. Trained ones are smooth, untrained ones noise."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import, needed for pictures only)

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bound = 3 * float(wpe.std())
    image = left.imshow(
        wpe.numpy(force=True), aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound, interpolation="none"
    )
    left.set(title="wpe: position embeddings", xlabel="channel", ylabel="position")
    figure.colorbar(image, ax=left)
    narrower = min(1.0, wpe.shape[1] / _LECTURE_WIDTH)
    for column in sorted({int(narrower * column) for column in _COLUMNS}):
        right.plot(wpe[:, column].numpy(force=True), linewidth=1, label=f"channel {column}")
    right.set(title="three channels over the positions", xlabel="position", ylabel="value")
    right.legend(frameon=False)
    return figure


def _wte_figure(wte: Tensor) -> "Figure":  # (vocab_size, C)
    """The length of every token's embedding, where rarely seen tokens stand out, and a corner of the matrix."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import, needed for pictures only)

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(wte.norm(dim=1).numpy(force=True), ".", markersize=2, alpha=0.5, rasterized=True)
    left.set(title="length of each token's embedding", xlabel="token id", ylabel="length")
    corner = wte[:300, :300].numpy(force=True)
    bound = 3 * float(wte.std())
    image = right.imshow(corner, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound, interpolation="none")
    right.set(title="wte: the first tokens and channels", xlabel="channel", ylabel="token id")
    figure.colorbar(image, ax=right)
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
