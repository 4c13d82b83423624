"""How the page looks, and that what a model writes or is called never becomes more than text."""

import re
from itertools import pairwise
from typing import Any

import pytest
from chat_models import write_parrot

from regpt2.pages import PAGE_CSS
from serving.browser import overflow_px
from serving.tiny_server import CHAT_MODEL, Running, server_of
from serving.writing_page import (
    pieces,
    set_all,
    shown,
    wait_until_done,
    write,
    write_page,
)

pytestmark = [pytest.mark.browser, pytest.mark.seconds, pytest.mark.process]

HOSTILE = "</script><img src=x onerror=alert(1)> \u202eevil\u2066 \x00\x1b[31m\r\x7f <b>&amp;"


def theme(name: str) -> tuple[str, str]:
    """The value of a color in light and in dark, from the style sheet of the report."""
    light, dark = re.findall(rf"--{name}: (#[0-9a-f]{{6}})", PAGE_CSS.read_text())
    return light, dark


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def luminance(color: Any) -> float:
    """WCAG 2.2, relative luminance, of sRGB from 0 to 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PAINTED = """kind => {
  const one = document.createElement("span"), canvas = document.createElement("canvas");
  one.className = `token ${kind}`;
  document.querySelector("#first .layer").append(one);
  const style = getComputedStyle(one), context = canvas.getContext("2d");
  const paper = getComputedStyle(document.querySelector("#first .sheet")).backgroundColor;
  return [paper, style.backgroundColor, style.color].map((color, n) => {
    if (n == 2) context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  });
}"""


def test_dark_and_light_have_the_report_s_colors_and_text_can_be_read_on_every_shade(
    chromium: Any,
    peaked: Running,
) -> None:
    pictures, distances = [], {}
    for number, scheme in enumerate(("light", "dark")):
        with write_page(chromium, peaked, scheme=scheme) as seen:  # type: ignore[arg-type]
            page = seen.page
            write(page, "to be ", max_tokens=20, seed=1)
            body = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
            assert body == [rgb(theme("paper")[number]), rgb(theme("text")[number])]
            pictures.append(page.screenshot())
            lights = []
            for step in range(8):
                _, shade, letters = page.evaluate(PAINTED, f"s{step}")
                low, high = sorted((luminance(shade), luminance(letters)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"WCAG AA, {scheme}, step {step}"
                lights.append(luminance(shade))
            distances[scheme] = [abs(a - b) for a, b in pairwise(lights)]
            assert lights == sorted(lights, reverse=scheme == "light"), "each step is further from the paper"
    assert pictures[0] != pictures[1]
    assert all(min(steps) > 0.003 for steps in distances.values()), distances


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways_at_390_pixels(chromium: Any, peaked: Running, scheme: Any) -> None:
    with write_page(chromium, peaked, scheme=scheme, width=390, height=800) as seen:
        page = seen.page
        assert overflow_px(page) == 0
        page.click("#settings summary")
        page.click("#commands summary")
        page.select_option("#other", CHAT_MODEL)
        write(page, "a" * 100 + " to be ", max_tokens=50, seed=1)
        assert overflow_px(page) == 0
        page.locator("#first .token").nth(30).focus()
        assert page.is_visible("#alternatives") and overflow_px(page) == 0
        page.keyboard.press("Enter")
        page.wait_for_selector("canvas.map[data-head]")
        assert overflow_px(page) == 0
        box = page.locator("canvas.map").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_letters_are_where_the_text_area_has_them(chromium: Any, peaked: Running, width: int) -> None:
    """The text area takes clicks and the sheet below draws the letters: both must break lines at the same places."""
    with write_page(chromium, peaked, width=width) as seen:
        page = seen.page
        text = "AVAToTe fi ffl  two   spaces \t tab\n\n" + "word " * 60 + "long" * 60 + "\nnaïve 東京 🙂 \n" + HOSTILE
        write(page, text, max_tokens=60, seed=1)
        heights = page.evaluate(
            """() => {
              const area = document.querySelector("#text"), layer = document.querySelector("#first .layer");
              area.style.setProperty("height", "0"); area.style.setProperty("min-height", "0");
              const needed = area.scrollHeight;
              layer.style.setProperty("min-height", "0");
              return [needed, layer.getBoundingClientRect().height];
            }"""
        )
        assert abs(heights[0] - heights[1]) <= 1 and heights[0] > 300


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose name and whose answer are markup."""
    folder = tmp_path_factory.mktemp("hostile") / '<img src=x onerror=alert(2)>"'
    folder.mkdir()
    write_parrot(folder, ("hi", HOSTILE), block_size=256)
    with server_of(folder) as running:
        yield running


def test_what_a_model_writes_is_never_markup(chromium: Any, hostile: Running) -> None:
    with write_page(chromium, hostile) as seen:
        page = seen.page
        page.click("#as-talk")
        set_all(page, max_tokens=100, temperature=0)
        page.fill("#message", "hi")
        page.press("#message", "Enter")
        wait_until_done(page)
        assert page.locator(".talk .assistant .layer").evaluate("one => one.textContent") == shown(HOSTILE)
        page.locator(".talk .token").nth(5).focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("canvas.map[data-head]")
        page.click("#as-text")
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        page.fill("#text", prompt + HOSTILE.replace("\r", ""))  # a text area has no carriage return
        page.click("#commands summary")
        page.wait_for_selector("#sample:not(:empty)")
        assert "onerror" in page.inner_text("#curl") and "onerror" in page.inner_text("#sample")
        assert pieces(page)[0][1] == shown(page.input_value("#text")) and "\u2426evil\u2426" in pieces(page)[0][1]
        tags = page.evaluate("[...new Set([...document.querySelectorAll('body *')].map(one => one.tagName))]")
        assert not {"IMG", "SCRIPT", "B"} & (set(tags) - {"B"}), tags
        assert page.locator("b").all_inner_texts() == ["curl", "regpt2 sample"]
        assert page.inner_text("#first .pane-name").startswith('<img src=x onerror=alert(2)>"')


def test_everything_has_a_name_and_the_text_is_not_announced_token_by_token(
    chromium: Any,
    peaked: Running,
) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        page.evaluate(
            """() => {
              window.said = [];
              new MutationObserver(() => said.push(document.querySelector("#said").textContent))
                .observe(document.querySelector("#said"), {childList: true, characterData: true, subtree: true});
            }"""
        )
        write(page, "to be ", max_tokens=40, seed=1)
        assert page.evaluate("said") == ["Writing.", "Wrote 40 tokens."]
        live = page.eval_on_selector_all("[aria-live], [role=status], [role=alert]", "all => all.map(one => one.id)")
        assert set(live) == {"said", ""} and page.locator(".layer [role=status], .layer[aria-live]").count() == 0
        nameless = page.evaluate(
            """[...document.querySelectorAll("input, select, textarea, button:not(.token)")].filter((one) =>
              !one.hidden && !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
              .map(one => one.outerHTML)"""
        )
        assert nameless == []
