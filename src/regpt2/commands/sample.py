"""Prompt to text. In: a model and a prompt; out: text on standard output as it is written, tokens/s on standard error.

regpt2 sample hf:gpt2 "Hello, I'm a language model,"
regpt2 sample runs/gpt2_124m "" --n 3 --max-new-tokens 50
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from regpt2.base.console import safe_text, say, show, warn
from regpt2.base.device import be_deterministic, choose_compute, pick_device
from regpt2.base.errors import UsageError
from regpt2.base.options import parse
from regpt2.data.tokenizer import StreamDecoder, Tokenizer
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.sampling.cpu import in_int8
from regpt2.sampling.generate import generate
from regpt2.sampling.tokenizer import tokenizer_of

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
    """The meta.pkl of the data, for a character model that does not include it, such as nanoGPT's."""
    stream: bool = True
    """Show a single continuation token by token."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 sample`."""
    sample(_parsed(argv))
    return 0


def _parsed(argv: list[str]) -> SampleOptions:
    """The options. An argument whose name would have a space in it is no option: it is a prompt like "-x or -y"."""
    dashed = [one for one in argv if one.startswith("-")] if "--" not in argv else []
    texts = [one for one in dashed if re.search(r"\s", one.partition("=")[0])]
    rest = [one for one in argv if one not in texts]
    try:
        return parse(SampleOptions, [*rest, "--", *texts] if texts else argv, "regpt2 sample")
    except SystemExit as end:
        known = {"help", "h", *(field.name for field in fields(SampleOptions))}
        named = [(one, re.match(r"-+(?:no-)?([a-z][\w-]*)", one, re.IGNORECASE)) for one in dashed]
        unknown = next((one for one, name in named if name and name[1].replace("-", "_") not in known), None)
        if end.code == 2 and unknown is not None:
            sys.stderr.write(safe_text(f"If {unknown!r} is the prompt, put it last, after --: MODEL -- {unknown!r}\n"))
        raise


def sample(options: SampleOptions) -> list[str]:
    """Print continuations of the prompt, and return them: n texts, each with the prompt, without <|endoftext|>.

    Raises:
        UsageError: an option is out of its range, or the prompt too long for the model.
        CheckpointError, DownloadError: see `load_model` and `tokenizer_of`.
    """
    device = pick_device(options.device)
    if options.deterministic:
        be_deterministic(device)
    loaded = load_in(options.dtype, options.model, device)
    tokenizer = tokenizer_of(loaded, options.tokenizer)
    screen = _Screen(options.prompt, tokenizer) if options.stream and options.n == 1 else None
    started_at = time.perf_counter()
    texts, n_tokens = continuations(options, loaded, tokenizer, screen)
    elapsed_s = time.perf_counter() - started_at
    if screen is not None:
        screen.end()
    else:
        _show(texts)
    sys.stdout.flush()
    sys.stderr.write(f"{n_tokens:,} tokens in {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.1f} tokens/s\n")
    return texts


def continuations(
    options: SampleOptions,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    on_token: Callable[[Tensor], object] | None = None,
) -> tuple[list[str], int]:
    """The n texts, each with the prompt, and how many tokens were drawn. Nothing is shown.

    Raises:
        UsageError: an option is out of its range, or the prompt too long for the model.
    """
    if options.n < 1:
        raise UsageError(f"n = {options.n} must be at least 1.")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"seed = {options.seed} must be from 0 to 2**63 - 1.")
    device = next(loaded.model.parameters()).device
    prompt_ids = tokenizer.encode(options.prompt) or _beginning(tokenizer)
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
    drawn = [_up_to(row[len(prompt_ids) :], tokenizer.eot) for row in rows]
    n_tokens = sum(min(len(ids) + 1, len(rows[0]) - len(prompt_ids)) for ids in drawn)  # with <|endoftext|>
    return [options.prompt + tokenizer.decode(ids) for ids in drawn], n_tokens


def load_in(dtype: SampleType, spec: str, device: torch.device) -> LoadedModel:
    """The model that `spec` names, as `load_model` does, in the type that is asked for."""
    compute = choose_compute("fp32" if dtype == "int8" else dtype, device)
    loaded = load_model(spec, device=device, dtype=compute.dtype)
    return replace(loaded, model=in_int8(loaded.model)) if dtype == "int8" else loaded


def _room(options: SampleOptions, loaded: LoadedModel, n_prompt: int) -> int:
    """How many tokens may follow the prompt.

    Raises:
        UsageError: `context` is out of its range, or prompt and new tokens are more than training has seen.
    """
    trained, block_size = loaded.model.context_size, loaded.model.config.block_size
    if options.context is not None and not 1 < options.context <= block_size:
        raise UsageError(f"context = {options.context} must be from 2 to the model's block_size, {block_size:,}.")
    most = trained if options.context is None else options.context
    if most > trained:
        warn(f"{loaded.source} was trained on sequences of {trained:,} tokens: positions from there on are untrained.")
    n_new = 1 if options.max_new_tokens is None else options.max_new_tokens
    if most < block_size and n_prompt + n_new > most:
        why = "--context says" if options.context else "the model was trained on"
        raise UsageError(
            f"{n_prompt:,} prompt tokens + {n_new:,} new ones = {n_prompt + n_new:,}, {why} {most:,}; shorten the "
            f"prompt, ask for fewer, or give a larger --context, up to the model's block_size, {block_size:,}."
        )
    return max(1, most - n_prompt)


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """What an empty prompt is for the model."""
    if tokenizer.eot is None:
        begins_with = tokenizer.decode([tokenizer.start_id])
        warn(f"this model has no end of text; the empty prompt is continued after {begins_with!r}.")
    return [tokenizer.start_id]


class _Screen:
    """Shows one continuation as its ids come: whole characters, none that could drive the terminal."""

    def __init__(self, prompt: str, tokenizer: Tokenizer) -> None:
        self.unshown, self.eot, self.decoder = prompt, tokenizer.eot, StreamDecoder(tokenizer)

    def __call__(self, new: Tensor) -> None:  # (1,)
        token = int(new)
        if token != self.eot:
            self._write(self.decoder.feed(token))

    def end(self) -> None:
        self._write(self.decoder.end() + "\n")

    def _write(self, text: str) -> None:
        show(self.unshown + text)
        self.unshown = ""


def _show(texts: list[str]) -> None:
    """All continuations, one after the other, each with a head if there are several."""
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            say(f"--- {number} of {len(texts)} ---")
        say(text)


def _up_to(ids: list[int], stop_id: int | None) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids
