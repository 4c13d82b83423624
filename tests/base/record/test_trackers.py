"""TensorBoard and Weights & Biases get what the record gets, go on after a resume, and never cost a run."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from regpt2.base.errors import ConfigError
from regpt2.base.record.metrics import MetricsLog, read_events
from regpt2.base.record.trackers import TensorBoard, WandB, open_sinks, scalars, texts
from warm_processes import run_python

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="an extra")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="an extra")


def stretch(log: MetricsLog, first: int, last: int, *, loss: float, end: bool) -> None:
    """One start of a run: what `train` records from one step to another."""
    log.cut_back(first)
    log.log("run", first, recipe="tiny", config={"seed": 1})
    for step in range(first + 1, last + 1):
        log.log("train", step, loss=loss + step, grad_norm=0.5, mfu=None, skipped=False, data="ab12")
    log.log("eval", last, eval="val_loss", loss=loss, perplexity=float("nan"), tokens=512)
    log.log("sample", last, prompt="a", texts=["a <b>\x1b[2J"])
    log.log("note", last, text="a note")
    if end:
        log.log("end", last, reason="finished")


def accumulated(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


@needs_tensorboard
def test_tensorboard_reads_every_number_of_a_run_and_its_resume(tmp_path: Path) -> None:
    (killed,) = open_sinks(["tensorboard"], tmp_path)
    stretch(MetricsLog(tmp_path / "metrics.jsonl", [killed]), 0, 8, loss=100.0, end=False)
    killed.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", open_sinks(["tensorboard"], tmp_path))
    stretch(log, 4, 10, loss=200.0, end=True)
    found = accumulated(tmp_path)
    recorded = [event for event in read_events(tmp_path / "metrics.jsonl") if event["event"] == "train"]
    shown = [(scalar.step, scalar.value) for scalar in found.Scalars("train/loss")]
    assert shown == [(event["step"], event["loss"]) for event in recorded]
    assert [value for _, value in shown] == [*(100.0 + s for s in range(1, 5)), *(200.0 + s for s in range(5, 11))]
    assert [scalar.step for scalar in found.Scalars("val_loss/loss")] == [10]
    sample = found.Tensors("sample/0/text_summary")[-1]
    assert (sample.step, sample.tensor_proto.string_val) == (10, [rb"a <b>\x1b[2J"])


@needs_tensorboard
def test_training_with_tensorboard_records_the_same_curve_twice(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The real loop in a process of its own, with the sink handed to its record."""
    program = (
        "import sys; from pathlib import Path\n"
        "from regpt2.base.record.metrics import MetricsLog; from regpt2.base.record.trackers import open_sinks\n"
        "from regpt2.run import setup\n"
        "def tracked(path, *rest): return MetricsLog(path, open_sinks(['tensorboard'], path.parent))\n"
        "setup.MetricsLog = tracked\n"
        "from regpt2.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    run = tmp_path / "run"
    arguments = ["train", str(tiny_recipe), "--data", str(tiny_data), "--run", str(run)]
    done = run_python("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    losses = {e["step"]: e["loss"] for e in read_events(run / "metrics.jsonl") if e["event"] == "train"}
    shown = {scalar.step: scalar.value for scalar in accumulated(run).Scalars("train/loss")}
    assert shown == pytest.approx(losses, rel=1e-6) and len(shown) == 12  # event files hold fp32


WANDB = """
import sys; from pathlib import Path
from regpt2.base.record.metrics import MetricsLog
from regpt2.base.record.trackers import open_sinks
run, first, last, loss = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
log = MetricsLog(run / "metrics.jsonl", open_sinks(["wandb"], run))
log.log("run", first, recipe="tiny", config={"seed": 1})
for step in range(first + 1, last + 1):
    log.log("train", step, loss=loss + step, skipped=False)
log.log("sample", last, prompt="a", texts=["some text"])
log.log("end", last, reason="finished")
"""


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log of blocks of 32 kB; each piece has a checksum, a length and a kind."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@needs_wandb
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_every_number_offline_and_goes_on_under_one_id(tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    for first, last, loss in ((0, 4, 100), (2, 6, 200)):
        line = [sys.executable, "-c", WANDB, str(tmp_path), str(first), str(last), str(loss)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)
        assert done.returncode == 0 and "no longer receives" not in done.stderr, done.stderr
    rows, ids = [], set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert ids == {(tmp_path / "wandb.id").read_text().strip()}
    shown = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert shown == [*((s, 100 + s) for s in range(1, 5)), *((s, 200 + s) for s in range(3, 7))]
    assert [row["sample/0"] for row in rows if "sample/0" in row] == ["some text", "some text"]


def test_a_start_afresh_takes_nothing_over_from_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for both packages: what is asked of them at a start, a start afresh, and a resume."""
    purged: list[int] = []
    ids: list[str] = []

    def writer(folder: str, *, purge_step: int, flush_secs: int) -> MagicMock:
        purged.append(purge_step)
        return MagicMock()

    def init(*, id: str, **_: object) -> MagicMock:
        ids.append(id)
        return MagicMock()

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock(SummaryWriter=writer))
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=init))
    for first in (0, 0, 8):
        for sink in (TensorBoard(tmp_path), WandB(tmp_path)):
            sink.write({"event": "run", "step": first})
            sink.close()
    assert purged == [0, 0, 9], "the evaluation before the first update is of the run before, but for a resume"
    assert ids[0] != ids[1] == ids[2]


class Broken:
    """A sink that takes one event."""

    taken = 0

    def write(self, event: dict[str, Any]) -> None:
        self.taken += 1
        if self.taken > 1:
            raise ConnectionError("no network")

    def close(self) -> None: ...


def test_a_sink_that_fails_is_said_once_and_the_record_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken()
    log = MetricsLog(tmp_path / "m", [broken])
    for step in range(4):
        log.log("train", step, loss=1.0)
    assert len(list(read_events(tmp_path / "m"))) == 4
    assert broken.taken == 2
    assert capsys.readouterr().err.count("Broken no longer receives the record (ConnectionError: no network)") == 1


def test_an_unknown_or_missing_sink_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no tracker 'tensorbord'; did you mean 'tensorboard'"):
        open_sinks(["tensorbord"], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'regpt2\[wandb\]'"):
        open_sinks(["wandb"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_are_grouped_and_words_made_safe() -> None:
    event = {"event": "eval", "step": 3, "eval": "hellaswag", "acc": 0.25, "protocol": "sum", "count": 4}
    assert scalars(event) == {"hellaswag/acc": 0.25, "hellaswag/count": 4.0}
    assert scalars({"event": "run", "step": 0, "seed": 1}) == {}
    assert texts({"event": "note", "step": 1, "text": "a\x1b"}) == {"note": r"a\x1b"}
    assert texts({"event": "train", "step": 1, "loss": 1.0}) == {}
