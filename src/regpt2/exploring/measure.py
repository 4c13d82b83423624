"""The inside of a model in numbers. In: a model and its tokenizer; out: its tensors, nearest tokens and attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.console import safe_text
from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Tokenizer
from regpt2.model import gpt, modern
from regpt2.model.architecture import switches_on
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel
from regpt2.model.kernels.masks import Mask, Reach
from regpt2.model.kernels.rotary import Rotation
from regpt2.model.language_model import LanguageModel

# L layers, H heads, T tokens, C = n_embd, D = C / H, V = vocab_size

Array = NDArray[np.float32]
Kept = TypeVar("Kept")

PARTS = {  # a parameter belongs to the first part that is in its name
    "token embeddings": "wte",
    "value embeddings": "wve",
    "position embeddings": "wpe",
    "attention": ".attn.",
    "MLP": ".mlp.",
    "norms": "ln_",
    "head": "lm_head",
    "x0 mixing": ".mix",
    "U-net skips": "skips",
}
HABITS = {
    "previous": "the token before",
    "first": "the first token",
    "self": "the token itself",
    "repeat": "what followed this token earlier",
}
DEFAULT_TOKENS = (" king", " Monday", " Paris", " seven", " small", " was", "7", "e", "A", "(", " ", "\n")
DEFAULT_PROMPT = "the cat sat on the mat, the cat sat on the"
MOST_TOKENS = 32  # more labels would not be readable on a map
N_NEAREST = 5
NO_WPE = "Positions are in attention instead: queries and keys are rotated by them."


@dataclass(frozen=True)
class TensorFigures:
    """A tensor in numbers."""

    name: str
    shape: str
    n_params: int
    stats: dict[str, float]
    """mean, std, norm, min, max"""


@dataclass(frozen=True)
class Neighbors:
    """A token, and those nearest to it with their cosines."""

    token: str
    nearest: list[tuple[str, float]]


@dataclass(frozen=True)
class Habit:
    """A kind of place that heads look at, with the head that gives it the largest share of its weight."""

    name: str
    what: str
    layer: int
    head: int
    share: float
    even_share: float
    """The share of a head that looks evenly at all earlier tokens."""

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
    """All that a page shows. Names and tokens come from files: they are not trusted."""

    name: str
    summary: str
    tensors: list[TensorFigures]
    parts: dict[str, int]
    """Parameters of each part."""
    tied: bool
    """Does the head share the token embeddings?"""
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
        """Whose weights the head has."""
        if self.tied:
            return "The head is tied: wte.weight is also the projection to logits. It is counted once."
        return "The head has weights of its own, lm_head.weight."


def measure(
    loaded: LoadedModel, tokenizer: Tokenizer | None, words: Sequence[str] | None, prompt: str | None, no_text: str = ""
) -> Explored:
    """What there is to see in a model; without a tokenizer, for the reason `no_text`, no tokens and no attention.

    Raises:
        UsageError: one of the words is not a single token, or the prompt is empty.
    """
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


def _figures_of(name: str, x: Tensor) -> TensorFigures:
    stats = {"mean": x.mean(), "std": x.std(correction=0), "norm": x.norm(), "min": x.min(), "max": x.max()}
    shape = " x ".join(map(str, x.shape))
    return TensorFigures(name, shape, x.numel(), {key: float(value) for key, value in stats.items()})


def parts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters of each part of the model: a tied head counts with the embeddings, padding rows do not count."""
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
    cosines[chosen, range(len(chosen))] = -torch.inf  # a token is not its own neighbor
    values, nearest = (found.T.tolist() for found in cosines.topk(min(N_NEAREST, len(wte) - 1), dim=0))
    return [
        Neighbors(_shown(tokenizer, token), [(_shown(tokenizer, i), value) for i, value in zip(row, cos, strict=True)])
        for token, row, cos in zip(chosen, nearest, values, strict=True)
    ]


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text on one line, with visible spaces; part of a character is shown as bytes."""
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


def all_attention_weights(model: LanguageModel, ids: Tensor) -> Tensor:  # (T,) -> (L, H, T, T)
    """How much each token attends to each, in every head of every layer."""
    return torch.stack(layer_by_layer(model, ids, lambda weights: weights))


@torch.no_grad()
def layer_by_layer(model: LanguageModel, ids: Tensor, keep: Callable[[Tensor], Kept]) -> list[Kept]:
    """What `keep` makes of the attention weights (H, T, T) of each layer. Whole, those of a large model are many.

    A layer without attention has zeros.
    """
    nothing = torch.zeros(model.config.n_head, len(ids), len(ids), device=ids.device)
    has_attention = [getattr(block, "has_attention", True) for block in model.h]
    seen: list[Kept] = []

    def look(attn: Any, given: tuple[Any, ...]) -> None:  # before each layer's attention begins
        x, _cache, *rotation_and_mask = given  # and value embeddings, which change no weight
        seen.append(keep(attention_weights(attn, x, *rotation_and_mask[:2])))

    blocks = [block for block, has in zip(model.h, has_attention, strict=True) if has]
    if other := next((block for block in blocks if not hasattr(block, "attn")), None):
        raise UsageError(
            f"attention maps need this package's attention, this model has {type(other).__name__}s instead, as with "
            "--dtype int8."
        )
    hooks = [block.get_submodule("attn").register_forward_pre_hook(look) for block in blocks]
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    in_turn = iter(seen)
    return [next(in_turn) if has else keep(nothing) for has in has_attention]


def attention_weights(
    attn: gpt.CausalSelfAttention | modern.CausalSelfAttention,
    x: Tensor,
    rotation: Rotation | None = None,
    mask: Mask | None = None,
) -> Tensor:  # (1, T, C) -> (H, T, T)
    """softmax(q k^T / sqrt(D)) in full; the kernels that the model uses never store it."""
    if type(attn) not in (gpt.CausalSelfAttention, modern.CausalSelfAttention):
        raise UsageError(f"attention maps need this package's attention, this model's is a {type(attn).__name__}.")
    T = x.shape[1]
    q, k, _ = attn.c_attn(x).chunk(3, dim=2)  # three of (1, T, C)
    q, k = (z.view(1, T, attn.n_head, -1).transpose(1, 2) for z in (q, k))  # two of (1, H, T, D)
    if isinstance(attn, modern.CausalSelfAttention):
        q, k = attn.placed(q, rotation), attn.placed(k, rotation)
    scores = q[0] @ k[0].transpose(1, 2) / q.shape[3] ** 0.5  # (H, T, T)
    hidden = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    if isinstance(mask, Reach):
        hidden = mask.hidden(range(T), range(T), scores.device)[0, 0]
    elif isinstance(mask, Tensor):
        hidden = ~mask[0, 0]
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=2)


def habits_of(weights: Tensor, ids: Sequence[int]) -> list[Habit]:  # (L, H, T, T), T ids
    """For each habit that these ids can show, the head that has it most."""
    T, H = len(ids), weights.shape[1]
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    found = []
    for name, places in _places(ids).items():
        rows = places.any(dim=1)  # the tokens that have such a place
        if not rows.any():
            continue
        shares, even_share = ((w * places).sum(dim=-1)[..., rows].mean(dim=-1) for w in (weights, even))
        layer, head = divmod(int(shares.argmax()), H)
        share = float(shares[layer, head])
        found.append(Habit(name, HABITS[name], layer, head, share, float(even_share)))
    return found


def _places(ids: Sequence[int]) -> dict[str, Tensor]:
    """(T, T) for each habit: where it looks. The first token is left out: it can only look at itself."""
    T, tokens = len(ids), torch.tensor(ids)
    before = torch.ones(T, T, dtype=torch.bool).tril(-1)
    follows = torch.zeros(T, T, dtype=torch.bool)
    follows[:, 1:] = tokens[:, None] == tokens[None, :-1]
    first = before.clone()
    first[:, 1:] = False
    itself = torch.eye(T, dtype=torch.bool)
    itself[0] = False
    return {"previous": before.triu(-1), "first": first, "self": itself, "repeat": follows & before}
