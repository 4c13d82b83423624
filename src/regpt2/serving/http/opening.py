"""What `regpt2 serve` prints when it is ready. In: the models and the address; out: one block of lines."""

from regpt2.base.console import count, say
from regpt2.serving.models import Models, Served
from regpt2.serving.options import ServeOptions


def announce(models: Models, options: ServeOptions, url: str, *, needs_key: bool) -> None:
    """The models, the addresses, and how to stop."""
    width = max(len("runs"), *map(len, models))
    key = "any API key" if not needs_key else "with the API key"
    say("Serving")
    for name, served in models.items():
        say(f"  {name:<{width}}  {_of_model(served)}")
    say(f"  {'page':<{width}}  {url}/")
    say(f"  {'API':<{width}}  {url}/v1  (OpenAI's, {key})")
    if options.runs.is_dir():
        say(f"  {'runs':<{width}}  {url}/runs  ({options.runs})")
    say(f"Stop with Ctrl-C: requests get {options.drain_s:g} s to finish; a second Ctrl-C ends them.")


def _of_model(served: Served) -> str:
    """Its size, what it may take, and the memory for that."""
    slots, n_bytes = served.engine.slots, served.engine.cache_bytes
    cache = f" in {n_bytes / 1e6:,.1f} MB of cache" if n_bytes else ""
    return (
        f"{count(served.loaded.model.n_params())} parameters, {served.context:,} tokens of context, "
        f"{slots} slot{'s' * (slots != 1)}{cache}"
    )
