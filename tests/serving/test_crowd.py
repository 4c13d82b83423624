"""The clients of benchmarks/serve.py: what they read from a socket, what they call fair, and what its tables show."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from crowd import tables
from crowd.http_client import Answer, parsed
from crowd.known import prose
from crowd.load import Seen, Served, fairness, percentile, read_stream
from crowd.steady import prompts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def test_events_have_the_time_of_their_last_byte_however_the_network_cuts_them() -> None:
    parts = [event("a"), event("é\\n"), event("", "stop") + b"data: [DONE]\n\n"]
    raw = HEAD + chunked(parts[0][:7], parts[0][7:] + parts[1], parts[2])
    whole = parsed([(0.0, raw)])
    assert whole.is_whole and whole.status == 200 and len(whole.events) == 4
    ends = [raw.find(b"\n\n", raw.find(mark)) + 2 for mark in (b'"a"', b"u00e9", b'"stop"', b"[DONE]")]
    for cut in range(1, len(raw)):
        found = parsed([(1.0, raw[:cut]), (2.0, raw[cut:])])
        assert [data for _, data in found.events] == [data for _, data in whole.events]
        assert [at for at, _ in found.events] == [1.0 if end <= cut else 2.0 for end in ends]
        assert not parsed([(1.0, raw[:cut])]).is_whole


def test_a_stream_is_put_together_and_a_broken_one_is_a_problem() -> None:
    good = Answer(200, events=[(1.0, event("a").decode()[6:]), (2.0, event("b", "stop").decode()[6:]), (2.0, "[DONE]")])
    streamed = read_stream(good)
    assert (streamed.texts, streamed.reasons, streamed.token_times, streamed.problem) == (
        {0: "ab"}, {0: "stop"}, [1.0, 2.0], ""
    )  # fmt: skip
    assert "ends with" in read_stream(Answer(200, events=good.events[:-1])).problem
    assert read_stream(Answer(200, events=[(1.0, '{"cho'), *good.events])).problem
    assert read_stream(Answer(200, events=[(1.0, '{"error": {}}'), *good.events])).problem


def test_a_starved_client_shows() -> None:
    seen = Seen(served=[Served(n % 4, 0.1, 0.1, (), 1) for n in range(40)])
    assert fairness(seen, 4)["mean_wait_max_of_median"] == pytest.approx(1.0)
    seen.served = [each for each in seen.served if each.client] + [Served(0, 2.0, 0.1, (), 1)]
    share = fairness(seen, 4)
    assert (share["requests_min"], share["requests_median"]) == (1, 10)
    assert share["mean_wait_max_of_median"] == pytest.approx(20)
    assert share["longest_wait_s"] == 2.0
    assert fairness(seen, 5)["requests_min"] == 0  # one that got nothing at all


def test_percentiles_and_prompts_are_what_they_say() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], p) for p in (0, 50, 99)] == [1.0, 3.0, 4.0]
    texts = prompts(20, 50, seed=1)
    assert texts == prompts(20, 50, seed=1) != prompts(20, 50, seed=2)
    assert all(len(text) == 50 and text in prose() for text in texts) and len(set(texts)) > 15


def entries() -> list[dict[str, Any]]:
    """A file of results, of which some are measured again."""
    about = {"machine": "x86_64, 2 cores, 2 threads", "torch": "2.13.0"}
    steady = {"tokens_per_s": 200.0, "first_token_p50_s": 0.02, "first_token_p95_s": 0.05}
    batch: dict[str, Any] = {"what": "batch", "model": "runs/demo", "dtype": "fp32", "work": "w"}
    batch["tokens_per_s"] = {"sample": 100.0, "streams": 95.0, "whole": 99.0}
    batch |= {"ratio": {"streams": 0.95, "whole": 0.99}, "ratio_spread": {"streams": [0.9, 1.0], "whole": [0.9, 1.1]}}
    beside: dict[str, Any] = {"what": "llama.cpp", "work": "124M, more", "dtype": "fp32", "clients": 4}
    beside |= {"their_version": "xllamacpp 1, FP32", "regpt2": steady, "llama.cpp": steady | {"tokens_per_s": 400.0}}
    beside["ours_of_theirs"] = {"tokens_per_s": 0.5, "first_token_p50_s": 2.0}
    return [about | batch | {"ratio": {"streams": 0.1, "whole": 0.1}}, about | batch, about | beside]


def test_tables_show_the_last_of_equal_measurements_and_replace_the_old_ones(tmp_path: Path) -> None:
    results, page = tmp_path / "2026_serving.json", tmp_path / "page.md"
    results.write_text(json.dumps(entries()))
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.update(page, [results])
    tables.update(page, [results])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| runs/demo | fp32 | 100 tokens/s | 95: **0.95x** (0.90-1.00) | 99: **0.99x** (0.90-1.10) |" in text
    assert "| 124M, fp32 / FP32 | 4 | 20 ms / 20 ms | 50 ms / 50 ms | **0.50x** | 200 / 400 | **0.50x** |" in text
    assert "0.10x" not in text


@pytest.mark.slow
@pytest.mark.process
def test_the_quick_run_measures_a_real_server(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "--quick", "--only", "load", "batch", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    load, batch = json.loads(out.read_text())
    assert load["passed"] and load["greedy_texts_equal"] == load["greedy_texts"] > 5 and load["server_wrote"] == [0]
    assert batch["tokens_per_s"]["sample"] > 0 and batch["tokens_per_s"]["streams"] > 0
    assert "16 clients" in tables.block([out])
