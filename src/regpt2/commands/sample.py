"""Prompts to text. In: a model and prompts; out: text on standard output as it is written, tokens/s on standard error.

regpt2 sample hf:gpt2 "Hello, I'm a language model,"
regpt2 sample runs/gpt2_124m "" --n 3 --max-new-tokens 50
regpt2 sample runs/gpt2_124m --prompts questions.txt --stop "Q:" --json > answers.jsonl
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from regpt2.base.console import safe_json, safe_text, say, show
from regpt2.base.device import be_deterministic, pick_device
from regpt2.base.errors import DataError, UsageError
from regpt2.base.options import parse
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.continue_text import Completion, SampleOptions, completion, completions, load_in, rows_of
from regpt2.sampling.tokenizer import tokenizer_of

STANDARD_INPUT = "-"


def main(argv: list[str]) -> int:
    """The verb `regpt2 sample`."""
    options = _parsed(argv)
    if options.prompt == STANDARD_INPUT and STANDARD_INPUT not in argv[_after_options(argv) :]:
        options = replace(options, prompt=_from_standard_input())
    sample(options)
    return 0


def _after_options(argv: Sequence[str]) -> int:
    """Where the arguments after -- begin."""
    return argv.index("--") if "--" in argv else len(argv)


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
    """Print continuations of the prompts, and return them: n texts of each, with the prompt, without <|endoftext|>.

    Raises:
        UsageError: an option is out of its range, or a prompt too long for the model.
        DataError: the file of prompts is not as it should be.
        CheckpointError, DownloadError: see `load_model` and `tokenizer_of`.
    """
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs needs --json, which prints them.")
    prompts = [options.prompt] if options.prompts is None else read_prompts(options)
    device = pick_device(options.device)
    if options.deterministic:
        be_deterministic(device)
    loaded = load_in(options.dtype, options.model, device)
    tokenizer = tokenizer_of(loaded, options.tokenizer)
    started_at = time.perf_counter()
    if options.stream and not options.json and options.prompts is None and options.n == 1:
        done = [_streamed(options, loaded, tokenizer)]
    else:
        found = completions(options, loaded, tokenizer, prompts)
        done = list(_shown(found, len(prompts) * options.n, tokenizer if options.json else None))
    elapsed_s, n_tokens = time.perf_counter() - started_at, sum(len(one.tokens) for one in done)
    sys.stdout.flush()
    sys.stderr.write(f"{n_tokens:,} tokens in {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.1f} tokens/s\n")
    return [one.prompt + one.text for one in done]


def read_prompts(options: SampleOptions) -> list[str]:
    """The lines of the file that `prompts` names, or the field "prompt" of each; empty lines are left out.

    Raises:
        UsageError: there is no such file, it has no prompt, or a prompt was given too.
        DataError: it is not UTF-8, or a line is not an object with the text "prompt".
    """
    assert options.prompts is not None, "without it there is one prompt"
    path = options.prompts
    if options.prompt:
        raise UsageError(f"there are a prompt, {options.prompt!r:.40}, and --prompts {path}; give one of them.")
    text = _from_standard_input() if str(path) == STANDARD_INPUT else _read(path)
    lines = [(number, line) for number, line in enumerate(re.split(r"\r?\n", text), 1) if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {path} has no prompt; write one in each line.")
    if path.suffix == ".jsonl":
        return [_prompt_of(line, f"{path}:{number}") for number, line in lines]
    return [line for _, line in lines]


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f'{place} is {line!r:.60}, expected an object with the text "prompt": {{"prompt": "..."}}.')
    return prompt


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read ({error.strerror}); give a text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it.") from error


def _from_standard_input() -> str:
    """All of it, without one line end at its end."""
    try:
        return re.sub(r"\r?\n\Z", "", sys.stdin.buffer.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text (byte {error.start:,}); convert it.") from error


def _streamed(options: SampleOptions, loaded: LoadedModel, tokenizer: Tokenizer) -> Completion:
    """Shows a continuation as its text arrives: only whole characters, and none that could control the terminal."""
    unshown, rows = options.prompt, []
    for rows in rows_of(options, loaded, tokenizer):
        show(unshown + rows[0].new)
        unshown = ""
    show("\n")
    return completion(options.prompt, rows[0])


def _shown(found: Iterator[Completion], total: int, tokenizer: Tokenizer | None) -> Iterator[Completion]:
    """Shows each continuation when it is there; with a tokenizer as a line of JSON."""
    for number, one in enumerate(found, start=1):
        text = one.prompt + one.text
        if tokenizer is not None:
            text = safe_json(json.dumps(for_json(one, tokenizer), ensure_ascii=False))
        elif total > 1:
            text = f"--- {number} of {total} ---\n{text}"
        say(text)
        yield one


def for_json(one: Completion, tokenizer: Tokenizer) -> dict[str, object]:
    """A continuation as JSON holds it."""
    found: dict[str, object] = {
        "prompt": one.prompt,
        "text": one.text,
        "tokens": list(one.tokens),
        "finish_reason": one.finish_reason,
    }

    def named(token: int, logprob: float) -> dict[str, object]:
        known = logprob if math.isfinite(logprob) else None  # JSON has no infinity
        return {"token": token, "text": tokenizer.decode([token]), "logprob": known}

    if one.logprobs is not None:
        found["logprobs"] = [
            {**named(kept.token, kept.logprob), "top": [named(*pair) for pair in kept.top]} for kept in one.logprobs
        ]
    return found
