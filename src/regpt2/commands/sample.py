"""Prompt to text. In: a model and a prompt; out: text on standard output as it is written, tokens/s on standard error.

regpt2 sample hf:gpt2 "Hello, I'm a language model,"
regpt2 sample runs/gpt2_124m "" --n 3 --max-new-tokens 50
"""

import re
import sys
import time
from dataclasses import fields

from torch import Tensor

from regpt2.base.console import safe_text, say, show
from regpt2.base.device import be_deterministic, pick_device
from regpt2.base.options import parse
from regpt2.data.tokenizer import StreamDecoder, Tokenizer
from regpt2.sampling.continue_text import SampleOptions, continuations, load_in
from regpt2.sampling.tokenizer import tokenizer_of


def main(argv: list[str]) -> int:
    """The verb `regpt2 sample`."""
    sample(_parsed(argv))
    return 0


def _parsed(argv: list[str]) -> SampleOptions:
    """The options. An argument that starts with - and has a space in its name is a prompt, as "-x or -y" is."""
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
        for number, text in enumerate(texts, start=1):
            say(f"--- {number} of {len(texts)} ---\n{text}" if len(texts) > 1 else text)
    sys.stdout.flush()
    sys.stderr.write(f"{n_tokens:,} tokens in {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.1f} tokens/s\n")
    return texts


class _Screen:
    """Shows one continuation as its ids arrive: only whole characters, and none that could control the terminal."""

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
