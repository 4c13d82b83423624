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
    """Its size and what it may take, in one line."""
    n_parameters = sum(p.numel() for p in served.loaded.model.parameters())
    slots = served.engine.slots
    return f"{count(n_parameters)} parameters, {served.context:,} tokens of context, {slots} slot{'s' * (slots != 1)}"
