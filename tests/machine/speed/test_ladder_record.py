"""The ladder's record: it keeps nothing that other code measured."""

from pathlib import Path

import pytest

import regpt2
from regpt2.machine.speed import ladder_record
from regpt2.machine.speed.steps import StepWork


def test_a_record_is_of_the_code_in_every_room_that_a_step_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[str] = []
    monkeypatch.setattr(ladder_record, "digest", lambda *names: rooms.extend(names))
    ladder_record.LadderRecord(tmp_path, StepWork(device="cpu"), again=False)
    assert {"base", "model", "training", "machine/speed"} <= set(rooms)
    assert all((Path(regpt2.__file__).parent / room).is_dir() for room in rooms)
