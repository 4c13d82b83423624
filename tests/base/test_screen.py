"""Standard output and error fail in every way that there is; the work goes on, and what was lost is known."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regpt2.base import screen
from regpt2.base.console import ProgressLine, say, warn
from regpt2.base.errors import Problem
from regpt2.base.record.metrics import MetricsLog, read_events

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full and /proc of Linux")


class Output:
    """Standard output is watched and goes into a pipe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.writing = os.pipe()
        raw: Any = screen.WatchedStream(io.FileIO(self.writing, "w", closefd=False), "standard output")
        self.watch: screen.WatchedStream = raw
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))

    def leave(self) -> None:
        """The reader goes."""
        os.close(self.reading)


def test_what_is_written_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(monkeypatch)
    say("Größe")
    assert os.read(output.reading, 100) == "Größe\n".encode()
    assert screen.lost_streams() == []
    screen.require_output()


def test_a_reader_that_leaves_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(monkeypatch)
    output.leave()
    for n in range(3):
        say(f"line {n}")
    assert [(lost.filename, lost.errno) for lost in screen.lost_streams()] == [("standard output", errno.EPIPE)]
    os.write(output.watch.fileno(), b"C code is not hit by it either")
    assert os.readlink(f"/proc/self/fd/{output.watch.fileno()}") == os.devnull
    with pytest.raises(BrokenPipeError, match="standard output"):
        screen.require_output()


def test_what_a_full_disk_refused_is_lost_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", screen.watched(stream, "standard output"))
        for n in range(10_000):  # more than any buffer holds
            say(f"lost {n}")
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/full"
        with open(log, "wb") as room:  # somebody makes room
            os.dup2(room.fileno(), stream.fileno())
        say("shown")
    assert log.read_text() == "shown\n"
    assert [lost.errno for lost in screen.lost_streams()] == [errno.ENOSPC]


def test_the_loss_is_said_once_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Output(monkeypatch).leave()
    say("one")
    say("two")
    told = capsys.readouterr().err
    assert told == "warning: standard output cannot be written (Broken pipe); the work continues.\n"


def test_strict_output_raises_and_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(monkeypatch)
    output.watch.strict = True
    output.leave()
    with pytest.raises(BrokenPipeError) as caught:
        say("line")
    assert caught.value.filename == "standard output"
    output.watch.strict = False
    sys.stdout.flush()  # as the interpreter does when it ends


def test_the_record_notes_each_lost_stream_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(monkeypatch)
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", screen.watched(stream, "standard error"))
        output.leave()
        say("a line")
        log.log("run", 0)
        for step in (1, 2, 3):
            say("a line")
            warn("a warning")
            log.log("train", step, loss=1.0)
        log.log("end", 3)
    told = [(event["event"], event["step"], event.get("text", "")) for event in read_events(path)]
    notes = [row for row in told if row[0] == "note"]
    assert [row[1] for row in notes] == [1, 1]
    assert sorted(row[2] for row in notes) == [
        "standard error cannot be written (No space left on device); the run continues",
        "standard output cannot be written (Broken pipe); the run continues",
    ]
    assert told[-1][0] == "end"


def test_the_bar_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = os.openpty()
    with open(ours, "w") as stream:
        monkeypatch.setattr(sys, "stdout", screen.watched(stream, "standard output"))
        with ProgressLine("reading", 100, "MB") as line:
            assert line._bar is not None
            line.advance(10)
            line._bar.refresh()
            os.close(terminal)
            line.advance(80)
            line._bar.refresh()
        say("done")
        assert line.done == 90
        assert [lost.errno for lost in screen.lost_streams()] == [errno.EIO]


def test_the_bar_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich ends the process at a broken pipe, if it sees one."""
    output = Output(monkeypatch)
    monkeypatch.setattr(output.watch, "isatty", lambda: True)
    output.leave()
    with ProgressLine("reading", 100, "MB") as line:
        line.advance(100)
    assert line._bar is not None


def test_without_a_buffer_nothing_waits_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -u`, usual in containers."""
    reading, writing = os.pipe()
    plain = io.TextIOWrapper(io.FileIO(writing, "w", closefd=False), write_through=True)  # type: ignore[type-var]
    stream = screen.watched(plain, "standard output")
    stream.write("at once")
    assert os.read(reading, 100) == b"at once"
    os.close(reading)
    stream.write("lost")
    monkeypatch.setattr(sys, "stdout", stream)
    assert len(screen.lost_streams()) == 1


CLOSED = """
import os, sys
from regpt2.base import screen
screen.open_closed_streams()
screen.watch_streams()
first = open(sys.argv[1], "wb")
os.write(1, b"a library prints")
os.write(2, b"a library complains")
print("this is lost")
sys.stderr.write("so is this")
input_ended = sys.stdin.read() == ""
child = os.system("echo from a child && echo complaint >&2")
told = [reason.filename for reason in screen.lost_streams()]
first.write(repr((first.fileno() > 2, input_ended, child, told)).encode())
"""


def test_nothing_that_is_printed_gets_into_a_file_when_the_streams_are_closed(tmp_path: Path) -> None:
    """Without care the first file would be number 0, the next number 1, and what is printed would be written there."""
    script, path = tmp_path / "closed.py", tmp_path / "file"
    script.write_text(CLOSED)
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, str(script), str(path)])
    assert done.returncode == 0
    assert path.read_text() == "(True, True, 0, ['standard output', 'standard error'])"


def test_output_that_was_closed_is_asked_for_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = screen._null("stdout")
    monkeypatch.setattr(sys, "stdout", stream)
    say("lost")
    with pytest.raises(Problem, match="standard output is closed; redirect it to a file, or to /dev/null"):
        screen.require_output()
    stream.buffer.raw._raw.close()  # type: ignore[attr-defined]


def test_the_stream_of_a_caller_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = io.StringIO()
    monkeypatch.setattr(sys, "stdout", theirs)
    screen.watch_streams(strict=True)
    assert sys.stdout is theirs
