"""A page opens in a browser only where there is a display."""

import sys
import webbrowser

import pytest

from regpt2.base.net.browser import open_browser


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_a_browser_is_asked_only_on_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not open_browser("http://127.0.0.1:1/")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert open_browser("http://127.0.0.1:2/")
    assert opened == ["http://127.0.0.1:2/"]
