"""What the tests share: no network but loopback, two small threads, a tiny prepared data folder, a command runner."""

import importlib.util
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pytest workers share the cores; read when torch is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_TOKEN_PATH"] = os.devnull  # read when huggingface_hub is first imported: no test sends a real token

import torch

import quick
from regpt2.base.device import _cpu_has_bf16
from regpt2.cli import main
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import write_shard
from regpt2.model import conversion
from regpt2.model.files import safe_pickle
from warm_processes import run_python, warm_context

needs_bf16 = pytest.mark.skipif(not _cpu_has_bf16(), reason="this CPU does not compute in bf16")

TINY_RECIPE = """
max_steps = 12
eval_every = 6
sample_every = 12
save_every = 4
device = "cpu"
precision = "fp32"
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
vocab_size = 257
dropout = 0.1
[batch]
batch_tokens = 256
micro_batch = 2
seq_len = 32
[optim]
lr = 3e-3
[schedule]
warmup_steps = 4
[evals]
val_tokens = 512
[sample]
prompt = "a"
n = 2
max_new_tokens = 8
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what starts processes or takes seconds")


def pytest_sessionstart(session: pytest.Session) -> None:
    """The children that read a foreign file and an export are forks of a warm process, in milliseconds.

    tests/test_security.py has a real one that reads a file, `make clients` real ones that read exports.
    """
    if session.config.option.markexpr != "clients":
        conversion.get_context = warm_context  # type: ignore[assignment]
    safe_pickle.subprocess = SimpleNamespace(  # type: ignore[assignment]
        run=_unpickle_in_a_fork, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def _unpickle_in_a_fork(command: list[str], *, stderr: BinaryIO, cwd: Path, timeout: float, **_: object) -> Any:
    done = run_python(*command[command.index("-m") :], cwd=cwd, timeout=timeout)
    stderr.write(done.stderr.encode())
    return done


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick.mark_those_that_start_processes(items)
    if config.getoption("--quick"):
        left_out = [item for item in items if any(item.get_closest_marker(name) for name in ("process", "seconds"))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def a_quick_test_starts_no_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--quick"):
        quick.refuse_processes(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard() -> None:
    """A shell that starts pytest behind an `&` has SIGINT ignored, and so would all processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def pages_written(*, are: bool = True) -> Iterator[None]:
    """Do runs in this process write their pages? By default not: a page is three quarters of a tiny run's time.

    Runs in processes of their own always do.
    """
    from regpt2.commands import report
    from regpt2.run import ending

    write = report.write_report if are else lambda run: run / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "write_report", write)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_pages() -> Iterator[None]:
    with pages_written(are=False) if importlib.util.find_spec("tyro") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def torch_s_own_matmuls() -> None:
    """A run in this process may have chosen others for all of it; a test beside it would then get other bits."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A test that reaches for the network fails at once."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            host = address[0] if isinstance(address, tuple) else str(address)
            assert host in ("127.0.0.1", "::1", "localhost"), f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def write_data(folder: Path, *, n_train: int = 20_000, n_val: int = 2_000, seed: int = 0) -> Path:
    """A prepared folder of "bytes" tokens with some structure in it, in three train shards and one val shard."""
    rng = np.random.default_rng(seed)
    words = [bytes(rng.integers(97, 123, size=rng.integers(2, 8), dtype=np.uint8)) for _ in range(50)]
    text = b" ".join(words[i] for i in rng.integers(0, 50, size=n_train + n_val))
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    cuts = [0, n_train // 2, n_train // 2 + 7, n_train]
    parts = [ids[a:b] for a, b in pairwise(cuts)]
    return write_tokens(folder, parts, ids[n_train : n_train + n_val], revision=str(seed))


Ids = NDArray[np.uint16]


def write_tokens(folder: Path, train: Sequence[Ids], val: Ids, *, revision: str = "0") -> Path:
    """A prepared folder of these ids of the "bytes" tokenizer: a shard for each part of train, one for val."""
    tokenizer = load_tokenizer("bytes")
    folder.mkdir(parents=True, exist_ok=True)
    shards = [write_shard(folder / f"tiny_train_{i:06d}.bin", len(p), [p]) for i, p in enumerate(train)]
    held_out = [write_shard(folder / "tiny_val_000000.bin", len(val), [val])]
    n_train, n_val = sum(map(len, train)), len(val)
    Manifest(
        dataset="tiny",
        source="made by a test",
        revision=revision,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        options={},
        splits={"train": Split(0, n_train, n_train, tuple(shards)), "val": Split(0, n_val, n_val, tuple(held_out))},
        skipped={},
    ).write(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder; read only."""
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """A recipe file that trains in a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def regpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in tmp_path: regpt2("train", recipe, "--run", ..., VARIABLE="its value")."""

    def run(*arguments: object, **environment: str) -> CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        command = [str(argument) for argument in arguments]
        try:
            code = main(command)
        except SystemExit as end:  # the parser's own
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return CompletedProcess(command, code, shown.out, shown.err)

    return run


@pytest.fixture
def regpt2_process(tmp_path: Path) -> Run:
    """The same in a process of its own, which takes seconds: where a fresh interpreter is the point."""

    def run(*arguments: object, timeout_s: float = 120, **environment: str) -> CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "regpt2", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture
def unused_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but its lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def shard_tokens(folder: Path, split: str) -> list[int]:
    """All tokens of a split's shards, from the description of the format alone."""
    tokens: list[int] = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        data = path.read_bytes()
        magic, version, count = struct.unpack_from("<3i", data)
        assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
        tokens += struct.unpack_from(f"<{count}H", data, 1024)
    return tokens
