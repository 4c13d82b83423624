"""MFU on a CPU: a share of matmuls that the run timed. It is recorded and named, and it changes nothing else."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import losses, run_train, state_of

from rank_processes import place, spawn
from regpt2.base.device import Compute
from regpt2.base.ranks.world import start_world
from regpt2.base.record.metrics import read_events
from regpt2.pages.charts.panels import panels
from regpt2.pages.live.follow import Follower
from regpt2.pages.live.lines import Lines
from regpt2.pages.live.status import status_of
from regpt2.pages.live.view import view_of
from regpt2.pages.record import read_record
from regpt2.pages.report.write import write_report
from regpt2.run import setup

CPU = torch.device("cpu")
LAST = 12  # of the tiny recipe


def run_at(rate: float, *where: Path) -> None:
    """A run on a machine that multiplies at this rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "square_rate", lambda dtype, device: rate)
        run_train(*where)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == kind]


def test_the_share_is_recorded_with_what_it_is_a_share_of_and_shown_everywhere(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_at(1.5e9, tiny_recipe, tiny_data, run)
    (start,) = events(run, "run")
    assert (start["peak_flops"], start["peak_source"]) == (1.5e9, "timed matmuls")
    C, L, T, V = 32, 2, 32, 320  # of the tiny recipe, its vocabulary padded
    flop = 72 * C * C * L + 6 * C * T * L + 6 * C * V
    shares = [event["mfu"] for event in events(run, "train")]
    expected = [event["tokens_per_s"] * flop / 1.5e9 for event in events(run, "train")]
    assert shares == pytest.approx(expected, rel=1e-12) and len(shares) == LAST
    said = capsys.readouterr().out
    assert re.search(rf"tok/s \| matmul share {shares[-1]:.1%} \| 0s left", said)

    record = read_record(run)
    (panel,) = (one for one in panels([record]) if one.name == "mfu")
    assert panel.title == "Share of the machine's matmul rate" and "1.5 GFLOP/s in" in panel.note
    page = write_report(run).read_text()
    assert "% of its matmul rate" in page and "1.5 GFLOP/s in" in page and "(MFU)" not in page
    follower = Follower(run)
    follower.look()
    status = status_of(follower)
    assert status.peak_is_timed and status.mfu == pytest.approx(float(torch.tensor(shares).double().quantile(0.5)))
    assert "matmul share" in str(view_of(record, status, "run", (120, 40)))
    assert any(f"matmul share {status.mfu:.1%}" in line for line in Lines().of(record, status, 0.0))


def test_the_share_of_a_gpu_is_called_mfu_as_before(tmp_path: Path) -> None:
    start = {"event": "run", "step": 0, "precision": "bf16", "peak_flops": 989.4e12, "peak_source": "data sheet"}
    train = {"event": "train", "step": 1, "loss": 3.0, "tokens_per_s": 1e5, "mfu": 0.43, "tokens": 10}
    tmp_path.joinpath("metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(train)}\n")
    record = read_record(tmp_path)
    (panel,) = (one for one in panels([record]) if one.name == "mfu")
    assert panel.title == "Model FLOPs utilization (MFU)" and "989 TFLOP/s in bf16 by the data sheet" in panel.note
    page = write_report(tmp_path).read_text()
    assert "43 % of the peak (MFU)" in page and "matmul rate" not in page
    follower = Follower(tmp_path)
    follower.look()
    assert "MFU 43.0%" in str(view_of(record, status_of(follower), "run", (120, 40)))


def test_timing_matmuls_changes_no_bit_of_a_run(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    """With dropout, which draws from torch's own generator."""
    run_train(tiny_recipe, tiny_data, tmp_path / "timed")
    run_at(1e9, tiny_recipe, tiny_data, tmp_path / "told")
    assert losses(tmp_path / "timed") == losses(tmp_path / "told")
    assert state_of(tmp_path / "timed") == state_of(tmp_path / "told")
    assert events(tmp_path / "timed", "run")[0]["peak_flops"] > 1e6


def on_rank(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= place(rank, size, port)
    setup.square_rate = lambda dtype, device: 1e9 * (1 + 2 * rank)
    with start_world(CPU, timeout_s=60) as world:
        peak = setup.peak_of(world, Compute("fp32"))
    Path(out, f"{rank}.json").write_text(json.dumps(peak and [peak.flops, peak.source]))
    os._exit(0)  # torch's own end of a group may wait forever


@pytest.mark.process
def test_every_rank_is_a_share_of_all_their_matmuls(tmp_path: Path, unused_port: int) -> None:
    spawn(on_rank, args=(2, unused_port, str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[2e9, "timed matmuls"]] * 2, "the mean of 1 and 3: times two ranks it is what both can do"
