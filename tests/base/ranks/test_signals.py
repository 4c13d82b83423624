"""Every signal that asks to leave is heard, once; one that is ignored from the start stays ignored."""

import os
import signal
import sys

import pytest

from regpt2.base.ranks.signals import STOP_SIGNALS, StopSignals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_is_remembered_and_the_handler_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_a_closed_terminal_asks_to_leave() -> None:
    assert signal.SIGHUP in STOP_SIGNALS


def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_second_ctrl_c_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what the terminal has sent already
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "warning: SIGHUP: stopping after this update; Ctrl-C stops at once.\n"


def test_a_signal_in_the_middle_of_a_line_of_standard_error_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """The buffer below standard error cannot be entered twice; the handler writes past it."""

    class Interrupted:
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the handler used standard error")

    with pytest.MonkeyPatch.context() as patch, StopSignals() as stop:
        patch.setattr(sys, "stderr", Interrupted())
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert "SIGTERM: stopping" in capfd.readouterr().err
