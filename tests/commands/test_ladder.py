"""The verb ladder: measured rungs in three files, nothing measured twice, an interruption loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from regpt2.base.errors import UsageError
from regpt2.commands import ladder
from regpt2.commands.ladder import main
from regpt2.machine.speed import ladder_record
from regpt2.machine.speed.steps import StepTimes, StepWork

SIZES = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32", "--model.block-size", "32"]
TINY = [*SIZES, "--model.vocab-size", "257", "--micro-batch", "2", "--device", "cpu", "--steps", "2"]


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source may be edited while the tests run."""
    monkeypatch.setattr(ladder_record, "digest", lambda *_: "this code")


def written(folder: Path) -> Any:
    return json.loads((folder / "ladder.json").read_text())


def told(work: StepWork, **_: object) -> StepTimes:
    """Times made up, the faster the fewer parts are as in the lecture."""
    step_s = 0.1 * (1 + len(work.as_lecture))
    return StepTimes(
        step_s=[step_s, step_s], losses=[5.0, 4.9, 4.8], grad_norms=[1.0] * 3, tokens=work.tokens, flops_per_token=1e6,
        setup_s=1.0, peak_bytes=10**9, device="cpu", precision="fp32", compiled=False, attention="matmul", torch="0",
    )  # fmt: skip


@pytest.mark.process
def test_it_measures_shows_writes_and_does_not_measure_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*TINY, "--out", str(tmp_path), "--rungs", "fp32", "tf32", "train"]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = written(tmp_path)
    fp32, tf32, ours = found["rungs"]
    assert fp32["times"]["step_s"] and fp32["figures"]["gain"] is None and fp32["work"]["as_lecture"]
    assert tf32["times"] is None and "not in the hardware" in tf32["why_not"] and tf32["why_not"] in said
    assert ours["work"]["as_lecture"] == [] and ours["figures"]["gain"] > 0
    assert ours["work"]["model"]["vocab_multiple"] == 64 and fp32["work"]["model"]["vocab_multiple"] == 1
    assert {"command", "time", "version", "commit", "python", "torch", "device", "threads", "code"} <= found.keys()
    assert "the step that `regpt2 train` makes" in said
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "ladder.md").read_text()
    assert "| train | loss in chunks | always |" in table and "1,000 ms" in table
    assert re.search("tf32 +TF32 +--precision tf32\n", said), "from a rung to the option"

    monkeypatch.setattr(ladder, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert main([*command[:-3], "fp32", "train"]) == 0
    assert [row["times"] for row in written(tmp_path)["rungs"]] == [fp32["times"], ours["times"]]


def test_other_settings_other_code_or_again_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[StepWork] = []
    monkeypatch.setattr(ladder, "measure", lambda work, **_: measured.append(work) or told(work))
    command = [*TINY, "--out", str(tmp_path), "--rungs", "fp32", "flash"]

    def n_measured(*more: str) -> int:
        measured.clear()
        assert main([*command, *more]) == 0
        return len(measured)

    assert n_measured() == 2
    assert n_measured() == 0
    assert n_measured("--micro-batch", "4") == 2
    assert n_measured() == 0, "what other sizes took is kept"
    assert n_measured("--again") == 2
    monkeypatch.setattr(ladder_record, "digest", lambda *_: "other code")
    assert n_measured() == 2


def test_a_damaged_record_is_reported_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "measure", told)
    command = [*TINY, "--out", str(tmp_path), "--rungs", "fp32"]
    for damage in ("{", '{"rungs": 3}', '{"rungs": [{"work": {}, "machine": {}, "times": {"a": 1}}], "earlier": []}'):
        (tmp_path / "ladder.json").write_text(damage)
        assert main(command) == 0
        assert "every rung is measured again" in capsys.readouterr().err
        assert len(written(tmp_path)["rungs"]) == 1


def test_a_wrong_rung_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(work: StepWork, **_: object) -> StepTimes:
        times = told(work)
        if "plain_attention" not in work.as_lecture:
            times.losses[1] += 0.5
        return times

    monkeypatch.setattr(ladder, "measure", measure)
    assert main([*TINY, "--out", str(tmp_path), "--rungs", "fp32", "flash", "vocab_multiple"]) == 1
    assert "WRONG: the loss at step 2 is 5.40000, expected 4.90000" in capsys.readouterr().out
    assert [bool(row["figures"]) for row in written(tmp_path)["rungs"]] == [True, False, True]


def test_an_interruption_leaves_what_was_measured_and_no_process(tmp_path: Path) -> None:
    """Ctrl-C, for real: the signal goes to the whole group, as a terminal sends it."""
    command = [sys.executable, "-m", "regpt2", "ladder", *TINY, "--out", str(tmp_path), "--rungs", "fp32", "flash"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ladder.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "run the same command again" in said
    assert [row["rung"] for row in written(tmp_path)["rungs"]] == ["fp32"]
    assert (tmp_path / "ladder.md").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "--steps 0 must be at least 1"),
        ("--seq-len", "33", "at most model.block_size = 32"),
        ("--model.dropout", "0.1", "must be 0"),
        ("--model.vocab-multiple", "1", "is a rung"),
        ("--rungs", "flsh", "did you mean 'flash'"),
        ("--device", "tpu", "not on this machine"),
    ],
)
def test_wrong_options_are_refused_before_any_work(option: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        main([*TINY, "--out", str(tmp_path / "out"), option, value])
    assert not (tmp_path / "out").exists()
