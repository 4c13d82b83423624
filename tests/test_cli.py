"""The command: help in no time, one message for a problem, the right exit code."""

import time
from pathlib import Path

import pytest

from conftest import Run
from regpt2.cli import VERBS, main


def test_help_lists_every_verb_and_answers_at_once(regpt2: Run) -> None:
    began_at = time.perf_counter()
    done = regpt2("--help")
    elapsed_s = time.perf_counter() - began_at
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert elapsed_s < 2.0  # half a second alone on the machine; here it shares two cores with other tests


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(regpt2: Run, verb: str) -> None:
    done = regpt2(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"regpt2 {verb}" in done.stdout


def test_an_unknown_verb_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no verb 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("regpt2 ")


def test_debug_shows_the_traceback(regpt2: Run) -> None:
    assert "Traceback" not in regpt2("sample", "nowhere", "x").stderr
    assert "Traceback" in regpt2("sample", "nowhere", "x", "--debug").stderr


def test_output_that_is_not_utf8_shows_escapes(regpt2: Run, tiny_data: Path) -> None:
    done = regpt2("inspect", tiny_data, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u2502" in done.stdout  # a line beside the text
