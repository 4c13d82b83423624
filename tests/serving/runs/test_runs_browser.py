"""Runs in a real Chromium before the real server: the pages follow the record, and their figures are its figures."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from growing import HOSTILE, append, events_until, loss_at, start_event, train_event, val_event

from regpt2.base.console import count, duration
from regpt2.base.files import folder_lock
from regpt2.base.record.metrics import MetricsLog
from regpt2.pages.charts.formats import Format
from regpt2.pages.charts.panels import panels
from regpt2.pages.record import read_record
from regpt2.serving.app import build_app
from regpt2.serving.http.access import Access
from serving.browser import Opened, opened, overflow_px
from serving.http.server_thread import listening

pytestmark = [pytest.mark.browser, pytest.mark.seconds]

KEY = "0123456789abcdef-secret"
VERDICT = {
    "event": "verdict",
    "step": 40,
    "state": "above",
    "text": "above by 0.2: 4.8",
    "checks": ["the learning rate"],
}


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are shown sooner than for people."""
    monkeypatch.setattr("regpt2.serving.runs.channel.EVERY_S", 0.1)
    for name in ("CHARTS_EVERY_S", "LIST_EVERY_S"):
        monkeypatch.setattr(f"regpt2.serving.runs.channels.{name}", 0.1)


@contextmanager
def served(folder: Path, **access: Any) -> Iterator[str]:
    """The address of a server without models."""
    with listening(build_app({}, folder, access=Access(**access))) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run that trains beside two that have ended."""
    folder = tmp_path / "runs"
    append(folder / "live", events_until(30))
    for name, shift, every in (("older", 0.5, 5), ("compare/a/seed-1", 0.2, 30)):
        made = events_until(60, every=every)
        events = [event | {"loss": event["loss"] + shift} if "loss" in event else event for event in made]
        append(folder / name, [*events, {"event": "end", "step": 60, "reason": "finished", "elapsed_s": 6.0}])
    append(folder / "elsewhere", [*events_until(20), {"event": "end", "step": 20, "reason": "failed: no disk"}])
    (folder / "elsewhere" / "metrics.jsonl").write_text(
        (folder / "elsewhere" / "metrics.jsonl").read_text().replace('"tiny"', '"other"').replace("1000,", "4000,")
    )
    return folder


def wait_for(seen: Opened, selector: str, text: str) -> None:
    """Until an element has this text in it."""
    seen.page.locator(selector).filter(has_text=text).first.wait_for()


def readout(seen: Opened, panel: str, *keys: str) -> list[str]:
    """What the crosshair of a chart reads after these keys."""
    chart = seen.page.locator(f"figure[data-panel={panel}] svg.chart")
    chart.locator("path").first.wait_for(state="attached")
    chart.focus()
    for key in keys:
        seen.page.keyboard.press(key)
    return [str(text) for text in chart.locator(".readout text").all_text_contents()]


def test_a_page_follows_its_run_without_reload(chromium: Any, runs: Path) -> None:
    live = runs / "live"
    with folder_lock(live), served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        wait_for(seen, "#summary", "30 of 100 steps")
        wait_for(seen, "#state", "running")
        path = seen.page.locator("figure[data-panel=loss] path[data-label=training]")
        before = path.get_attribute("d")
        seen.page.evaluate("window.loadedOnce = true")
        append(live, [*(train_event(step) for step in range(31, 41)), val_event(40), VERDICT])
        append(live, [{"event": "sample", "step": 40, "prompt": "def ", "texts": ["def the_newest():"]}])
        wait_for(seen, "#summary", "40 of 100 steps")
        wait_for(seen, "#results", f"{loss_at(40) + 0.1:.4f}")
        wait_for(seen, "#verdict", "Above by 0.2: 4.8")
        wait_for(seen, "#checks", "the learning rate")
        wait_for(seen, "#samples", "the_newest")
        wait_for(seen, "#left", "40 % · 6s left")
        drawn = "one => document.querySelector('path[data-label=training]').getAttribute('d') !== one"
        seen.page.wait_for_function(drawn, arg=before)
        assert seen.page.evaluate("document.getElementById('progress').value") == pytest.approx(0.4)
        assert seen.page.locator("#samples figure").first.inner_text().startswith("Step 40"), "the newest first"
        assert seen.page.evaluate("window.loadedOnce"), "without a reload"
        append(live, [{"event": "end", "step": 40, "reason": "stopped by signal 15", "elapsed_s": 4.0}])
        wait_for(seen, "#state", "stopped by signal 15")


def test_the_page_reads_the_numbers_of_the_record(chromium: Any, runs: Path) -> None:
    with served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        wait_for(seen, "#summary", "30 of 100 steps")
        record = read_record(runs / "live")
        by_name = {panel.name: panel for panel in panels([record])}
        assert seen.page.locator("#curves figure").evaluate_all("all => all.map(one => one.dataset.panel)") == [
            *by_name
        ]
        for key, at in (("Home", 0), ("End", -1)):
            for name, panel in by_name.items():
                texts = readout(seen, name, key)
                label = "training" if name == "loss" else panel.traces[-1].label
                named = next(trace for trace in panel.traces if trace.label == label)
                assert texts[0].split(" · ")[0] == f"step {named.x[at]:,.0f}"
                shown = next(text for text in texts if text.startswith(f"{named.label} "))
                digits = {"loss": "4", "bits": "3"}.get(name)
                expected = (
                    f"{named.y[at]:.{digits}f}".rstrip("0").rstrip(".") if digits else panel.tick(float(named.y[at]))
                )
                assert shown.removeprefix(f"{named.label} ").split(" at ")[0] == expected, (name, key)
        report = seen.page.request.get(f"{url}/runs/live/report").text()
        assert (
            by_name["loss"].description()[:60] in report and seen.page.locator("#results").inner_text().count("\n") > 5
        )


def test_the_page_writes_numbers_as_the_report_does(chromium: Any, runs: Path) -> None:
    draw = np.random.default_rng(0)
    values = [*(10 ** draw.uniform(-9, 13, 400)).tolist(), *draw.normal(size=50).tolist(), 0.0, 1.0, 950.0, 999_999.0]
    formats = [Format("digits", 3), Format("percent"), Format("short"), Format("count"), Format("general", 3)]
    sent = [{"kind": one.kind, "digits": one.digits} for one in formats]
    script = """async ([formats, values]) => {
        const { count, duration, formatted } = await import("/static/runs/format.js");
        const rows = formats.map((format) => values.map((value) => formatted(format, value)));
        return [...rows, values.map(count), values.map(duration)];
    }"""
    with served(runs) as url, opened(chromium, f"{url}/runs") as seen:
        *shown, counts, durations = seen.page.evaluate(script, [sent, values])
    for one, texts in zip(formats, shown, strict=True):
        assert texts == [one(value) for value in values], one
    assert counts == [count(value) for value in values]
    assert durations == [duration(value) for value in values]


def test_arrow_keys_move_through_the_updates(chromium: Any, runs: Path) -> None:
    with served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        wait_for(seen, "#summary", "30 of 100 steps")
        assert readout(seen, "loss", "End")[0].startswith("step 30 ")
        assert readout(seen, "loss", "ArrowLeft")[0].startswith("step 29 ")
        assert readout(seen, "loss", "Shift+ArrowLeft")[0].startswith("step 19 ")
        assert seen.page.locator("figure[data-panel=loss] output").inner_text().startswith("step 19")
        before = seen.page.locator("figure[data-panel=loss] svg.chart").get_attribute("viewBox")
        seen.page.set_viewport_size({"width": 900, "height": 900})  # drawn anew, as when the run goes on
        seen.page.locator(f"figure[data-panel=loss] svg.chart:not([viewBox='{before}'])").wait_for()
        assert readout(seen, "loss")[0].startswith("step 19 "), "what is read stays"
        assert readout(seen, "loss", "Escape") == []
        rates = seen.page.locator("figure[data-panel=lr] svg.chart")
        rates.scroll_into_view_if_needed()
        box = rates.bounding_box()
        seen.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 80)
        assert seen.page.locator("figure[data-panel=lr] .readout").count() == 1
        assert seen.page.locator(".pointer line").count() == seen.page.locator("svg.chart").count(), (
            "all at the same step"
        )


def test_a_record_that_is_cut_back_is_shown_anew(chromium: Any, runs: Path) -> None:
    live = runs / "live"
    with folder_lock(live), served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        wait_for(seen, "#summary", "30 of 100 steps")
        MetricsLog(live / "metrics.jsonl").cut_back(10)
        append(live, [start_event(step=10), *(train_event(step, loss=2.0) for step in range(11, 16))])
        wait_for(seen, "#summary", "15 of 100 steps")
        wait_for(seen, "#remark", "A dotted line marks where the run was resumed.")
        seen.page.locator("figure[data-panel=loss] line[stroke-dasharray='1 2']").wait_for(state="attached")
        texts = readout(seen, "loss", "End")
        assert texts[0].startswith("step 15 ") and "training 2" in texts


def test_other_runs_of_the_same_data_are_ghosts_and_can_be_chosen(chromium: Any, runs: Path) -> None:
    with served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        legend = "figure[data-panel=loss] .legend"
        wait_for(seen, legend, "older")
        wait_for(seen, legend, "compare/a/seed-1")
        assert "elsewhere" not in seen.page.locator(legend).inner_text(), "other data"
        ghost = seen.page.locator("figure[data-panel=loss] path[data-label=older]")
        assert float(ghost.get_attribute("stroke-opacity") or 1) < 1
        texts = readout(seen, "loss", "End")
        assert f"older {loss_at(30) + 0.6:.4f}".rstrip("0") in texts
        few = next(float(text.rpartition(" ")[2]) for text in texts if text.startswith("compare/a/seed-1"))
        assert abs(few - (loss_at(30) + 0.2)) < 0.05, "too few validations for a curve: the training loss"
        seen.page.get_by_role("checkbox", name="older").uncheck()
        ghost.wait_for(state="detached")
        seen.page.get_by_role("checkbox", name="elsewhere").check()
        wait_for(seen, "#remark", "drawn over tokens")
        assert re.match(r"\d+(\.\d)?k tokens", readout(seen, "loss", "End")[0]), "batches differ: over tokens"
        seen.page.get_by_role("checkbox", name="elsewhere").uncheck()
        seen.page.get_by_role("checkbox", name="to their full length").check()
        wait_for(seen, "figure[data-panel=loss] svg text", "60")


def test_the_list_follows_the_folder(chromium: Any, runs: Path) -> None:
    with folder_lock(runs / "live"), served(runs) as url, opened(chromium, f"{url}/runs") as seen:
        wait_for(seen, "#summary", "4 runs · 1 running")
        assert seen.page.locator("tbody tr").first.inner_text().startswith("live"), "what trains comes first"
        wait_for(seen, "tbody tr", "failed")
        append(runs / "brand_new", events_until(3))
        wait_for(seen, "#summary", "5 runs")
        append(runs / "live", [train_event(31)])
        wait_for(seen, "tbody tr", "31 of 100")
        seen.page.get_by_role("link", name="compare/a/seed-1").click()
        wait_for(seen, "h1", "compare/a/seed-1")
        wait_for(seen, "#state", "finished")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_pages_fit_a_phone(chromium: Any, runs: Path, scheme: Any) -> None:
    with served(runs) as url:
        for path, text in (("/runs", "4 runs"), ("/runs/live", "30 of 100")):
            with opened(chromium, url + path, scheme=scheme, width=390, height=844) as seen:
                wait_for(seen, "#summary", text)
                assert overflow_px(seen.page) == 0


HOLES = """() => Object.values(Object.groupBy([...document.querySelectorAll("#curves > figure")]
    .map(e => e.getBoundingClientRect()), e => e.top)).map(row =>
    document.querySelector("#curves").getBoundingClientRect().right - Math.max(...row.map(e => e.right)))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_rows_of_charts_are_full_and_close_points_have_no_markers(chromium: Any, tmp_path: Path, width: int) -> None:
    append(tmp_path / "runs" / "few", events_until(60, every=20))
    append(tmp_path / "runs" / "many", events_until(60, every=1))
    for name, markers in (("few", 4), ("many", 0)):
        with served(tmp_path / "runs") as host, opened(chromium, f"{host}/runs/{name}", width=width) as seen:
            charts = seen.page.locator("#curves > figure")
            charts.nth(5).wait_for()
            assert charts.count() == 6, "three in a row of the wide page, and two are left"
            assert max(seen.page.evaluate(HOLES)) < 1
            assert seen.page.locator("figure[data-panel=bits] svg.chart g > circle").count() == markers


def test_hostile_names_and_texts_stay_text(chromium: Any, tmp_path: Path) -> None:
    runs, name = tmp_path / "runs", '"><img src=x onerror=alert(1)>&#39;%2e%2e ü?#\u202e\x1b'
    events = [start_event(config={"recipe": HOSTILE}, dataset=HOSTILE, device=HOSTILE, baselines={HOSTILE: 2.0})]
    events += [train_event(1), val_event(1), VERDICT | {"state": HOSTILE, "text": HOSTILE, "checks": [HOSTILE]}]
    events += [{"event": "note", "step": 1, "text": HOSTILE}]
    events += [{"event": "sample", "step": 1, "prompt": HOSTILE, "texts": [HOSTILE]}]
    append(runs / name, [*events, {"event": "end", "step": 1, "reason": f"failed: {HOSTILE}"}])
    append(runs / "other", events_until(5))
    with served(runs) as url:
        with opened(chromium, f"{url}/runs") as seen:
            wait_for(seen, "tbody th", "<img src=x")
            seen.page.get_by_role("link", name="<img").click()
            wait_for(seen, "h1", name[:-2])
            wait_for(seen, "#samples", "<b>bold</b>")
            wait_for(seen, "#verdict", "</script>")
            assert seen.page.locator("main img, main script, main b b, main style").count() == 0
            assert "\u202e" not in seen.page.locator("main").inner_text()
        with opened(chromium, f"{url}/runs/other") as seen:
            wait_for(seen, "#choices", "<img src=x")
            seen.page.get_by_role("checkbox", name="<img").check()
            wait_for(seen, "figure[data-panel=loss] .legend", "<img src=x")
        with opened(chromium, f"{url}/runs/{quote(name, safe='')}/report") as seen:
            assert seen.page.locator("img, script:not([type='application/json'])").count() == 0


def test_a_lost_server_is_shown_and_found_again(chromium: Any, runs: Path) -> None:
    with served(runs) as url, opened(chromium, f"{url}/runs/live") as seen:
        wait_for(seen, "#summary", "30 of 100")
        seen.page.context.set_offline(True)
        seen.page.evaluate("dispatchEvent(new Event('online'))")  # the stream is opened again, in vain
        wait_for(seen, "#offline", "tries again")
        assert "30 of 100" in seen.page.locator("#summary").inner_text(), "what was there stays"
        append(runs / "live", [train_event(31)])
        seen.page.context.set_offline(False)
        wait_for(seen, "#summary", "31 of 100")
        seen.page.locator("#offline").wait_for(state="hidden")


def test_a_server_that_stops_is_not_held_by_a_page_that_watches(chromium: Any, runs: Path) -> None:
    with served(runs) as url:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(f"{url}/runs/live")
        page.locator("#summary").filter(has_text="30 of 100").wait_for()
    page.locator("#offline").filter(has_text="tries again").wait_for()  # and `listening` saw the server end
    context.close()


def test_a_key_is_asked_for_and_sent(chromium: Any, runs: Path) -> None:
    with served(runs, key=KEY) as url, opened(chromium, f"{url}/runs/live") as seen:
        seen.page.get_by_label("API key").fill("wrong")
        seen.page.get_by_role("button", name="Continue").click()
        seen.page.get_by_label("API key").fill(KEY)
        seen.page.get_by_role("button", name="Continue").click()
        wait_for(seen, "#summary", "30 of 100")
        wait_for(seen, "figure[data-panel=loss] .legend", "older")
        assert not seen.page.locator("#key-form").is_visible()
        assert not seen.page.locator("#report").is_visible(), "a link cannot send the key"


def test_an_unknown_run_is_a_page_that_leads_back(chromium: Any, runs: Path) -> None:
    with served(runs) as url, opened(chromium, f"{url}/runs/nope") as seen:
        assert seen.refused[0] == "404 /runs/nope"
        seen.page.get_by_role("link", name="list").click()
        wait_for(seen, "#summary", "4 runs")
