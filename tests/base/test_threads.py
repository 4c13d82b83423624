"""How idle threads wait, as OpenMP itself reports it when torch loads it."""

import os
import re
import subprocess
import sys

import pytest

from regpt2.base.threads import SPIN_COUNT, spin_briefly

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_count(*command: str, **environment: str) -> str:
    """What GNU's OpenMP prints at its start in the last process that `command` starts."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**inherited, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("torch's OpenMP is not GNU's here")
    return str(found[-1])


def test_the_command_cuts_spinning_short() -> None:
    assert spin_count("-m", "regpt2", "train", "--help") == SPIN_COUNT


def test_a_process_that_the_command_starts_inherits_it() -> None:
    starts = "import subprocess, sys; from regpt2.cli import main; main(['--version']); "
    starts += "subprocess.run([sys.executable, '-c', 'import torch'])"
    assert spin_count("-c", starts) == SPIN_COUNT


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, value)
    spin_briefly()
    assert {setting: os.environ.get(setting) for setting in SETTINGS} == dict.fromkeys(SETTINGS) | {name: value}
