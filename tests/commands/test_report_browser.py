"""The report in a real browser: it opens from a file, draws in light and dark, fits a phone, needs no network."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from test_report import real_run, val_event, verdict_event

from regpt2.commands.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
PAPER = {"light": (0xFD, 0xFC, 0xF9), "dark": (0x17, 0x18, 0x1A)}


def chromium(folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """One headless look at a page, with a profile of its own; what its console said is in stderr."""
    assert CHROMIUM is not None
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    quiet = ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
    profile = f"--user-data-dir={folder / 'profile'}"
    line = [CHROMIUM, "--headless", *sandbox, *quiet, profile, "--enable-logging=stderr", *flags, page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page itself, or the browser about it, complained of."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(folder: Path, page: Path, theme: str, size: str) -> np.ndarray:
    """The page as bytes of color (height, width, 3)."""
    path = folder / f"{theme}.png"
    chosen = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
    flags = (f"--screenshot={path}", f"--window-size={size}", "--hide-scrollbars", chosen)
    assert console(chromium(folder, page, *flags)) == []
    return (imread(path)[..., :3] * 255).round().astype(int)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return write_report(
        [real_run(folder / name, "fineweb", recipe=f"{name}") for name in ("a", "b")], folder / "a.html"
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with long values in every place where a number or a word may stand."""
    run = real_run(tmp_path_factory.mktemp("browser") / "run", "fineweb", device="x" * 150, recipe="y" * 150)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        long = val_event(61, loss="9" * 300, perplexity="8" * 300)
        file.writelines(json.dumps(event) + "\n" for event in (long, verdict_event(61, text="z" * 300)))
    return write_report(run)


def near(image: np.ndarray, color: str | tuple[int, int, int]) -> int:
    """Pixels of this color."""
    rgb = tuple(bytes.fromhex(color[1:])) if isinstance(color, str) else color
    return int((np.abs(image - np.array(rgb)).max(axis=-1) <= 2).sum())


def test_page_follows_light_and_dark_and_draws_in_the_colors_of_each(alone: Path, tmp_path: Path) -> None:
    css = alone.read_text().split(":root {")
    for theme, rules in zip(("light", "dark"), css[1:3], strict=True):
        image = screenshot(tmp_path, alone, theme, "1000,2400")
        assert near(image, PAPER[theme]) > image.shape[0] * image.shape[1] / 2
        inks = re.findall(r"--(?:train|val): (#\w{6})", rules)
        assert len(inks) == 2
        for ink in inks:
            assert near(image, ink) > 200, f"no curve in {ink}: the page has drawn nothing in it"


LOOK = """<iframe src="{page}" width="{width}" height="900" id="f"></iframe><script>
onload = () => {{ const f = document.getElementById("f"), d = f.contentDocument, w = f.contentWindow;
  document.title = JSON.stringify({{ width: d.documentElement.scrollWidth, drawings: d.querySelectorAll("svg").length,
    outside: [...d.querySelectorAll("svg text")].filter(e => e.checkVisibility() && e.getBoundingClientRect().right >
      e.ownerSVGElement.getBoundingClientRect().right + 0.5).map(e => e.textContent),
    ends: Object.values(Object.groupBy([...d.querySelectorAll(".curves > figure")].map(e => e.getBoundingClientRect()),
      e => e.top)).map(row => d.querySelector(".curves").getBoundingClientRect().right -
      Math.max(...row.map(e => e.right))),
    fetched: w.performance.getEntriesByType("resource").map(e => e.name),
    focusable: [...d.querySelectorAll("a[href], summary, [tabindex]")].every(e => {{ e.focus();
      return d.activeElement === e || !e.checkVisibility(); }}) }}) }}</script>"""


@pytest.mark.parametrize("width", [320, 1000])
@pytest.mark.parametrize("kind", ["alone", "page"])
def test_page_fits_is_reached_by_keyboard_and_fetches_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, width: int
) -> None:
    """A page around it asks the browser; the report's own policy lets nothing of its own run."""
    path, around = request.getfixturevalue(kind), tmp_path / "around.html"
    around.write_text(LOOK.format(page=path.as_uri(), width=width))
    done = chromium(tmp_path, around, "--dump-dom", "--allow-file-access-from-files", "--window-size=1200,1000")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and console(done) == []
    seen = json.loads(html.unescape(title[1]))
    assert seen["width"] <= width, "the page scrolls sideways"
    assert seen["drawings"] == path.read_text().count("<svg") > 4
    assert seen["outside"] == [], "texts that leave their drawing"
    assert max(seen["ends"]) < 1, "a row of charts has a hole at its end"
    assert seen["fetched"] == []
    assert seen["focusable"] is True
