"""Look inside a model. In: a model; out: its tensors, nearest tokens and attention in words, and as a page if wanted.

regpt2 explore hf:gpt2
regpt2 explore runs/gpt2_124m --out look        also writes look/explore.html, and its pictures as PNG
regpt2 explore hf:gpt2 --tokens " king" " Monday" --prompt "When Mary and John went out, Mary"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.console import count, safe_text, say
from regpt2.base.errors import CheckpointError, Problem, UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.data.tokenizer import Tokenizer
from regpt2.exploring import page
from regpt2.exploring.page import NO_WPE, Attention, Explored, Habit, Neighbors, TensorFigures
from regpt2.model import gpt, modern
from regpt2.model.architecture import switches_on
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.tokenizer import tokenizer_of

# L layers, H heads, T tokens, C = n_embd, D = C / H, V = vocab_size

PARTS = {  # a parameter belongs to the first part that is in its name
    "token embeddings": "wte",
    "position embeddings": "wpe",
    "attention": ".attn.",
    "MLP": ".mlp.",
    "norms": "ln_",
    "head": "lm_head",
}
HABITS = {
    "previous": "the token before",
    "first": "the first token",
    "self": "the token itself",
    "repeat": "what followed this token earlier",
}
DEFAULT_TOKENS = (" king", " Monday", " Paris", " seven", " small", " was", "7", "e", "A", "(")
DEFAULT_PROMPT = "the cat sat on the mat, the cat sat on the"
MOST_TOKENS = 32  # as many as a map has room to name
N_NEAREST = 5


@dataclass(frozen=True)
class ExploreOptions:
    """Look inside a model: its tensors, which tokens it treats alike, what its attention heads look at."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format, or hf:gpt2."""
    out: Path | None = None
    """A folder for explore.html, which opens offline, and its pictures: wpe, wte and attention maps, as PNG."""
    tokens: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens whose nearest ones to show: " king" " Monday". Default: a few common ones of the vocabulary."""
    prompt: str | None = None
    """The text to show attention for; of a long one its beginning. Default: a text that repeats itself."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 explore`."""
    options = parse(ExploreOptions, argv, "regpt2 explore")
    loaded = load_model(options.model)
    found = explore(loaded, options.tokens, options.prompt)
    say(describe(found))
    if options.out is not None:
        write_page(found, options.out)
    return 0


def explore(loaded: LoadedModel, words: Sequence[str] | None = None, prompt: str | None = None) -> Explored:
    """What there is to see in a model. One whose tokenizer is not at hand is explored without its tokens.

    Raises:
        UsageError: one of the words is not a single token, or the prompt is empty.
        Problem: words or a prompt are given, and the tokenizer is not at hand.
    """
    tokenizer, no_text = None, ""
    try:
        tokenizer = tokenizer_of(loaded)
    except Problem as problem:
        if words is not None or prompt is not None:
            raise
        no_text = str(problem)
    if tokenizer is not None and words is None and prompt is None and not tokenizer.can_encode(DEFAULT_PROMPT):
        tokenizer, no_text = None, f"{DEFAULT_PROMPT!r} has other characters than the model: give a text to --prompt."
    tensors = tensors_of(loaded.model)
    wte, wpe = tensors["wte.weight"], tensors.get("wpe.weight")
    return Explored(
        name=loaded.source,
        summary=_summary(loaded),
        tensors=[_figures_of(name, tensor) for name, tensor in tensors.items()],
        parts=parts(tensors),
        tied="lm_head.weight" not in tensors,
        wpe=None if wpe is None else wpe.numpy(),
        smoothness=0.0 if wpe is None else float(F.cosine_similarity(wpe[:-1], wpe[1:]).mean()),
        lengths=wte.norm(dim=1).numpy(),
        neighbors=[] if tokenizer is None else neighbors(wte, tokenizer, words),
        attention=None if tokenizer is None else attention(loaded.model, tokenizer, prompt),
        no_text=no_text,
    )


def write_page(found: Explored, folder: Path) -> None:
    """Write `explore.html`, and its pictures as PNG.

    Raises:
        CheckpointError: there are weights that are not finite.
    """
    broken = [tensor.name for tensor in found.tensors if not math.isfinite(tensor.norm)]
    if broken:
        raise CheckpointError(f"{found.name}: not every value is finite in {', '.join(broken)}; nothing is drawn.")
    pictures = page.pictures(found)
    for name, picture in pictures.items():
        write_atomic(folder / f"{name}.png", picture.light)
    write_atomic(folder / "explore.html", page.page(found, pictures))
    say(f"\n{folder / 'explore.html'} is written, and beside it {', '.join(pictures)} as PNG.")


def _summary(loaded: LoadedModel) -> str:
    config = loaded.model.config
    step = "" if loaded.step is None else f"step {loaded.step:,}: "
    name = {"gpt2": "GPT-2"}.get(config.architecture, f"{config.architecture} GPT")
    own = "".join(f", {switch}" for switch in switches_on(config))
    tokenizer = "not named" if loaded.tokenizer is None else loaded.tokenizer.name
    return (
        f"{step}{name} with {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
        f"{config.block_size:,} positions, {config.vocab_size:,} tokens (tokenizer {tokenizer}){own}"
    )


def _figures_of(name: str, tensor: Tensor) -> TensorFigures:
    return TensorFigures(
        name=name,
        shape=" x ".join(map(str, tensor.shape)),
        n_params=tensor.numel(),
        mean=float(tensor.mean()),
        std=float(tensor.std(correction=0)),
        norm=float(tensor.norm()),
        min=float(tensor.min()),
        max=float(tensor.max()),
    )


def parts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters of each part that there is. Each counts once, a tied head with the embeddings, and no padding row."""
    counts = {part: sum(tensors[name].numel() for name in tensors if mark in name) for part, mark in PARTS.items()}
    return {part: n for part, n in counts.items() if n}


def neighbors(wte: Tensor, tokenizer: Tokenizer, words: Sequence[str] | None) -> list[Neighbors]:  # wte (V, C)
    """For each word, which must be one token, the tokens whose embeddings have the largest cosines with its own."""
    wanted = filter(tokenizer.can_encode, DEFAULT_TOKENS) if words is None else words
    encoded = [(word, tokenizer.encode(word)) for word in wanted]
    if words is not None:
        for word, ids in encoded:
            if len(ids) != 1:
                pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids) or "nothing"
                raise UsageError(
                    f"--tokens: {word!r} is {len(ids)} tokens of {tokenizer.name!r}, expected one: {pieces}; give one "
                    "of these (a space before a word belongs to its token)."
                )
    chosen = [ids[0] for _, ids in encoded if len(ids) == 1]
    if not chosen:
        return []
    lengths = wte.norm(dim=1)  # (V,)
    cosines = (wte @ wte[chosen].T) / (lengths[:, None] * lengths[chosen]).clamp(min=1e-12)  # (V, chosen)
    cosines[chosen, range(len(chosen))] = -torch.inf  # itself is no neighbor
    values, nearest = (found.T.tolist() for found in cosines.topk(min(N_NEAREST, len(wte) - 1), dim=0))
    return [
        Neighbors(_shown(tokenizer, token), [(_shown(tokenizer, i), value) for i, value in zip(row, cos, strict=True)])
        for token, row, cos in zip(chosen, nearest, values, strict=True)
    ]


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text in one line: its spaces are to be seen, a part of a character is bytes."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    return safe_text(text).replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣")


def attention(model: LanguageModel, tokenizer: Tokenizer, prompt: str | None) -> Attention:
    """What every head looks at in the beginning of the prompt."""
    whole = tokenizer.encode(DEFAULT_PROMPT if prompt is None else prompt)
    if not whole:
        raise UsageError("--prompt is empty, expected a text; leave it out for the default.")
    ids = whole[: min(MOST_TOKENS, model.context_size)]
    weights = all_attention_weights(model, torch.tensor(ids))
    tokens = [_shown(tokenizer, token) for token in ids]
    return Attention(tokens, len(whole), weights.numpy(), habits_of(weights, ids))


@torch.no_grad()
def all_attention_weights(model: LanguageModel, ids: Tensor) -> Tensor:  # (T,) -> (L, H, T, T)
    """How much each token takes from each, in every head of every layer."""
    maps: list[Tensor] = []

    def look(attn: Any, given: tuple[Any, ...]) -> None:  # before each layer's attention begins
        x, _cache, *rotation_and_mask = given
        maps.append(attention_weights(attn, x, *rotation_and_mask[:1]))

    hooks = [block.get_submodule("attn").register_forward_pre_hook(look) for block in model.h]
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def attention_weights(
    attn: gpt.CausalSelfAttention | modern.CausalSelfAttention, x: Tensor, rotation: modern.Rotation | None = None
) -> Tensor:  # (1, T, C) -> (H, T, T)
    """softmax(q k^T / sqrt(D)) in full, which the kernels that the model uses never write down."""
    if type(attn) not in (gpt.CausalSelfAttention, modern.CausalSelfAttention):
        raise UsageError(f"attention maps are for this package's attention, this model's is a {type(attn).__name__}.")
    T = x.shape[1]
    q, k, _ = attn.c_attn(x).chunk(3, dim=2)  # three of (1, T, C)
    q, k = (z.view(1, T, attn.n_head, -1).transpose(1, 2) for z in (q, k))  # two of (1, H, T, D)
    if isinstance(attn, modern.CausalSelfAttention):
        q, k = attn.placed(q, rotation), attn.placed(k, rotation)
    scores = q[0] @ k[0].transpose(1, 2) / q.shape[3] ** 0.5  # (H, T, T)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~past, -torch.inf), dim=2)


def habits_of(weights: Tensor, ids: Sequence[int]) -> list[Habit]:  # (L, H, T, T), T ids
    """Of each habit that shows in these ids, the head that has it most."""
    T, H = len(ids), weights.shape[1]
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    found = []
    for name, places in _places(ids).items():
        rows = places.any(dim=1)  # the tokens for which there is such a place
        if not rows.any():
            continue
        shares, even_share = ((w * places).sum(dim=-1)[..., rows].mean(dim=-1) for w in (weights, even))
        layer, head = divmod(int(shares.argmax()), H)
        share = float(shares[layer, head])
        found.append(Habit(name, HABITS[name], layer, head, share, float(even_share)))
    return found


def _places(ids: Sequence[int]) -> dict[str, Tensor]:
    """(T, T) for each habit: where it looks. The first token, which can look nowhere else, is left out."""
    T, tokens = len(ids), torch.tensor(ids)
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)
    follows = torch.zeros(T, T, dtype=torch.bool)
    follows[:, 1:] = tokens[:, None] == tokens[None, :-1]
    first = before.clone()
    first[:, 1:] = False
    itself = torch.eye(T, dtype=torch.bool)
    itself[0] = False
    return {"previous": before.triu(-1), "first": first, "self": itself, "repeat": follows & before}


def describe(found: Explored) -> str:
    """The same in words and tables, for a terminal."""
    lines = [f"{found.name}: {found.summary}", "", *_tensor_lines(found.tensors), "", *_part_lines(found), ""]
    if found.wpe is None:
        lines.append(f"wpe: none. {NO_WPE}")
    else:
        cosine = f"{found.smoothness:.3f}"
        lines.append(f"wpe: from one position to the next the cosine is {cosine} (untrained 0, trained close to 1).")
    if found.attention is None:
        return "\n".join([*lines, f"Nearest tokens and attention are left out. {found.no_text}"])
    lines += ["", f"{'token':<12} nearest by the cosine of their embeddings"]
    for row in found.neighbors:
        lines.append(f"{row.token:<12} " + "   ".join(f"{token} {cosine:.2f}" for token, cosine in row.nearest))
    lines += ["", f"attention in {found.attention.shown}: {' '.join(found.attention.tokens)}"]
    for habit in found.attention.habits:
        lines.append(
            f"{habit.what:<32} layer {habit.layer:>2}, head {habit.head:>2} gives it {habit.share:>4.0%} of its weight"
            f" (evenly spread {habit.even_share:.0%})"
        )
    return "\n".join(lines)


def _tensor_lines(tensors: Sequence[TensorFigures]) -> list[str]:
    width = max(len(tensor.name) for tensor in tensors)
    columns = ("mean", "std", "norm", "min", "max")
    title = f"{'tensor':<{width}} {'shape':>14} {'parameters':>12} " + " ".join(f"{name:>9}" for name in columns)
    rows = (
        f"{tensor.name:<{width}} {tensor.shape:>14} {tensor.n_params:>12,} "
        + " ".join(f"{_short(getattr(tensor, name)):>9}" for name in columns)
        for tensor in tensors
    )
    return [title, *rows]


def _short(figure: float) -> str:
    """Four digits after the point, while that is a column's width."""
    return f"{figure:.4f}" if abs(figure) < 1000 else count(figure)


def _part_lines(found: Explored) -> list[str]:
    total = sum(found.parts.values())
    return [
        *(f"{part:<24} {n:>14,} {n / total:>7.1%}" for part, n in found.parts.items()),
        f"{'total':<24} {total:>14,}",
        "",
        found.about_head,
    ]
