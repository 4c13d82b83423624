"""What a model says never drives the terminal; numbers and times read as a person reads them."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt2.base.console import ProgressLine, count, duration, figure, safe_text


@given(st.text())
def test_safe_text_has_no_control_characters(text: str) -> None:
    shown = safe_text(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(127 <= ord(c) < 160 for c in shown)
    assert not any(0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069 for c in shown)


def test_safe_text_keeps_what_is_harmless() -> None:
    assert safe_text("Größe\t你好 👋\n") == "Größe\t你好 👋\n"
    assert safe_text("\x1b]52;c;aGk=\x07") == "\\x1b]52;c;aGk=\\x07"


def test_numbers_and_times() -> None:
    assert [count(n) for n in (7, 950, 12_345, 4.56e6, 1e10)] == ["7", "950", "12.3k", "4.56M", "10B"]
    assert [count(n) for n in (999.7, 999_999, 3.2e12, float("inf"))] == ["1k", "1M", "3.2T", "inf"]
    assert [figure(n) for n in (3.14159, 1234.4, 37_890, 9999.7)] == ["3.142", "1,234", "37.9k", "10k"]
    assert figure(0.00001) == "1e-05"
    assert [duration(s) for s in (5, 65, 3700, 200_000)] == ["5s", "1m05s", "1h01m", "2d07h"]


def test_progress_in_a_log_says_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("reading", 100, "MB", every_s=0.0) as progress:
        progress.advance(25)
        progress.advance(75)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("reading: 25 of 100 MB, ")
    assert "left" in lines[0]
    assert lines[1].endswith("MB/s, 0s left")


def test_before_anything_is_done_no_time_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("reading", 10, "MB", every_s=0.0) as line:
        line.advance(0)
    assert capsys.readouterr().out == "reading: 0 of 10 MB\n"


@pytest.mark.parametrize("total", [0.0, 0.4])
def test_progress_of_nothing_or_of_a_part_of_a_unit_is_no_zero_of_zero(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: float
) -> None:
    for on_a_screen in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on_a_screen=on_a_screen: on_a_screen, raising=False)
        with ProgressLine("reading", total, "MB", every_s=0.0) as line:
            line.advance(total / 2)
            line.advance(total / 2)
        shown = capsys.readouterr().out
        assert "reading" in shown
        assert not re.search(r"\b0 ?(/|of) ?0\b", shown), shown
        assert ("0.2 of 0.4" in shown or "0.4 of 0.4" in shown) is (total > 0)
