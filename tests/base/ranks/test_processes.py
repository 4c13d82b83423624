"""Commands in processes of their own: as many at once as there are places, none left behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regpt2.base.errors import UsageError
from regpt2.base.ranks import processes
from regpt2.base.ranks.processes import Command, places, run_commands


def test_places_share_the_threads_or_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(1, cpu) == places(1, cuda) == [{}]
    assert places(3, cpu) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(4, cuda)] == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(2, cuda)] == ["5", "7"]
    with pytest.raises(UsageError, match="--parallel 3 needs a GPU for each, and there are 2"):
        places(3, cuda)


@pytest.mark.process
def test_every_command_ends_with_its_code_and_its_words(tmp_path: Path) -> None:
    commands = [Command([word], tmp_path / word / "log") for word in ("--version", "nonesuch", "--help")]
    assert dict(run_commands(commands, [{}, {}])) == {0: 0, 1: 2, 2: 0}
    assert "there is no verb 'nonesuch'" in (tmp_path / "nonesuch/log").read_text()
    assert list(run_commands([], [{}])) == []


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let the commands be real processes of another kind: shells with a script."""
    if sys.platform == "win32":
        pytest.skip("no /bin/sh")
    monkeypatch.chdir(tmp_path)
    popen = subprocess.Popen

    def set_script(text: str) -> None:
        monkeypatch.setattr(processes.subprocess, "Popen", lambda _, **more: popen(["/bin/sh", "-c", text], **more))

    return set_script


def test_no_more_run_at_once_than_there_are_places_and_each_has_its_own(
    tmp_path: Path, script: Callable[[str], None]
) -> None:
    script('echo "+ $PLACE" >> notes; sleep 0.3; echo "- $PLACE" >> notes')
    commands = [Command([], tmp_path / "log")] * 5
    assert sorted(run_commands(commands, [{"PLACE": "a"}, {"PLACE": "b"}])) == [(which, 0) for which in range(5)]
    busy: set[str] = set()
    for line in (tmp_path / "notes").read_text().splitlines():
        sign, place = line.split()
        assert (place in busy) == (sign == "-"), "one at a time at each place"
        busy ^= {place}
    assert not busy


def test_a_caller_that_stops_asks_them_to_leave_and_waits(tmp_path: Path, script: Callable[[str], None]) -> None:
    script("trap 'sleep 0.2; echo left >> notes; exit' TERM; echo >> begun; while true; do sleep 0.05; done")

    def interrupted() -> None:
        if (tmp_path / "begun").exists() and (tmp_path / "begun").read_text() == "\n\n":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_commands([Command([], tmp_path / "log")] * 3, [{}, {}], on_wait=interrupted))
    assert (tmp_path / "notes").read_text() == "left\n" * 2
