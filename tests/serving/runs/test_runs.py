"""Runs over HTTP: which names are answered, what their events hold, and that watching stays cheap."""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growing import HOSTILE, append, events_until, start_event, train_event, val_event

from regpt2.base.files import folder_lock
from regpt2.pages.charts.panels import panels
from regpt2.pages.live.snapshot import charts_data, texts_data, to_json
from regpt2.pages.record import read_record
from regpt2.serving.app import build_app
from regpt2.serving.http.access import Access
from regpt2.serving.runs import channel as channel_module
from regpt2.serving.runs.channel import Budget, Channel, EventStream, Part
from regpt2.serving.runs.channels import Channels, ListChannel, RunChannel
from serving.http.asgi_client import HOST, Answer, ask

KEY = "0123456789abcdef-secret"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, and beside their folder one that is not theirs."""
    append(tmp_path / "runs" / "demo", events_until(30))
    append(tmp_path / "runs" / "compare" / "adamw" / "seed-1", events_until(12))
    append(tmp_path / "secret", [start_event(dataset="secret")])
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "EVERY_S", 0.02)


def get(runs: Path, path: str, **access: Any) -> Answer:
    return ask(build_app({}, runs, access=Access(**access)), "GET", path, [HOST])


def test_pages_exist_for_the_runs_that_exist(runs: Path) -> None:
    for path in ("/runs", "/runs/demo", "/runs/compare/adamw/seed-1", "/static/runs/run.js", "/static/runs/runs.css"):
        assert get(runs, path).status == 200, path


@pytest.mark.parametrize("below", ["", "/events", "/panels", "/report"])
@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "../secret",
        "demo/../../secret",
        "..",
        ".",
        "demo/metrics.jsonl",
        "/etc",
        "demo\x00",
        5000 * "a",
        "compare",
    ],
)
def test_other_names_get_404_and_no_path(runs: Path, name: str, below: str) -> None:
    answer = get(runs, f"/runs/{name}{below}")
    assert answer.status == 404
    assert str(runs.parent).encode() not in answer.body and b"secret" not in answer.body.replace(b"/secret", b"")


def test_files_of_runs_are_not_served(runs: Path) -> None:
    (runs / "demo" / "report.html").write_text("<p>a file")
    (runs / "demo" / "config.toml").write_text("a = 1")
    for name in ("report.html", "config.toml", "metrics.jsonl", ".lock", "checkpoints"):
        assert get(runs, f"/runs/demo/{name}").status == 404


def test_with_a_key_the_pages_reveal_nothing_and_the_data_need_it(runs: Path) -> None:
    there, not_there = (get(runs, f"/runs/{name}", key=KEY) for name in ("demo", "nope"))
    assert there.status == not_there.status == 200
    assert there.body.replace(b"demo", b"") == not_there.body.replace(b"nope", b"")
    for path in ("/runs-events", "/runs/demo/events", "/runs/demo/panels", "/runs/demo/report"):
        assert get(runs, path, key=KEY).status == 401


def test_the_report_is_made_on_request_and_may_run_nothing(runs: Path) -> None:
    answer = get(runs, "/runs/demo/report")
    assert answer.status == 200 and b"<svg" in answer.body and b"Validation loss" in answer.body
    assert "script-src" not in (answer.header("content-security-policy") or "")
    assert (answer.header("content-security-policy") or "").startswith("default-src 'none'")


def test_a_damaged_record_has_no_report_but_is_no_mistake_of_the_server(runs: Path) -> None:
    with open(runs / "demo" / "metrics.jsonl", "a") as file:
        file.write("damaged\n")
    answer = get(runs, "/runs/demo/report")
    assert answer.status == 422 and str(runs) not in answer.error["message"]
    assert get(runs, "/runs/demo/panels").status == 200


def test_the_charts_are_those_of_the_report(runs: Path) -> None:
    append(runs / "demo", [train_event(31, loss=math.nan), train_event(32, loss=math.inf), train_event(33)])
    record = read_record(runs / "demo")
    sent = json.loads(to_json(charts_data(record)))
    drawn = panels([record])
    assert [panel["name"] for panel in sent["panels"]] == [panel.name for panel in drawn]
    for panel, one in zip(drawn, sent["panels"], strict=True):
        assert (one["title"], one["description"], one["log"]) == (panel.title, panel.description(), panel.log)
        assert [trace["label"] for trace in one["traces"]] == [trace.label for trace in panel.traces]
        for trace, data in zip(panel.traces, one["traces"], strict=True):
            for got, expected in ((data["x"], trace.x), (data["y"], trace.y)):
                got = np.array([math.nan if value is None else value for value in got])
                np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert any(None in trace["y"] for panel in sent["panels"] for trace in panel["traces"]), "NaN and infinity are null"
    steps, tokens = sent["tokens"]["steps"], sent["tokens"]["tokens"]
    np.testing.assert_allclose(tokens, np.array(steps) * 1000, rtol=1e-6)


def test_hostile_texts_stay_text_in_one_line(runs: Path) -> None:
    event = {"event": "sample", "step": 1, "prompt": HOSTILE, "texts": [HOSTILE, "\n\ndata: {}\n\n"]}
    append(runs / "demo", [event, {"event": "note", "step": 1, "text": HOSTILE}])
    line = to_json(texts_data(read_record(runs / "demo")))
    assert "\n" not in line and "\x1b" not in line and "\u202e" not in line
    assert "\\\\x1b[2J" in line and "<img src=x onerror=alert(1)>" in json.loads(line)["samples"][0]["prompt"]


class Counting(Channel):
    """A channel whose parts a test sets."""

    def __init__(self) -> None:
        super().__init__(ThreadPoolExecutor(1), Budget())
        self.now: dict[Part, str] = {("status", ""): "1", ("panel", "loss"): "[1]"}
        self.n_looks = 0

    def look(self, *, spend: bool) -> dict[Part, str]:
        """What the test has set."""
        self.n_looks += 1
        return dict(self.now)


async def next_of(stream: AsyncGenerator[bytes, None]) -> str:
    return (await asyncio.wait_for(anext(stream), 5)).decode()


def test_only_what_changed_is_sent_and_a_new_client_gets_all() -> None:
    async def watch() -> None:
        watched = Counting()
        first = watched.stream()
        assert await next_of(first) == "event: status\ndata: 1\n\nevent: panel\ndata: [1]\n\n"
        watched.now[("status", "")] = "2"
        assert await next_of(first) == "event: status\ndata: 2\n\n"
        second = watched.stream()
        assert await next_of(second) == "event: status\ndata: 2\n\nevent: panel\ndata: [1]\n\n"
        watched.now[("panel", "loss")] = "[1,2]"
        assert await next_of(first) == await next_of(second) == "event: panel\ndata: [1,2]\n\n"
        await first.aclose()
        await second.aclose()

    asyncio.run(watch())


def test_nobody_looks_when_nobody_watches_and_all_share_a_look() -> None:
    async def watch() -> None:
        watched = Counting()
        streams = [watched.stream() for _ in range(5)]
        for stream in streams:
            await next_of(stream)
        began, before = watched.n_looks, time.monotonic()
        await asyncio.sleep(0.3)
        assert watched.n_looks - began <= (time.monotonic() - before) / 0.02 + 1, "five clients, one look at a time"
        for stream in streams:
            await stream.aclose()
        await asyncio.sleep(0.05)
        began = watched.n_looks
        await asyncio.sleep(0.1)
        assert watched.n_clients == 0 and watched.n_looks == began

    asyncio.run(watch())


def test_a_look_that_fails_ends_the_stream_and_the_next_one_looks_again() -> None:
    async def watch() -> None:
        watched = Counting()
        first = watched.stream()
        await next_of(first)
        whole = watched.now
        watched.now = None  # type: ignore[assignment]
        with pytest.raises(TypeError):
            await next_of(first)
        watched.now = whole
        second = watched.stream()
        assert "event: status" in await next_of(second)
        watched.now[("status", "")] = "3"
        assert "data: 3" in await next_of(second)
        await second.aclose()

    asyncio.run(watch())


def test_a_heartbeat_is_sent_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HEARTBEAT_S", 0.05)

    async def watch() -> None:
        stream = Counting().stream()
        await next_of(stream)
        assert (await next_of(stream)).startswith(":")
        await stream.aclose()

    asyncio.run(watch())


@pytest.mark.parametrize("ends_by", ["client", "server"])
def test_a_stream_ends_when_the_client_leaves_or_the_server_stops(ends_by: str) -> None:
    async def watch() -> None:
        watched, sent, left = Counting(), asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.set()

        answer = asyncio.create_task(EventStream(watched)({}, receive, send))
        await asyncio.wait_for(sent.wait(), 5)
        assert watched.n_clients == 1
        left.set() if ends_by == "client" else answer.cancel()
        done, _ = await asyncio.wait({answer}, timeout=5)
        assert done and watched.n_clients == 0

    asyncio.run(watch())


def test_too_many_clients_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.serving.runs.routes.MOST_CLIENTS", 0)
    assert get(runs, "/runs/demo/events").status == 429


def look_at(channel: Channel, kind: str, *, spend: bool = True) -> list[Any]:
    return [json.loads(data) for (one, _), data in channel.look(spend=spend).items() if one == kind]


def test_the_list_has_a_row_for_each_run_and_follows_the_folder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.serving.runs.channels.LIST_EVERY_S", 0.0)
    shown = ListChannel(runs, ThreadPoolExecutor(1), Budget())
    with folder_lock(runs / "demo"):
        rows = {row["name"]: row for row in look_at(shown, "run")}
        assert rows["demo"]["state"] == "running" and rows["demo"]["step"] == 30
    assert {row["name"]: row["state"] for row in look_at(shown, "run")}["demo"] == "killed"
    append(runs / "demo", [{"event": "end", "step": 30, "reason": "finished", "elapsed_s": 3}])
    append(runs / "new", events_until(5))
    (runs / "compare" / "adamw" / "seed-1" / "metrics.jsonl").unlink()
    assert {row["name"]: row["state"] for row in look_at(shown, "run")} == {"demo": "finished", "new": "running"}
    assert look_at(shown, "names") == [["demo", "new"]]


def test_charts_wait_when_there_is_no_time_for_them_but_the_status_does_not(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regpt2.serving.runs.channels.CHARTS_EVERY_S", 0.0)
    shown = RunChannel(runs / "demo", ThreadPoolExecutor(1), Budget())

    def last() -> tuple[Any, Any]:
        return look_at(shown, "status", spend=False)[0]["step"], look_at(shown, "panel", spend=False)[0]["last"]

    assert last() == (30, 30), "the first charts are always drawn"
    append(runs / "demo", [train_event(31)])
    assert last() == (31, 30)
    shown.look(spend=True)
    assert last() == (31, 31)


def test_a_budget_is_a_tenth_of_the_time_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("regpt2.serving.runs.channel.time.monotonic", lambda: now[0])
    budget, spent_s = Budget(0.1), 0.0
    for _ in range(10_000):
        now[0] += 0.1
        if budget.may_spend():
            budget.spend(0.3)
            spent_s += 0.3
    assert spent_s == pytest.approx(0.1 * 1000, rel=0.02)


def test_watching_a_long_run_costs_less_than_a_tenth_of_a_core(tmp_path: Path) -> None:
    """20,000 updates: what a second of watching costs, with charts every two seconds."""
    append(tmp_path / "long", [start_event(20_000), val_event(0)])
    lines = [json.dumps(train_event(step)) + "\n" for step in range(1, 20_001)]
    with open(tmp_path / "long" / "metrics.jsonl", "a") as file:
        file.writelines(lines)
    shown = RunChannel(tmp_path / "long", ThreadPoolExecutor(1), Budget())
    shown.look(spend=True)
    costs = []
    for step in range(20_001, 20_006):
        append(tmp_path / "long", [train_event(step)])
        shown._charted_at = -1000.0  # charts are due
        began_s = time.thread_time()
        shown.look(spend=True)
        costs.append(time.thread_time() - began_s)
    assert min(costs) / 2 < 0.1, f"{1e3 * min(costs):.0f} ms every two seconds"


def test_runs_that_nobody_watches_are_forgotten_in_the_end(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regpt2.serving.runs.channels.MOST_KEPT", 3)
    channels = Channels(runs)
    first = channels.run(runs / "0")
    assert channels.run(runs / "0") is first
    for number in range(1, 10):
        channels.run(runs / str(number))
    assert len(channels._runs) == 3 and channels.run(runs / "0") is not first
