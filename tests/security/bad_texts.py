"""Names, recipes, merges and records: text from outside that could climb, run or flood."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from bad_tensors import DEEP, texts, written
from cases import ODD_THINGS, Case, Content

from regpt2.base.errors import Problem, UsageError
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.commands.report import write_report
from regpt2.config.recipe_files import load_recipe
from regpt2.model.files.load import load_model
from regpt2.model.weights import huggingface

HUB = {
    "climbing": "../../etc",
    "climbing from within": "a/../../etc",
    "a parent": "..",
    "a folder": ".",
    "an owner that climbs": "../gpt2",
    "three parts": "a/b/c",
    "an option": "-x",
    "an option for a name": "owner/--help",
    "absolute": "/etc/passwd",
    "of Windows": "a\\b",
    "a NUL": "gpt2\0",
    "an end of line": "gpt2\n",
    "escapes": "\x1b]52;c;aGk=\x07",
    "300 characters": "a" * 300,
    "an address": "https://example.org/gpt2",
    "a user and password": "user:word@host",
    "a query": "gpt2?x=1",
    "a revision": "gpt2@main",
    "a wide slash": "a\uff0fb",
    "an overriding mark": "gpt2\u202e",
    "Cyrillic": "g\u0440t2",
    "a space": "gpt2 ",
    "nothing": "",
}


def recipes() -> dict[str, Content]:
    """TOML that is none, or says what cannot be."""
    return {
        "code": b"import os\nos.system('id')",
        "an unknown key": b"exec = 'id'",
        "a dunder": b"__class__ = 'os'",
        "a key twice": b"max_steps = 1\nmax_steps = 2",
        "a table twice": b"[model]\n[model]",
        "a table for a number": b"[max_steps]\na = 1",
        "a number for a table": b"model = 7",
        "a list for a table": b"model = []",
        "NaN": b"[optim]\nlr = nan",
        "1e400": b"[optim]\nlr = 1e400",
        "minus infinity": b"[optim]\nlr = -inf",
        "2**80 steps": b"seed = 1208925819614629174706176",
        "a number of 10,000 digits": b"seed = " + b"9" * 10_000,
        "a date": b"seed = 1979-05-27T07:32:00Z",
        "true steps": b"max_steps = true",
        "text steps": b"max_steps = '1'",
        "steps in hexadecimal, negative": b"max_steps = -1",
        "deep lists": b"seed = " + b"[" * 100_000 + b"]" * 100_000,
        "deep tables": b"a." * 50_000 + b"b = 1",
        "deep inline tables": b"a = " + b"{a = " * 50_000 + b"1" + b"}" * 50_000,
        "no UTF-8": b"run = '\xff'",
        "a NUL": b"run = 'a\0b'",
        "a list of evaluations that climbs": b"[evals]\nnames = ['../../os']",
        "evaluations in a string": b"[evals]\nnames = 'val_loss'",
        "an optimizer that climbs": b"[optim]\nname = '../../../os'",
        "an optimizer of another package": b"[optim]\nname = 'os.system'",
        "betas of three": b"[optim]\nbetas = [0.1, 0.2, 0.3]",
        "a device of code": b"precision = 'exec'",
        "17 MB": b"# " + b"x" * (17 << 20),
    }


def merges() -> dict[str, Content]:
    """In place of merges.txt beside a foreign model's weights: no text, but the weights are read."""
    return {"no UTF-8": b"\xff\xfe\xfa", "17 MB": b"a b\n" * (17 << 18)} | {
        what: content for what, content in ODD_THINGS.items() if what not in ("nothing in it", "random bytes")
    }


def records() -> dict[str, str]:
    """Records of a run that are none."""
    start = json.dumps({"event": "run", "step": 0})
    return {
        "deep JSON": f'{start}\n{{"event": {DEEP}, "step": 0}}\n{start}\n',
        "a list": f"{start}\n[1]\n{start}\n",
        "no step": f'{start}\n{{"event": "train"}}\n{start}\n',
        "a number": f"7\n{start}\n",
        "text": "Traceback (most recent call last):\nmore\n",
    }


def hub(name: str) -> Callable[[Path], object]:
    """Load a model of the hub by this name."""
    return lambda folder: load_model(f"hf:{name}")


def report(folder: Path) -> None:
    """The page of a run, written elsewhere."""
    with tempfile.TemporaryDirectory() as place:
        write_report(folder, Path(place) / "r.html")


def command(*arguments: str) -> Callable[[Path], object]:
    """The command itself: an error of the system, as for a path that is too long, becomes its message."""

    def run(folder: Path) -> None:
        if code := main(list(arguments)):
            raise {1: Problem, 2: UsageError}[code]("refused by the command")

    return run


def text_cases(canary: Path) -> list[Case]:
    """All of them."""
    theirs = written(huggingface)
    cases = [Case(f"hub name: {what}", hub(name), {}) for what, name in HUB.items()]
    for what, content in (recipes() | ODD_THINGS).items():
        harmless = what == "nothing in it"  # an empty recipe is GPT-2's own
        cases.append(
            Case(f"recipe: {what}", lambda f: load_recipe(str(f / "r.toml")), {"r.toml": content}, fine=harmless)
        )
    for what, content in merges().items():
        cases.append(Case(f"merges: {what}", load_model, theirs | {"merges.txt": content}, fine=True))
    for what, content in (texts() | ODD_THINGS).items():  # without merges in it, nothing is known of the tokenizer
        cases.append(Case(f"tokenizer.json: {what}", load_model, theirs | {"tokenizer.json": content}, fine=True))
    for what, content in (records() | ODD_THINGS).items():
        if what in records():
            cases.append(
                Case(f"record: {what}", lambda f: list(read_events(f / "metrics.jsonl")), {"metrics.jsonl": content})
            )
        harmless = what == "nothing in it"
        cases.append(Case(f"report: {what}", report, {"metrics.jsonl": content}, fine=harmless))
    for what, path in {"of 5,000 characters": "a" * 5000, "with a NUL": "a\0b", "of a device": "/dev/zero"}.items():
        cases.append(Case(f"a model's path {what}", command("explore", path), {}))
        cases.append(Case(f"a data folder's path {what}", command("evaluate", "runs/none", "--data", path), {}))
        cases.append(Case(f"a recipe's path {what}", command("train", f"{path}.toml"), {}))
    return cases
