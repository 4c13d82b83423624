"""Prompt to text. In: a model and a prompt; out: text on standard output as it is written, tokens/s on standard error.

regpt2 sample hf:gpt2 "Hello, I'm a language model,"
regpt2 sample runs/gpt2_124m "" --n 3 --max-new-tokens 50
"""

import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from regpt2.base.console import say, show, warn
from regpt2.base.device import be_deterministic, choose_compute, pick_device
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from regpt2.model.generate import generate
from regpt2.model.load import LoadedModel, load_model
from regpt2.model.packed import in_int8


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt, token by token."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format, or hf:gpt2."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = ""
    """The text to continue; empty begins a new document."""
    max_new_tokens: int | None = None
    """At most so many tokens; fewer if the model ends the document. By default 100, or as many as fit."""
    n: int = 1
    """Continuations of the same prompt."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw from the k likeliest tokens; 0 = from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 42
    """The same seed gives the same text on the same machine."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """The type of weights and activations; int8, on CPUs: of the weights, and of what they are multiplied with."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time."""
    stream: bool = True
    """Show the text of a single continuation as it is written."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 sample`."""
    sample(tyro.cli(SampleOptions, args=argv, prog="regpt2 sample"))
    return 0


def sample(options: SampleOptions) -> list[str]:
    """Print continuations of the prompt, and return them: n texts, each with the prompt, without <|endoftext|>.

    Raises:
        UsageError: an option is out of its range, or the prompt too long for the model.
        CheckpointError, DownloadError: see `load_model` and `tokenizer_of`.
    """
    if options.n < 1:
        raise UsageError(f"n = {options.n} must be at least 1.")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"seed = {options.seed} must be from 0 to 2**63 - 1.")
    device = pick_device(options.device)
    if options.deterministic:
        be_deterministic(device)
    loaded = _load(options, device)
    tokenizer = tokenizer_of(loaded)
    prompt_ids = tokenizer.encode(options.prompt) or [tokenizer.eot]
    room = max(1, loaded.model.config.block_size - len(prompt_ids))
    screen = _Screen(options.prompt, tokenizer) if options.stream and options.n == 1 else None
    started_at = time.perf_counter()
    rows = generate(
        loaded.model,
        torch.tensor([prompt_ids] * options.n, device=device),
        min(100, room) if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(device).manual_seed(options.seed),
        stop_id=tokenizer.eot,
        on_token=screen,
    ).tolist()
    elapsed_s = time.perf_counter() - started_at
    continuations = [_up_to(row[len(prompt_ids) :], tokenizer.eot) for row in rows]
    texts = [options.prompt + tokenizer.decode(ids) for ids in continuations]
    if screen is not None:
        screen.end()
    else:
        _show(texts)
    n_tokens = sum(min(len(ids) + 1, len(rows[0]) - len(prompt_ids)) for ids in continuations)  # with <|endoftext|>
    sys.stdout.flush()
    sys.stderr.write(f"{n_tokens:,} tokens in {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.1f} tokens/s\n")
    return texts


def _load(options: SampleOptions, device: torch.device) -> LoadedModel:
    """The model, in the type that is asked for."""
    compute = choose_compute("fp32" if options.dtype == "int8" else options.dtype, device)
    loaded = load_model(options.model, device=device, dtype=compute.dtype)
    return replace(loaded, model=in_int8(loaded.model)) if options.dtype == "int8" else loaded


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """The tokenizer that the model was trained with.

    Raises:
        CheckpointError: it is not known, or its vocabulary is another than ours of the same name.
    """
    vocab_size, ref = loaded.model.config.vocab_size, loaded.tokenizer
    if ref is None and vocab_size != 50257:
        raise CheckpointError(
            f"{loaded.source} does not say which tokenizer it was trained with, and its {vocab_size:,} tokens are "
            "not GPT-2's 50,257."
        )
    if ref is None:
        warn(f"{loaded.source} does not say which tokenizer it was trained with; taking GPT-2's, of the same size.")
    tokenizer = load_tokenizer("gpt2" if ref is None else ref.name)
    if ref is not None and ref.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{loaded.source} was trained with a {ref.name!r} vocabulary of fingerprint {ref.fingerprint}, expected "
            f"{tokenizer.fingerprint}; its ids mean other text here."
        )
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{loaded.source} has {vocab_size:,} tokens, its tokenizer {tokenizer.name!r} has {tokenizer.vocab_size:,}."
        )
    return tokenizer


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


def _up_to(ids: list[int], stop_id: int) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids
