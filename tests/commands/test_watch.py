"""`regpt2 watch`: one view, plain lines where there is no terminal, and a real run watched to its end."""

import threading
from pathlib import Path

import pytest
from growing import append, events_until, loss_at

from conftest import Run
from regpt2.pages.live import watching


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, of which none trains."""
    end = {"event": "end", "step": 50, "reason": "stopped by signal 15", "elapsed_s": 5.0}
    append(tmp_path / "runs" / "demo", [*events_until(50), end])
    append(tmp_path / "runs" / "compare" / "adamw" / "seed-1", events_until(20))
    return tmp_path / "runs"


def test_once_prints_one_view(regpt2: Run, runs: Path) -> None:
    done = regpt2("watch", runs / "demo", "--once", COLUMNS="90")
    assert done.returncode == 0 and not done.stderr
    assert "step 50/100, 50 %" in done.stdout and "Loss, nats per token" in done.stdout
    assert "stopped by signal 15" in done.stdout


def test_a_folder_of_runs_gives_a_table(regpt2: Run, runs: Path) -> None:
    for arguments in ([runs], [runs, "--once"], []):  # by default ./runs
        done = regpt2("watch", *arguments, COLUMNS="120")
        assert done.returncode == 0
        rows = [line.split()[0] for line in done.stdout.splitlines()]
        assert rows == ["Run", "compare/adamw/seed-1", "demo"]


def test_a_run_that_has_ended_is_a_few_plain_lines_in_a_pipe(regpt2: Run, runs: Path) -> None:
    done = regpt2("watch", runs / "demo")
    assert done.returncode == 0
    assert [line.split(" |")[0] for line in done.stdout.splitlines()] == [
        "demo: stopped",
        "step 50/100",
        f"stopped by signal 15 at step 50/100 after 5s; best validation loss {loss_at(50) + 0.1:.4f} at step 50",
    ]


def test_what_is_no_run_is_refused_with_the_nearest_name(regpt2: Run, runs: Path) -> None:
    done = regpt2("watch", runs / "demmo", "--once")
    assert (done.returncode, done.stdout) == (2, "") and "did you mean 'demo'?" in done.stderr
    (runs / "data").mkdir()
    (runs / "data" / "x.bin").write_bytes(b"x")
    done = regpt2("watch", runs / "data")
    assert done.returncode == 2 and "holds no run" in done.stderr
    done = regpt2("watch", runs / "demo" / "metrics.jsonl")
    assert done.returncode == 2 and "is a file" in done.stderr


def test_ctrl_c_ends_the_view_and_is_no_failure(regpt2: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regpt2.pages.live.watching.time.sleep", interrupted)
    done = regpt2("watch", runs / "not_begun")
    assert done.returncode == 0
    assert "waiting for its run to begin" in done.stdout and "The run itself continues" in done.stdout


@pytest.mark.seconds
def test_a_run_is_watched_from_before_it_begins_to_its_end(
    regpt2: Run, tiny_data: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    said: list[str] = []
    monkeypatch.setattr(watching, "say", said.append)
    seen = threading.Thread(target=watching.watch, args=(tmp_path / "live",), kwargs={"once": False})
    seen.start()
    done = regpt2("train", tiny_recipe, "--data", tiny_data, "--run", tmp_path / "live", "--log-every", "1")
    seen.join(timeout=20)
    assert done.returncode == 0 and not seen.is_alive()
    assert "waiting for its run to begin" in said[0]
    assert any(line.startswith("step 12 | val_loss: loss ") for line in said)
    assert any("| sample: a" in line for line in said)
    assert said[-1].startswith("finished at step 12/12 after ")
