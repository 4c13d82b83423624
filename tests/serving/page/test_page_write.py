"""The page to write with, in a real Chromium before the real server: its text is the API's, and can be changed."""

import json
import math
import re
from typing import Any

import pytest

from serving.browser import Opened, opened
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running
from serving.writing_page import (
    asked_of,
    pieces,
    set_all,
    shown,
    until,
    wait_until_done,
    write,
    write_page,
)

pytestmark = [pytest.mark.browser, pytest.mark.seconds, pytest.mark.process]

SETTINGS: dict[str, Any] = {"max_tokens": 30, "temperature": 0.8, "seed": 7}
BOUNDS = (0.8, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001)  # of the probabilities of the shades


def by_api(server: Running, prompt: str, model: str = TEXT_MODEL, **told: Any) -> Any:
    """What the official client gets."""
    with server.client() as client:
        return client.completions.create(model=model, prompt=prompt, **{**SETTINGS, **told}).choices[0]


@pytest.mark.parametrize("model", ["mostly sure", "of broken characters"])
def test_the_text_is_that_of_the_api_and_each_token_has_its_probability_as_shade(
    chromium: Any, peaked: Running, server: Running, model: str
) -> None:
    served = peaked if model == "mostly sure" else server
    with write_page(chromium, served) as seen:
        text = write(seen.page, "to be ", **{**SETTINGS, "seed": 1})
        mine, *tokens = pieces(seen.page)
        facts = seen.page.inner_text("#first .facts")
        said = seen.page.inner_text("#said")
    expected = by_api(served, "to be ", logprobs=10, seed=1)
    kept = expected.logprobs
    assert text == shown("to be " + expected.text)
    assert mine == ("mine", "to be ")
    logprobs = dict.fromkeys(kept.text_offset, 0.0)  # tokens within a character begin where it begins
    for offset, logprob in zip(kept.text_offset, kept.token_logprobs, strict=True):
        logprobs[offset] += logprob
    ends = [*sorted(logprobs)[1:], len(expected.text)]
    assert tokens == [
        (f"token s{sum(math.exp(logprob) < bound for bound in BOUNDS)}", shown(expected.text[at:end]))
        for (at, logprob), end in zip(sorted(logprobs.items()), ends, strict=True)
        if at < end
    ]
    assert len({kind for kind, _ in tokens}) >= (6 if served is peaked else 1)
    assert any(token.startswith("bytes:") for token in kept.tokens) == (served is server)
    assert "30 tokens" in facts and "seed 1" in facts
    assert said == "Wrote 30 tokens." and not seen.refused


def test_what_the_page_shows_as_pictures_is_sent_on_as_it_was(chromium: Any, server: Running) -> None:
    """Control characters are shown by their pictures; the text that is written on has the characters."""
    told: dict[str, Any] = {**SETTINGS, "seed": 4}
    raw = "to be " + by_api(server, "to be ", **told).text
    assert shown(raw) != raw
    with write_page(chromium, server) as seen:
        write(seen.page, "to be ", **told)
        seen.page.press("#text", "Control+End")
        seen.page.keyboard.type("!")
        bodies = asked_of(seen.page, "/v1/completions")
        write(seen.page)
        assert bodies[0]["prompt"] == raw + "!"


def test_escape_stops_the_server_within_a_token_and_the_text_stays(
    chromium: Any,
    peaked: Running,
    slow_steps: None,
) -> None:
    engine = peaked.models[TEXT_MODEL].engine
    with write_page(chromium, peaked) as seen:
        set_all(seen.page, max_tokens=200, seed=1)
        before = engine.load().tokens
        seen.page.fill("#text", "a")
        seen.page.press("#text", "Control+Enter")
        until(lambda: seen.page.locator("#first .token").count() >= 5, seen.page)
        at_stop = engine.load().tokens
        seen.page.keyboard.press("Escape")
        until(lambda: engine.load().active == 0)
        drawn = engine.load().tokens - before
        wait_until_done(seen.page)
        assert drawn - (at_stop - before) <= 4  # 200 ms: the key, the way to the server, the step that was running
        assert "stopped" in seen.page.inner_text("#first .facts")
        assert len(seen.page.input_value("#text")) >= 5
        assert seen.page.is_enabled("#write") and not seen.page.is_visible("#first .notice")


def test_undo_takes_the_model_s_text_back_and_again_writes_another(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        first = write(page, "abc", max_tokens=20, temperature=1)
        page.click("#again")
        wait_until_done(page)
        second = page.input_value("#text")
        assert second != first and second.startswith("abc")
        page.click("#undo")
        assert page.input_value("#text") == "abc"
        page.press("#text", "Control+Shift+z")
        assert page.input_value("#text") == second
        page.press("#text", "Control+z")
        assert page.input_value("#text") == "abc" and page.is_disabled("#undo")


def test_a_text_can_be_changed_anywhere_and_written_on(chromium: Any, peaked: Running) -> None:
    """What follows a change keeps its color but no longer has probabilities: they were of another text."""
    with write_page(chromium, peaked) as seen:
        page = seen.page
        text = write(page, "to be ", **SETTINGS)
        page.evaluate("document.querySelector('#text').setSelectionRange(12, 14)")
        page.keyboard.type("XYZ")
        changed = text[:12] + "XYZ" + text[14:]
        assert page.input_value("#text") == changed
        found = pieces(page)
        assert "".join(piece for _, piece in found) == changed
        kinds = [kind.split()[0] for kind, _ in found]
        assert kinds == ["mine", *["token"] * 6, "mine", "stale"] and found[7] == ("mine", "XYZ")
        assert page.evaluate("document.querySelector('#text').selectionStart") == 15
        bodies = asked_of(page, "/v1/completions")
        longer = write(page)
        assert shown(bodies[0]["prompt"]) == changed and longer.startswith(changed)
        assert len(longer) > len(changed)


def test_settings_are_kept_and_a_wrong_one_is_answered_in_the_server_s_words(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        write(page, "a", max_tokens=5, temperature="hot", stop="\\n\\n\nEND")
        notice = page.inner_text("#first .notice")
        assert notice == "temperature is 'hot'; expected a number of at least 0."
        assert seen.refused == ["400 /v1/completions"]
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.input_value("#temperature") == "hot" and page.input_value("#text") == "a"
        page.click("#reset")
        bodies = asked_of(page, "/v1/completions")
        write(page, stop="\\n\\n\nEND", top_k=3)
        told = {name: bodies[0].get(name) for name in ("temperature", "top_k", "top_p", "stop", "max_tokens")}
        assert told == {"temperature": 0.8, "top_k": 3, "top_p": None, "stop": ["\n\n", "END"], "max_tokens": 128}


def test_the_command_shown_writes_the_same_text_again(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        text = write(page, "it's\n", max_tokens=20, top_p=0.9)
        page.click("#commands summary")
        page.wait_for_selector("#sample:not(:empty)")
        curl, sample = page.inner_text("#curl"), page.inner_text("#sample")
    assert curl.startswith(f"curl {peaked.url}/v1/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '")
    body = json.loads(curl.split("-d '")[1][:-1].replace("'\\''", "'"))
    with peaked.client() as client:
        assert text == shown("it's\n" + client.completions.create(**body).choices[0].text)
    assert sample.startswith("regpt2 sample runs/tiny 'it'\\''s\n'") and f"--seed {body['seed']}" in sample
    assert "--top-k 0" in sample and "--max-new-tokens 20" in sample and "--top-p 0.9" in sample


def test_two_tabs_write_at_once(chromium: Any, peaked: Running) -> None:
    with opened(chromium, f"{peaked.url}/") as one:
        other = one.page.context.new_page()
        other.goto(f"{peaked.url}/")
        for page, seed in ((one.page, 1), (other, 2)):
            page.wait_for_selector("html[data-ready]")
            set_all(page, max_tokens=100, temperature=1, seed=seed)
            page.fill("#text", f"tab {seed} ")
        for page in (one.page, other):
            page.press("#text", "Control+Enter")
        for page, seed in ((one.page, 1), (other, 2)):
            wait_until_done(page)
            expected = by_api(peaked, f"tab {seed} ", max_tokens=100, temperature=1, seed=seed).text
            assert page.input_value("#text") == shown(f"tab {seed} {expected}")


def test_a_second_model_writes_beside_the_first(chromium: Any, peaked: Running) -> None:
    with write_page(chromium, peaked) as seen:
        page = seen.page
        page.select_option("#other", CHAT_MODEL)
        first = write(page, "side ", **SETTINGS)
        second = "".join(piece for _, piece in pieces(page, "second"))
        assert first == shown("side " + by_api(peaked, "side ").text)
        assert second == shown("side " + by_api(peaked, "side ", CHAT_MODEL).text) != first
        left, right = (page.locator(f"#{pane} .sheet").bounding_box() for pane in ("first", "second"))
        assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
        page.click("#take-over")
        assert page.input_value("#text") == second
        page.set_viewport_size({"width": 390, "height": 800})
        above, below = (page.locator(f"#{pane} .sheet").bounding_box() for pane in ("first", "second"))
        assert above["y"] + above["height"] < below["y"]


def test_alternatives_by_keyboard_and_a_replaced_token(chromium: Any, peaked: Running) -> None:
    expected = by_api(peaked, "to be ", logprobs=10)
    tops = expected.logprobs.top_logprobs
    with write_page(chromium, peaked) as seen:
        page = seen.page
        write(page, "to be ", **SETTINGS)
        reach(seen, 3)
        names = page.eval_on_selector_all(".alternatives .name", "all => all.map(one => one.textContent)")
        shares = page.eval_on_selector_all(".alternatives .p", "all => all.map(one => one.textContent)")
        likeliest = sorted(tops[3].items(), key=lambda pair: -pair[1])
        assert len(names) == len(likeliest) >= 10
        for share, (_, logprob) in zip(shares, likeliest, strict=True):
            assert abs(float(share.strip("<%")) / 100 - math.exp(logprob)) <= 0.005
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        chosen = page.evaluate("document.activeElement.querySelector('.name').textContent")
        bodies = asked_of(page, "/v1/completions")
        page.keyboard.press("Enter")
        wait_until_done(page)
        kept = "".join(piece for _, piece in pieces(page)[:4])
        after = page.input_value("#text")
    assert re.fullmatch(r"[!-~␣]", chosen), "a letter that can be typed, with this seed"
    prefix = kept + chosen.replace("␣", " ")
    assert shown(bodies[0]["prompt"]) == prefix
    again = by_api(peaked, bodies[0]["prompt"])
    assert after == shown(bodies[0]["prompt"] + again.text)


def reach(seen: Opened, n: int) -> None:
    """From the editor to the token of this number, by keys alone."""
    page = seen.page
    page.focus("#text")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('token')"), "Tab reaches one token"
    page.keyboard.press("Home")
    for _ in range(n):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('#first .token')].indexOf(document.activeElement)") == n


def test_a_conversation_is_the_api_s(chromium: Any, peaked: Running) -> None:
    told: dict[str, Any] = {"model": CHAT_MODEL, "max_tokens": 25, "temperature": 0.8, "seed": 5}
    with write_page(chromium, peaked) as seen, peaked.client() as client:
        page = seen.page
        assert not page.is_visible("#as-talk"), "the first model does not chat"
        page.select_option("#model", CHAT_MODEL)
        page.click("#as-talk")
        set_all(page, max_tokens=25, seed=5)
        messages: list[Any] = []
        for content in ("hello", "and then?"):
            page.fill("#message", content)
            page.press("#message", "Enter")
            wait_until_done(page)
            messages.append({"role": "user", "content": content})
            answer = client.chat.completions.create(**told, messages=messages).choices[0].message.content
            assert page.locator("#first .talk li.assistant").last.inner_text().strip() == shown(answer).strip()
            messages.append({"role": "assistant", "content": answer})
        page.click("#undo")
        assert page.locator("#first .talk li").count() == 2 and page.input_value("#message") == "and then?"
        set_all(page, temperature="hot")
        page.press("#message", "Enter")
        page.wait_for_selector("#first .notice:has-text('temperature')")
        wait_until_done(page)
        assert page.locator("#first .talk li").count() == 2 and page.input_value("#message") == "and then?"
