"""The command: help in no time, one message for a problem, the right exit code."""

import io
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import Run
from regpt2 import cli
from regpt2.base.console import say
from regpt2.base.errors import UsageError
from regpt2.base.screen import watched
from regpt2.cli import VERBS, main


def test_help_lists_every_verb_and_answers_at_once(regpt2_process: Run) -> None:
    began_at = time.perf_counter()
    done = regpt2_process("--help")
    elapsed_s = time.perf_counter() - began_at
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert elapsed_s < 2.0  # half a second alone on the machine; here it shares two cores with other tests


def test_neither_a_training_nor_a_sample_imports_a_compiler(tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    """torch._dynamo, or sympy, takes longer to import than a tiny model to train."""
    code = """
import sys
from regpt2.cli import main
from regpt2.run import ending
ending.write_report = lambda run: run  # drawn with matplotlib
recipe, data, run = sys.argv[1:]
for name in ("adamw", "lion", "muon"):
    train = ["train", recipe, "--data", data, "--run", run + name, "--max-steps", "2", "--optim.name", name]
    assert main(train) == 0
assert main(["sample", run + "adamw", "a", "--max-new-tokens", "2"]) == 0
print("imported:", *({"torch._dynamo", "sympy", "matplotlib", "torch.distributed.tensor"} & {*sys.modules}))
"""
    command = [sys.executable, "-c", code, tiny_recipe, tiny_data, tmp_path / "run"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["imported:"], done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(regpt2: Run, verb: str) -> None:
    done = regpt2(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"regpt2 {verb}" in done.stdout


@pytest.mark.parametrize("columns", ["1", "4", "0", "-5", "many", "12", "1000000"])
@pytest.mark.parametrize("arguments", [("sample", "--help"), ("train", "demo", "--help"), ("sample", "M", "--x")])
def test_help_and_errors_are_laid_out_for_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    said = capsys.readouterr()
    assert caught.value.code == (0 if "--help" in arguments else 2)
    assert "Unrecognized" in said.err if "M" in arguments else "usage: regpt2" in said.out


HELPS = [(), *((verb,) for verb in VERBS), ("train", "demo"), ("train", "modern_124m"), ("plan", "demo")]


def help_of(*arguments: str) -> str:
    """What a command's --help prints, as on a screen that has UTF-8."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as screen, suppress(SystemExit):
        main([*arguments, "--help"])
    screen.seek(0)
    return screen.read()


def _broken_early(help_text: str, width: int) -> list[str]:
    """Rows in the boxes whose next row begins with what had room in this one: tyro keeps a docstring's line breaks."""
    early = []
    for box in help_text.split("╭")[1:]:
        rows = [line[2:-2].rstrip() for line in box.splitlines() if line.startswith("│ ")]
        for row, following in pairwise(rows):
            begins = following.startswith(("-", "─")) or re.search(r"^\S.* {2,}\S", following)
            is_alone = row.startswith("-") and not re.search(r"\S {2,}\S", row)  # an option too long for its column
            if row and following and not begins and not is_alone:
                piece = re.split(r"(?<=,)", following.split()[0])[0]
                early += [row] if len(row) + 1 + len(piece) <= width else []
    return early


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_fits_its_width_and_breaks_no_word(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    words = {}
    for columns in (60, 80, 120, 4000):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = help_of(*arguments).splitlines()
        # tyro prints its first line in one piece, and a word may be too long; at 80 columns all others fit.
        assert [line for line in lines[1:] if len(line) > columns and " " in line.strip()] == []
        assert [one for one, two in pairwise(lines) if not (one.strip() or two.strip())] == []
        words[columns] = sorted(re.findall(r"[\w.'/=-]+", "\n".join(lines)))
        if columns == 80:
            assert _broken_early("\n".join(lines), 76) == []
            assert not [line for line in lines if re.search(r"\{None\}|(\S+ ?\|.*){4}\w", line)]
    assert words[60] == words[80] == words[120] == words[4000]  # where nothing has to be broken


def test_help_in_a_pipe_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    unset = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "regpt2", "train", "demo", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=unset, stdin=subprocess.DEVNULL)
    assert done.stdout == help_of("train", "demo")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_help_is_shown_on_a_terminal_of_four_columns_colored_if_wanted(no_color: str) -> None:
    """A real one: `get_terminal_size` asks it where COLUMNS is not set."""
    code = """
import fcntl, os, pty, struct, sys, termios
ours, theirs = pty.openpty()
fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 4, 0, 0))
os.environ.pop("COLUMNS", None)
if os.fork() == 0:
    os.dup2(theirs, 1)
    os.execv(sys.executable, [sys.executable, "-m", "regpt2", "inspect", "--help"])
os.close(theirs)
said = b""
try:
    while piece := os.read(ours, 4096):
        said += piece
except OSError:  # the other end is closed
    pass
print(os.wait()[1], b"Look inside" in said, b"\\x1b[" in said)
"""
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": no_color}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split() == ["0", "True", str(not no_color)], done.stderr


def test_an_unknown_verb_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no verb 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("regpt2 ")


def test_debug_shows_the_traceback(regpt2: Run) -> None:
    assert "Traceback" not in regpt2("sample", "nowhere", "x").stderr
    with pytest.raises(UsageError):
        regpt2("sample", "nowhere", "x", "--debug")


def test_output_that_is_not_utf8_shows_escapes(regpt2_process: Run, tiny_data: Path) -> None:
    done = regpt2_process("inspect", tiny_data, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u2502" in done.stdout  # a line beside the text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full of Linux")
@pytest.mark.parametrize(
    ("redirect", "said"),
    [
        (">/dev/full", "regpt2: standard output: No space left on device"),
        (">&-", "regpt2: standard output is closed; redirect it to a file"),
        ("| true", ""),
    ],
)
@pytest.mark.parametrize("arguments", ["--version", "inspect --help"])  # neither imports torch
def test_what_only_standard_output_shows_fails_with_it(arguments: str, redirect: str, said: str) -> None:
    """Exit code 1 and one message, or none where the reader left; nothing of the interpreter that ends."""
    wait = "sleep 0.2; " if redirect.startswith("|") else ""
    command = f'{{ {wait}"$0" -m regpt2 {arguments}; echo "exit code $?" >&2; }} {redirect}'
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # what a buffer holds at the end is tried once more
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=120, env=buffered
    )
    lines = done.stderr.splitlines()
    assert lines[-1] == "exit code 1"
    assert len(lines) == (2 if said else 1), done.stderr
    assert lines[0].startswith(said or "exit code 1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full of Linux")
@pytest.mark.parametrize(
    ("arguments", "strict", "code"),
    [
        ("sample runs/demo", True, 1),
        ("inspect data", True, 1),
        ("inspect data --json=found.json", False, 0),
        ("evaluate runs/demo", False, 1),  # it works for hours: a disk may have room for the next figures
        ("evaluate runs/demo --out found.json", False, 0),
        ("train demo", False, 0),
        ("prepare text_files", False, 0),
        ("compare a b", False, 0),
        ("train --help", True, 1),
    ],
)
def test_work_is_finished_though_nobody_can_read_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, strict: bool, code: int
) -> None:
    """A verb whose files are its product succeeds; one whose product is the text does not."""
    done = []

    def work(arguments: list[str]) -> int:
        say("first line")
        say("last line")
        done.append(arguments)
        return 0

    monkeypatch.setattr(cli, "_module_of", lambda verb: SimpleNamespace(main=work))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", watched(full, "standard output"))
        assert main(arguments.split()) == code
    assert bool(done) is not strict
    assert capsys.readouterr().err.count("standard output") == (2 if code and not strict else 1)
