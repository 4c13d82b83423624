"""A prompt continued. In: options, a loaded model and its tokenizer; out: n texts, and the number of tokens drawn."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from regpt2.base.console import warn
from regpt2.base.device import choose_compute
from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.sampling.cpu import in_int8
from regpt2.sampling.generate import generate

SampleType = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt, token by token."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format, or hf:gpt2."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = ""
    """The text to continue; empty: a new document (characters: a line). Put one that begins with - last, after --."""
    max_new_tokens: int | None = None
    """Most tokens to write; fewer if the model ends the document. Default: 100, or as many as fit."""
    context: int | None = None
    """Most tokens of context, prompt included. Default: as many as in training, at most block_size."""
    n: int = 1
    """Number of continuations of the prompt."""
    temperature: float = 1.0
    """Below 1 more predictable, above 1 more random; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0 = from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 42
    """The same seed gives the same text on the same machine."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: SampleType = "fp32"
    """Data type of weights and activations; int8, on a CPU only, applies to the matrix products."""
    deterministic: bool = False
    """On a GPU: use only kernels that give the same bits each time."""
    tokenizer: Path | None = None
    """The meta.pkl or tokenizer.json of the data, for a model that does not include it, as nanoGPT's or llm.c's."""
    stream: bool = True
    """Show a single continuation token by token."""


def continuations(
    options: SampleOptions,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    on_token: Callable[[Tensor], object] | None = None,
) -> tuple[list[str], int]:
    """The n texts, each with the prompt, and the number of tokens drawn. Nothing is printed.

    Raises:
        UsageError: an option is out of its range, or the prompt too long for the model.
    """
    if options.n < 1:
        raise UsageError(f"n = {options.n} must be at least 1.")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"seed = {options.seed} must be from 0 to 2**63 - 1.")
    device = next(loaded.model.parameters()).device
    prompt_ids = tokenizer.encode(options.prompt) or [tokenizer.start_id]
    if not options.prompt and tokenizer.eot is None:
        warn(f"this model has no end of text; continuing the empty prompt after {tokenizer.decode(prompt_ids)!r}.")
    room = _room(options, loaded, len(prompt_ids))
    rows = generate(
        loaded.model,
        torch.tensor([prompt_ids] * options.n, device=device),
        min(100, room) if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(device).manual_seed(options.seed),
        stop_id=tokenizer.eot,
        never=tokenizer.textless,
        on_token=on_token,
    ).tolist()
    new = [row[len(prompt_ids) :] for row in rows]
    drawn = [ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids for ids in new]
    n_tokens = sum(min(len(ids) + 1, len(new[0])) for ids in drawn)  # with <|endoftext|>
    return [options.prompt + tokenizer.decode(ids) for ids in drawn], n_tokens


def load_in(dtype: SampleType, spec: str, device: torch.device) -> LoadedModel:
    """The model that `spec` names, as `load_model` gives it, in the type that was asked for."""
    compute = choose_compute("fp32" if dtype == "int8" else dtype, device)
    loaded = load_model(spec, device=device, dtype=compute.dtype)
    return replace(loaded, model=in_int8(loaded.model)) if dtype == "int8" else loaded


def _room(options: SampleOptions, loaded: LoadedModel, n_prompt: int) -> int:
    """How many tokens may follow the prompt; a UsageError if training has seen fewer, or `context` is wrong."""
    trained, block_size = loaded.model.context_size, loaded.model.config.block_size
    if options.context is not None and not 1 < options.context <= block_size:
        raise UsageError(f"context = {options.context} must be from 2 to the model's block_size, {block_size:,}.")
    most = trained if options.context is None else options.context
    if most > trained:
        warn(f"{loaded.source} was trained on sequences of {trained:,} tokens: later positions are untrained.")
    n_new = 1 if options.max_new_tokens is None else options.max_new_tokens
    if most < block_size and n_prompt + n_new > most:
        why = "--context says" if options.context else "the model was trained on"
        raise UsageError(
            f"{n_prompt:,} prompt tokens + {n_new:,} new ones = {n_prompt + n_new:,}, {why} {most:,}; shorten the "
            f"prompt, ask for fewer, or give a larger --context, up to the model's block_size, {block_size:,}."
        )
    return max(1, most - n_prompt)
