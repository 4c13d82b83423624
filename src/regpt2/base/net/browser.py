"""The browser of the person at this machine. In: a URL; out: whether one was asked to open it."""

import os
import sys
import threading
import webbrowser


def open_browser(url: str) -> bool:
    """Ask for a window with this page; nothing without a display, where a text browser would take over the terminal."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in displays):
        return False
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()  # it may wait for the browser
    return True
