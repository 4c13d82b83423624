"""Attention on the page: what it shows for a head is what `explore` computes."""

from typing import Any

import pytest
import torch

from regpt2.exploring.measure import all_attention_weights
from regpt2.model.gpt import CausalSelfAttention
from serving.browser import overflow_px
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running
from serving.writing_page import (
    asked_of,
    set_all,
    wait_until_done,
    write,
    write_page,
)

pytestmark = [pytest.mark.browser, pytest.mark.seconds, pytest.mark.process]


def chosen_head(page: Any) -> dict[int, float]:
    """The tokens that are listed for the chosen head, with their weights."""
    listed = page.eval_on_selector_all(
        ".looked-at li", "all => all.map(one => [Number(one.dataset.at), Number(one.dataset.weight)])"
    )
    return {int(at): weight for at, weight in listed}


def wait_for_map(page: Any) -> None:
    """The map of the chosen head comes with an answer of its own."""
    page.wait_for_selector("canvas.map[data-head]")


def test_enter_on_a_token_shows_the_weights_of_every_head(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        text = write(page, "to be ", max_tokens=20, seed=0)
        page.locator("#first .token").nth(9).focus()
        page.keyboard.press("Enter")
        wait_for_map(page)
        ids = list(text[:16].encode())  # the bytes tokenizer; the prompt has 6
        expected = all_attention_weights(peaked.models[TEXT_MODEL].loaded.model, torch.tensor(ids))[:, :, -1]
        assert page.locator(".head-cell").count() == 4
        page.focus(".head-cell[tabindex='0']")
        for key in ("ArrowUp", "ArrowLeft", "ArrowUp", "ArrowLeft"):  # to the first head
            page.keyboard.press(key)
        for layer, head, key in ((0, 0, ""), (0, 1, "ArrowRight"), (1, 1, "ArrowDown"), (1, 0, "ArrowLeft")):
            page.keyboard.press(key or "Home")
            page.keyboard.press("Enter")
            wait_for_map(page)
            assert page.inner_text(".head-side h3") == f"Layer {layer}, head {head}"
            row, listed = expected[layer, head], chosen_head(page)
            assert listed == {at: pytest.approx(float(row[at]), abs=2e-5) for at in listed}
            assert sorted(listed.values()) == pytest.approx(row.sort().values[-6:].tolist(), abs=2e-5)
        assert page.locator(".shaded span").count() == 16
        assert page.inner_text(".shaded") == text[:16]
        page.keyboard.press("Escape")
        assert not page.is_visible("#attention") and not seen.refused


def test_the_map_has_the_colors_of_the_weights(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        text = write(page, "to be ", max_tokens=6, seed=0)
        page.locator("#first .token").last.focus()
        page.keyboard.press("Enter")
        wait_for_map(page)
        page.click(".head-cell >> nth=0")
        page.wait_for_selector("canvas.map[data-head='0 0']")
        # The map is at the right lower end of the canvas, T cells wide; labels are left of it and above.
        pixels = page.evaluate(
            """T => {
              const canvas = document.querySelector("canvas.map"), cell = 22 * devicePixelRatio;
              const context = canvas.getContext("2d"), from = canvas.width - T * cell;
              const at = (n) => Math.floor(from + (n + 0.5) * cell);
              return Array.from({length: T}, (_, row) => Array.from({length: T}, (_, column) =>
                [...context.getImageData(at(column), at(row), 1, 1).data.slice(0, 3)]));
            }""",
            len(text),
        )
    weights = all_attention_weights(peaked.models[TEXT_MODEL].loaded.model, torch.tensor(list(text.encode())))[0, 0]
    stops = [(0xFD, 0xFC, 0xF9), (0xB4, 0xCC, 0xE4), (0x35, 0x68, 0x9F), (0x0F, 0x2A, 0x49)]  # as explore's pictures
    for row, colors in enumerate(pixels):
        for column, color in enumerate(colors):
            if column > row:
                assert color == [0xEF, 0xEC, 0xE5], "the future is masked"
                continue
            place = float(weights[row, column].sqrt()) * 3
            n = min(int(place), 2)
            expected = [a + (place - n) * (b - a) for a, b in zip(stops[n], stops[n + 1], strict=True)]
            assert color == pytest.approx(expected, abs=2), (row, column)


def test_a_click_on_a_token_looks_from_there_unless_it_is_switched_off(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        text = write(page, "to be ", max_tokens=20, seed=0)
        page.uncheck("#on-click")
        bodies = asked_of(page, "/attention")
        click(page, 4)
        assert page.is_visible("#alternatives") and not page.is_visible("#attention")
        page.check("#on-click")
        click(page, 5)
        wait_for_map(page)
        assert [body["text"] for body in bodies] == [text[:12]] * 2, "for all heads, and for the map of one"
        click(page, 12)
        page.wait_for_selector(f".shaded span:nth-child({6 + 13}).looks")
        page.set_viewport_size({"width": 390, "height": 800})
        assert overflow_px(page) == 0


def click(page: Any, n: int) -> None:
    """At the middle of a token, where the text area is above it."""
    box = page.locator("#first .token").nth(n).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_attention_of_an_answer_follows_its_conversation(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        page.select_option("#model", CHAT_MODEL)
        page.click("#as-talk")
        set_all(page, max_tokens=10, seed=5)
        page.fill("#message", "hello")
        page.press("#message", "Enter")
        wait_until_done(page)
        page.locator("#first .talk .token").first.focus()
        page.keyboard.press("Enter")
        wait_for_map(page)
        assert "<|im_start|>assistant" in page.inner_text(".shaded")


def test_a_model_with_other_attention_is_told_so(
    chromium: Any,
    peaked: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(CausalSelfAttention):
        pass

    with write_page(chromium, peaked) as seen:
        page = seen.page
        write(page, "to be ", max_tokens=5, seed=0)
        for block in peaked.models[TEXT_MODEL].loaded.model.h:
            monkeypatch.setattr(block.get_submodule("attn"), "__class__", Other)
        page.locator("#first .token").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#attention .notice")
        words = page.inner_text("#attention .notice")
        assert words == "This model: attention maps need this package's attention, this model's is a Other."
