"""The models that are served. In: their names on the command line; out: each loaded, with its engine."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.device import pick_device
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.batching.engine import Engine
from regpt2.sampling.continue_text import load_in
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.serving.options import ServeOptions


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


Models = dict[str, Served]


@contextmanager
def serving(options: ServeOptions) -> Iterator[Models]:
    """The models by name, the first one first; at the end their engines are closed."""
    device = pick_device(options.device)
    models: Models = {}
    for spec, name in zip(options.models, _names(options.models), strict=True):
        loaded = load_in(options.dtype, spec, device)
        tokenizer = tokenizer_of(loaded)
        context = options.context or loaded.model.context_size
        engine = Engine(loaded.model, tokenizer, window=context, slots=options.slots, most_waiting=options.queue)
        models[name] = Served(name, loaded, tokenizer, engine, context)
    try:
        yield models
    finally:
        for served in models.values():
            served.engine.close(drain_s=0)


def _names(specs: tuple[str, ...]) -> list[str]:
    """The last part of each path; numbered where two share it."""
    names = [
        Path(spec.removeprefix("hf:")).resolve().name if not spec.startswith("hf:") else spec[3:] for spec in specs
    ]
    times, seen = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if times[name] == 1 else f"{name}-{seen[name]}")
    return numbered
