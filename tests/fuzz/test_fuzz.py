"""Files that nobody meant to write: readers take them or refuse them with a Problem, at once and in little memory."""

import contextlib
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import IO

import numpy as np
import pytest
import seeds
import targets
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import mutate, odd, toml
from safetensors import SafetensorError

from regpt2.base.errors import DataError
from regpt2.base.record.metrics import MetricsLog
from regpt2.config import toml_file
from regpt2.config.run import RunConfig
from regpt2.data import tokenizer
from regpt2.data.tokens import other_formats, shards
from regpt2.model.files import fill_model, tensors
from regpt2.model.weights import gguf
from regpt2.training import checkpoint

FUZZ = Path(__file__).parent / "fuzz.py"
ROOM_BYTES = 256 << 20
EXAMPLES = {"weights": 500, "model_file": 500, "model_config": 500, "vocabulary": 150}

every_target = pytest.mark.parametrize("name", targets.TARGETS)


@pytest.fixture(autouse=True)
def imported() -> None:
    """What a reader imports or builds on its first use is not charged to a fuzzed file."""
    for name, target in targets.TARGETS.items():
        target(seeds.good(name)[0])


def fuzzed(name: str) -> st.SearchStrategy[bytes]:
    """Files of the corpus with changes; any bytes; trees of odd values."""
    changed = st.builds(mutate, st.just(name), st.sampled_from(seeds.inputs(name)), randoms())
    tree = st.builds(lambda random: toml({"a": odd(random, 3)}).encode("utf-8", "surrogatepass"), randoms())
    return st.one_of(changed, changed, changed, changed, st.binary(max_size=300), tree)


def randoms() -> st.SearchStrategy[Random]:
    return st.integers(0, 2**32).map(Random)


@pytest.mark.seconds
@every_target
def test_every_file_is_read_or_refused(name: str) -> None:
    n = EXAMPLES.get(name, 2000)

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fuzzed(name))
    @example(b"")
    def check(data: bytes) -> None:
        targets.feed(name, data)

    with targets.little_memory(ROOM_BYTES):
        check()


@every_target
def test_files_that_fuzzing_has_found_are_read_or_refused(name: str) -> None:
    assert len(seeds.inputs(name)) > len(seeds.good(name)), f"{seeds.CORPUS / name} is empty"
    with targets.little_memory(ROOM_BYTES):
        for data in seeds.inputs(name):
            targets.feed(name, data)


@pytest.mark.parametrize("name", ["manifest", "recipe", "record"])
def test_good_files_are_not_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "may_refuse", contextlib.nullcontext)
    for data in seeds.good(name):
        targets.feed(name, data)


def wait(*_: object) -> None:
    end = time.process_time() + targets.MOST_S
    while time.process_time() < end:
        pass


class Flood(DataError):
    def __str__(self) -> str:
        return "x" * 5000


def allocate(path: Path, file: IO[bytes], size: int) -> other_formats.TokenFile:
    """Take the memory that a .npy header asks for, 64-fold: more than malloc has kept of earlier tests. Then look."""
    if found := re.search(rb"\((\d{9,12}),", file.read(200)):
        np.zeros((int(found[1]), 64), np.uint16)
    file.seek(0)
    return look(path, file, size)


look = other_formats._npy

PLANTS: dict[str, tuple[str, object, str, object, type[BaseException]]] = {
    "a size that nobody checks": ("shards", other_formats, "expect_bytes", lambda *_: None, Exception),
    "memory as a header asks for": ("shards", other_formats, "_npy", allocate, MemoryError),
    "a shard that is not hashed": ("manifest", shards, "verify_shard", lambda *_: None, AssertionError),
    "half a surrogate pair": ("tokenizer", tokenizer, "valid_text", lambda text: text, UnicodeEncodeError),
    "weights beyond the file": ("model_file", gguf, "_check_places", lambda *_: None, Exception),
    "a vocabulary by its size": ("vocabulary", tokenizer, "sha256_file", lambda _: tokenizer.VOCAB_SHA256, Exception),
    "a record that is not cut": ("record", MetricsLog, "cut_back", lambda *_: None, Exception),
    "tensors as they come": ("model_config", fill_model, "check_tensors", lambda *_: None, RuntimeError),
    "an error of a library": ("weights", tensors, "SafetensorError", KeyError, SafetensorError),
    "a checkpoint that is not hashed": ("checkpoint", checkpoint, "verify_files", lambda *_: None, Exception),
    "a slow reader": ("recipe", RunConfig, "__post_init__", wait, AssertionError),
    "a message without end": ("recipe", toml_file, "ConfigError", Flood, AssertionError),
}


@pytest.mark.seconds
@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_fault_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, wrong, seen = PLANTS[what]
    targets.feed(name, b"W")  # imports what it needs, before the clock is strict
    monkeypatch.setattr(owner, attribute, wrong)
    monkeypatch.setattr(targets, "MOST_S", 0.1)
    start, random = seeds.good(name), Random(0)
    tries = (mutate(name, random.choice(start), random) for _ in range(1000))
    with targets.little_memory(ROOM_BYTES), pytest.raises(seen):
        any(targets.feed(name, data) for data in tries)


def test_the_command_names_every_target() -> None:
    assert list(targets.TARGETS) == runpy.run_path(str(FUZZ))["NAMES"]


def test_the_command_says_how_to_get_the_fuzzer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find: Callable[[str], object] = lambda _: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "shards"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(FUZZ), run_name="__main__")
    assert left.value.code == 2 and "pip install" in capsys.readouterr().err
