"""The models that are served. In: their names on the command line; out: each loaded, with its engine."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from regpt2.base.console import safe_text
from regpt2.base.device import keep_few_products, pick_device
from regpt2.data.chat_template import special_ids
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.batching.engine import Engine
from regpt2.sampling.continue_text import context_of, load_in
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.sampling.twins.cpu import Int8Linear
from regpt2.serving.options import ServeOptions

_HASHED = 1024  # values of each tensor: an update of training changes nearly all of them


@dataclass(frozen=True)
class Served:
    """A model, ready to answer."""

    name: str
    """Its id in the API: the last part of its path, never the whole."""
    loaded: LoadedModel
    tokenizer: Tokenizer
    engine: Engine
    context: int
    """Most tokens of prompt and answer together."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @property
    def chats(self) -> bool:
        """Was it trained on conversations?"""
        return special_ids(self.tokenizer) is not None

    @cached_property
    def longest_token(self) -> int:
        """Most bytes of a token's text."""
        return max(map(len, self.tokenizer.id_bytes))

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights: of other weights, or of another type, it is another."""
        digest, model = hashlib.blake2b(digest_size=5), self.loaded.model
        scales = [
            (name, value.scale)
            for block in model.h
            for name, value in vars(block).items()
            if isinstance(value, Int8Linear)
        ]
        for name, p in [*sorted(model.named_parameters()), *scales]:
            values = p.detach().flatten()
            some = values[:: max(1, len(values) // _HASHED)].float().cpu()
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + some.numpy().tobytes())
        return f"fp_{digest.hexdigest()}"


Models = dict[str, Served]


@contextmanager
def serving(options: ServeOptions) -> Iterator[Models]:
    """The models by name, the first one first; at the end their engines are closed.

    Raises:
        UsageError: the context is out of its range, or there is too little memory.
        CheckpointError, DownloadError: see `load_model` and `tokenizer_of`.
    """
    keep_few_products()
    device = pick_device(options.device)
    models: Models = {}
    with ExitStack() as engines:
        threads = engines.enter_context(_one_thread_here()) // len(options.models)
        for spec, name in zip(options.models, names_of(options.models), strict=True):
            models[name] = _serve(name, spec, device, options, max(1, threads))
            engines.callback(models[name].engine.close, drain_s=0)
        yield models


@contextmanager
def _one_thread_here() -> Iterator[int]:
    """Let torch compute with a single thread here, and give how many it had.

    Each thread that computes with several has OpenMP make some for it. When these are more than there are cores, GNU's
    OpenMP lets all of them sleep at every operation: an engine beside a thread that had loaded a model with two
    took 2.6 times as long for a step of the demo model.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _serve(name: str, spec: str, device: torch.device, options: ServeOptions, threads: int) -> Served:
    loaded = load_in(options.dtype, spec, device)
    context = context_of(loaded, options.context)
    tokenizer = tokenizer_of(loaded)
    engine = Engine(
        loaded.model, tokenizer, context=context, slots=options.slots, most_waiting=options.queue, threads=threads
    )
    served = Served(name, loaded, tokenizer, engine, context)
    _ = served.fingerprint, served.longest_token  # now, while the engine does not use the device
    return served


def names_of(specs: Sequence[str]) -> list[str]:
    """A name for each model: the last part of its path, of a checkpoint the run's too; numbered where two are equal."""
    names: list[str] = []
    for plain in map(_name, specs):
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _name(spec: str) -> str:
    kind, _, name = spec.partition(":")
    if kind in ("hf", "builtin"):
        return safe_text(name)
    path = Path(spec).absolute()
    if path.name == "checkpoints":
        path = path.parent
    parts = [path.name]
    if path.parent.name == "checkpoints":
        parts.insert(0, path.parent.parent.name)
    return safe_text("-".join(part for part in parts if part)) or "model"
