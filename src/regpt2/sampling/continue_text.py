"""Prompts continued. In: options, a loaded model and its tokenizer; out: texts, whole or piece by piece."""

from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from regpt2.base.console import warn
from regpt2.base.device import choose_compute
from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.draw import Choice
from regpt2.sampling.generate import in_all, may_differ_in_length, require_fit, require_some
from regpt2.sampling.twins.cpu import in_int8
from regpt2.sampling.writing import FinishReason, Request, Row, TokenLogprob, write

SampleType = Literal["fp32", "bf16", "int8"]
Long = Literal["refuse", "crop"]

_MOST_NEW = 1_000_000  # tokens beyond a context: the ids of a row are kept on the device


@dataclass(frozen=True)
class SampleOptions:
    """Continue a prompt, token by token."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format, hf:gpt2, or builtin:novels."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = ""
    """The text to continue; empty: a new document; -: standard input. Put one that begins with - last, after --."""
    prompts: Path | None = None
    """Continue each line of a file (- = standard input); of a .jsonl file each line's "prompt"."""
    max_new_tokens: int | None = None
    """Most tokens to write; fewer if the model ends the document. Default: 100, or as many as fit."""
    context: int | None = None
    """Most tokens of context, prompt included. Default: as many as in training, at most block_size."""
    long: Long = "refuse"
    """What exceeds the context is refused, or crop: only the last tokens are read (docs/sampling.md)."""
    n: int = 1
    """Number of continuations of each prompt."""
    temperature: float = 1.0
    """Below 1 more predictable, above 1 more random; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0 = from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this part of the most likely one's probability; 0 = from all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that the text has already; 1 = off."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; give the option again for more texts."""
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
    batch: int = 16
    """Most continuations to compute at once; the n of one prompt are always computed together."""
    stream: bool = True
    """Show a single continuation token by token."""
    json: bool = False
    """Print a line of JSON for each continuation: prompt, text, tokens, finish_reason, logprobs."""
    logprobs: int | None = None
    """With --json: the log-probability of each new token, and the N most likely ones with theirs."""


@dataclass(frozen=True)
class Completion:
    """A continuation, complete."""

    prompt: str
    text: str
    """The continuation, without the prompt, end of text, and what follows."""
    tokens: tuple[int, ...]
    """Every id drawn, with that of end of text, or those of the stop text."""
    finish_reason: FinishReason
    """stop (a stop text), length (max_new_tokens), or end_of_text."""
    logprobs: tuple[TokenLogprob, ...] | None
    """For each of `tokens`, if asked for."""


def completions(
    options: SampleOptions, loaded: LoadedModel, tokenizer: Tokenizer, prompts: Sequence[str]
) -> Iterator[Completion]:
    """n for each prompt, in their order, as soon as a batch is done. Nothing is printed.

    A prompt that is in the list several times is one prompt with more continuations.

    Raises:
        UsageError: an option is out of its range, or a prompt too long for the model. Before anything is computed.
    """
    if options.batch < 1:
        raise UsageError(f"batch = {options.batch} must be at least 1.")
    context = context_of(loaded, options.context)
    requests = {
        text: _request(options, loaded, tokenizer, text, context, options.n * times)
        for text, times in Counter(prompts).items()
    }
    return _in_order(options, loaded, tokenizer, prompts, requests, context)


def rows_of(options: SampleOptions, loaded: LoadedModel, tokenizer: Tokenizer) -> Generator[list[Row], None, None]:
    """The n continuations of one prompt while they are written: all rows after each step; see `write`.

    Raises:
        UsageError: as for `completions`, at once.
    """
    context = context_of(loaded, options.context)
    request = _request(options, loaded, tokenizer, options.prompt, context, options.n)
    return write(loaded.model, tokenizer, [request], context=context)


def load_in(dtype: SampleType, spec: str, device: torch.device) -> LoadedModel:
    """The model that `spec` names, as `load_model` gives it, in the type that was asked for."""
    compute = choose_compute("fp32" if dtype == "int8" else dtype, device)
    loaded = load_model(spec, device=device, dtype=compute.dtype)
    return replace(loaded, model=in_int8(loaded.model)) if dtype == "int8" else loaded


def _in_order(
    options: SampleOptions,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    requests: dict[str, Request],
    context: int,
) -> Iterator[Completion]:
    waiting, done = deque(prompts), dict[str, Iterator[Completion]]()
    for texts in batches(loaded.model, requests, options.batch, context):
        rows: list[Row] = []
        for rows in write(loaded.model, tokenizer, [requests[text] for text in texts], context=context):  # noqa: B007
            pass
        for text in texts:
            n = requests[text].n
            done[text] = iter([completion(text, row) for row in rows[:n]])
            rows = rows[n:]
        while waiting and waiting[0] in done:
            yield from islice(done[waiting.popleft()], options.n)


def completion(prompt: str, row: Row) -> Completion:
    """What a row has become."""
    assert row.finish_reason is not None, "it is still written"
    logprobs = None if row.request.logprobs is None else tuple(row.logprobs)
    return Completion(prompt, row.text, tuple(row.tokens), row.finish_reason, logprobs)


def batches(model: LanguageModel, requests: Mapping[str, Request], most_rows: int, context: int) -> Iterator[list[str]]:
    """Names of requests that are computed together: at most `most_rows` rows, unless one request alone has more.

    Those of different lengths go together if the model can (`may_differ_in_length`), else only those of equal length.
    """
    lots: dict[int, list[str]] = {}
    together = may_differ_in_length(model)
    for name, request in requests.items():
        lots.setdefault(0 if together else min(context, len(request.ids)), []).append(name)
    for lot in lots.values():
        batch, n_rows = list[str](), 0
        for name in lot:
            if batch and n_rows + requests[name].n > most_rows:
                yield batch
                batch, n_rows = [], 0
            batch.append(name)
            n_rows += requests[name].n
        yield batch


def _request(
    options: SampleOptions, loaded: LoadedModel, tokenizer: Tokenizer, prompt: str, context: int, n: int
) -> Request:
    """The prompt in ids, with its options, all checked."""
    if options.n < 1:
        raise UsageError(f"n = {options.n} must be at least 1.")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"seed = {options.seed} must be from 0 to 2**63 - 1.")
    ids = tokenizer.encode(prompt) or [tokenizer.start_id]
    if not prompt and tokenizer.eot is None:
        warn(f"this model has no end of text; continuing the empty prompt after {tokenizer.decode(ids)!r}.")
    most, vocab_size = options.logprobs, loaded.model.config.vocab_size
    if most is not None and not 0 <= most <= vocab_size:
        raise UsageError(f"logprobs = {most} must be from 0 to the number of tokens, {vocab_size:,}.")
    choice = Choice(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    n_new = _n_new(options, loaded, len(ids), context)
    return Request(tuple(ids), n_new, n, choice, options.seed, options.stop, logprobs=most)


def context_of(loaded: LoadedModel, context: int | None) -> int:
    """Most tokens that one is drawn after: `context`, or as many as in training; a UsageError if it is out of range."""
    trained, block_size = loaded.model.context_size, loaded.model.config.block_size
    if context is not None and not 1 < context <= block_size:
        raise UsageError(f"context = {context} must be from 2 to the model's block_size, {block_size:,}.")
    most = trained if context is None else context
    if most > trained:
        warn(f"{loaded.source} was trained on sequences of {trained:,} tokens: later positions are untrained.")
    return most


def _n_new(options: SampleOptions, loaded: LoadedModel, n_prompt: int, most: int) -> int:
    """How many tokens may follow the prompt; a UsageError if they do not fit and may not be cropped."""
    n_new, block_size = options.max_new_tokens, loaded.model.config.block_size
    if options.long == "crop":
        if n_new is not None and n_new > _MOST_NEW:
            raise UsageError(f"max_new_tokens = {n_new:,} must be at most {_MOST_NEW:,}.")
        return 100 if n_new is None else n_new
    least = 1 if n_new is None else n_new
    if most < block_size and n_prompt + least > most:
        why = "--context is" if options.context else "the model was trained on windows of"
        raise UsageError(
            f"{in_all(n_prompt, least)}, and {why} {most:,}. Shorten the prompt, ask for fewer new tokens, or give a "
            f"larger --context, up to the model's block_size, {block_size:,}."
        )
    room = max(1, most - n_prompt)
    n_new = min(100, room) if n_new is None else n_new
    require_some(n_new)
    require_fit(n_prompt, n_new, block_size)
    return n_new
