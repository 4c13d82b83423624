"""The compiler's work is kept, found again by another process, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regpt2.training import compiler_cache
from regpt2.training.compiler_cache import CompilerCache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path))
    return tmp_path / "compiled"


def made(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (content, None))


def test_what_decides_the_code_decides_the_file() -> None:
    one, other = CompilerCache({"model": {"n_layer": 1}}), CompilerCache({"model": {"n_layer": 2}})
    assert one.path != other.path
    assert one.path == CompilerCache({"model": {"n_layer": 1}}).path


def test_another_torch_has_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = CompilerCache({}).path
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert CompilerCache({}).path != before


def test_nothing_is_loaded_where_nothing_was_saved() -> None:
    assert not CompilerCache({}).load()


def test_a_flipped_bit_keeps_a_file_from_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda made: seen.append(made) or "loaded")
    made(monkeypatch, b"kernels of a step")
    CompilerCache({}).save()
    kept = CompilerCache({})
    assert kept.load()
    content = bytearray(kept.path.read_bytes())
    content[-3] ^= 4
    kept.path.write_bytes(content)
    assert not CompilerCache({}).load()
    assert seen == [b"kernels of a step"]
    assert "it is damaged; the step is compiled again" in capsys.readouterr().err


def test_what_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made(monkeypatch, b"\x80\x04garbage")
    CompilerCache({}).save()
    assert not CompilerCache({}).load()
    assert "torch cannot use it" in capsys.readouterr().err


def test_the_newest_files_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_cache, "_KEPT_FILES", 2)
    for n in range(4):
        made(monkeypatch, b"%d" % n)
        kept = CompilerCache({"n": n})
        kept.save()
        os.utime(kept.path, (n, n))
    assert sorted(path.read_bytes()[-1:] for path in cache.glob("*.bin")) in ([b"2", b"3"], [b"1", b"3"])
    assert len(list(cache.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compiled").write_text("in the way")
    made(monkeypatch, b"x")
    CompilerCache({}).save()
    assert "not kept for the next start" in capsys.readouterr().err


ROUND_TRIP = """
import torch
from torch._dynamo.utils import counters
from regpt2.training.compiler_cache import CompilerCache
cache = CompilerCache({"what": "a small function"})
loaded = cache.load()
torch.compile(lambda x: (x.tanh() * 2).sum(dim=1), dynamic=False)(torch.ones(64, 64))
cache.save()
print(loaded, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    found = []
    for n in range(2):  # each with an empty cache of the compiler's own
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"compiler{n}")}
        command = [sys.executable, "-c", ROUND_TRIP]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["False", "0", "1"], ["True", "1", "0"]]
