"""The report of a run: whole, harmless and small, whatever the record holds."""

import hashlib
import html
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regpt2.base.errors import DataError, UsageError
from regpt2.commands import report
from regpt2.commands.report import main, write_report
from regpt2.pages.charts.panels import MOST_RUNS, look_of, panels
from regpt2.pages.record import read_record, smooth, spread, thin, thin_peaks
from regpt2.pages.safe_html import Html, fill, join

pytestmark = pytest.mark.seconds

RUN: dict[str, Any] = {
    "time": "2026-11-21T05:00:00+00:00",
    "config": {"recipe": "demo", "seed": 1337, "optim": {"lr": 1e-3}},
    "version": "0.1.0",
    "commit": "3f9c2ab",
    "command": "regpt2 train demo",
    "python": "3.11.7",
    "torch": "2.13.0",
    "device": "cpu: AMD EPYC",
    "precision": "bf16",
    "threads": 2,
    "world_size": 1,
    "n_params": 10_320_128,
    "tokenizer": "bytes",
    "tokenizer_fingerprint": "9f2c",
    "data_fingerprint": "77aa",
    "train_tokens": 18_400_221,
    "val_tokens": 401_221,
    "batch_tokens": 1536,
    "max_steps": 60,
    "baselines": {"unigram": 4.9, "lzma": 1.9},
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def run_event(**changes: Any) -> dict[str, Any]:
    return {"event": "run", "step": 0, **RUN, **changes}


def train_event(step: int, **changes: Any) -> dict[str, Any]:
    loss = 1 + 4 * math.exp(-step / 20)
    figures = {"loss": loss, "grad_norm": 0.5, "lr": 1e-3, "step_ms": 100.0, "tokens_per_s": 15_360.0, "mfu": None}
    return {"event": "train", "step": step, **figures, "tokens": step * 1536, "skipped": False, **changes}


def val_event(step: int, **changes: Any) -> dict[str, Any]:
    figures = {"loss": 1.5, "perplexity": 4.48, "bits_per_byte": 2.164, "tokens": 4096, "elapsed_s": 1.0}
    return {"event": "eval", "step": step, "eval": "val_loss", **figures, **changes}


def sample_event(step: int, *texts: str, prompt: str = "def ") -> dict[str, Any]:
    return {"event": "sample", "step": step, "prompt": prompt, "texts": list(texts)}


def hellaswag_event(step: int, acc_norm: float) -> dict[str, Any]:
    figures = {"acc_norm": acc_norm, "acc_norm_stderr": 0.0046, "count": 10_042}
    return {"event": "eval", "step": step, "eval": "hellaswag", **figures}


def verdict_event(step: int, **changes: Any) -> dict[str, Any]:
    said = {
        "state": "above",
        "text": "above by 0.100: 3.5, the reference 3.4 here",
        "checks": ["the batch", "the rate"],
    }
    told = {"difference": 0.1, "band": 0.02, "curve": "fineweb_gpt2_124m_llmc", "source": "llm.c's log"}
    return {"event": "verdict", "step": step, **said, **told, **changes}


def end_event(step: int, reason: str = "finished") -> dict[str, Any]:
    return {"event": "end", "step": step, "reason": reason, "elapsed_s": 131.5}


def whole_run() -> list[dict[str, Any]]:
    events = [run_event(), val_event(0, loss=5.5)]
    events += [train_event(step) for step in range(1, 61)]
    events += [val_event(60), sample_event(60, "def f(x):\n    return x"), end_event(60)]
    return events


def record(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order, every id is used once."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids)), "an id is used twice"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = record(tmp_path_factory.mktemp("runs") / "demo", whole_run())
    (run / "config.toml").write_text("seed = 1337\n")
    write_report(run)
    return run


def test_page_tells_the_results_and_what_they_depend_on(whole: Path) -> None:
    text = Page((whole / "report.html").read_text()).text
    for told in ("60 of 60 steps", "92.2k tokens", "10.3M parameters", "finished", "1.5000", "4.48", "2.164", "2m11s"):
        assert told in text
    for told in ("3f9c2ab", "regpt2 train demo", "cpu: AMD EPYC", "1337", "77aa", "lzma: 1.90", "seed = 1337"):
        assert told in text
    assert read_record(whole).sha256 in text


def test_picture_is_a_png_of_reasonable_size(whole: Path) -> None:
    picture = (whole / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < len(picture) < 500_000


def test_page_loads_nothing(whole: Path) -> None:
    markup = (whole / "report.html").read_text()
    page = Page(markup)
    assert "http://" not in markup and "https://" not in markup and "@import" not in markup
    assert not {"iframe", "object", "embed", "link", "base", "form", "img"} & set(page.tags)
    assert re.findall("<script[^>]*>", markup) == ['<script type="application/json">'], "data, nothing that runs"
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert re.findall(r"url\((?!#)", markup) == []
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


def test_references_inside_the_drawings_lead_somewhere(whole: Path) -> None:
    markup = (whole / "report.html").read_text()
    ids = {value for name, value in Page(markup).attributes if name == "id"}
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', markup))
    assert used and {first or second for first, second in used} <= ids
    assert "var(--train)" in markup and "#00000" not in markup, "curves take their colors from the page"


def test_same_record_gives_the_same_bytes(whole: Path) -> None:
    before = [(whole / name).read_bytes() for name in ("report.html", "report.png", "report.md")]
    write_report(whole)
    assert [(whole / name).read_bytes() for name in ("report.html", "report.png", "report.md")] == before
    assert not list(whole.glob(".*")), "nothing half-written stays"


HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>[1](javascript:x)"
    "{0}{css}$x^2$\x1b[2J\x00\u202egnp.exe\ud800"
)


def test_hostile_text_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    facts = {key: HOSTILE for key, value in RUN.items() if isinstance(value, str)}
    run = record(
        tmp_path / "run",
        [
            run_event(**facts, config={HOSTILE: HOSTILE}, baselines={HOSTILE: 1.9}),
            train_event(1),
            val_event(1, **{HOSTILE: HOSTILE, "loss": HOSTILE}),
            val_event(1, eval=HOSTILE),
            val_event(2),
            sample_event(1, HOSTILE, prompt=HOSTILE),
            verdict_event(1, **dict.fromkeys(("state", "text", "source", "curve", "band_reason"), HOSTILE)),
            {"event": "note", "step": 1, "text": HOSTILE},
            end_event(1, reason=HOSTILE),
        ],
    )
    page = page_of(run)
    markup = (run / "report.html").read_text(encoding="utf-8")
    assert "img" not in page.tags and page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in markup and "\x00" not in markup and "\u202e" not in markup
    assert r"\x1b[2J\x00\u202egnp.exe\ud800" in page.text
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"<(?!/?(details|summary)>)", markdown), "no markup but our own"
    assert "\x1b" not in markdown
    outside_of_code = re.sub(r"```json\n.*?\n```", "", markdown, flags=re.S)
    links = re.findall(r"(?<!\\)\]\([^)]*\)", outside_of_code)
    assert links == ["](report.png)"], "no link but to the picture"
    assert "<script>alert(1)</script>" in page.text


def test_config_file_is_escaped(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [run_event()])
    (run / "config.toml").write_bytes(b"# </pre><script>\xff\n")
    assert page_of(run).tags.count("script") == 1


INCOMPLETE: dict[str, list[dict[str, Any]]] = {
    "nothing at all": [],
    "only a start": [run_event()],
    "a start that says nothing": [{"event": "run", "step": 0}],
    "one step": [run_event(), train_event(1)],
    "steps without a start": [train_event(step) for step in range(1, 4)],
    "only an evaluation": [val_event(0)],
    "no bits per byte": [run_event(baselines=None), train_event(1), val_event(1, bits_per_byte=None)],
    "not finite": [run_event(), *(train_event(s, loss="nan", grad_norm="inf") for s in range(1, 99)), val_event(9)],
    "evaluation not finite": [run_event(), val_event(1, loss="nan", perplexity="inf", bits_per_byte="nan")],
    "enormous": [run_event(), *(train_event(s, loss=10.0**s, grad_norm=10.0**s) for s in range(1, 200))],
    "zeros": [run_event(), *(train_event(s, loss=0.0, grad_norm=0.0, lr=0.0, tokens_per_s=0.0) for s in range(1, 99))],
    "verdicts of nothing": [run_event(), train_event(1), {"event": "verdict", "step": 1}, verdict_event(1, checks=3)],
    "an evaluation of nothing": [run_event(), {"event": "eval", "step": 1, "eval": "hellaswag", "protocol": [1]}],
    "wrong types": [
        run_event(n_params=[], max_steps="x", baselines=[1], config=3, time=4),
        train_event(1, loss=[], tokens={}, lr=None),
        val_event(1, loss={"a": 1}, perplexity=None, eval=None),
        {"event": "sample", "step": 1, "prompt": None, "texts": None},
        {"event": "end", "step": 1, "reason": None, "elapsed_s": "soon"},
    ],
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_missing_and_broken_pieces_still_give_a_clean_page(tmp_path: Path, case: str) -> None:
    run = record(tmp_path / "run", INCOMPLETE[case])
    page = page_of(run)
    assert "Certificate" in page.text
    assert (run / "report.png").stat().st_size > 5_000


def test_stopped_run_and_resumed_run_are_told_apart(tmp_path: Path) -> None:
    begun = [run_event(), train_event(1), train_event(2, skipped=True), end_event(2, "stopped by signal 15")]
    stopped = page_of(record(tmp_path / "stopped", begun)).text
    assert "2 of 60 steps" in stopped and "stopped by signal 15" in stopped
    resumed = [*begun, run_event(step=2, torch="2.14.0", time="2026-11-22T06:00:00+00:00"), train_event(3)]
    text = page_of(record(tmp_path / "resumed", resumed)).text
    assert "running, or killed" in text
    assert "at step 2 (2026-11-22 06:00:00 UTC)" in text
    assert "2.13.0; from step 2: 2.14.0" in text
    assert "Skipped steps 2 " in text
    assert "A dotted line" in text and "A dotted line" not in stopped


def test_first_middle_and_last_samples_are_open_and_the_others_folded(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [run_event(), *(sample_event(step, f"text {step}") for step in range(1, 8))])
    markup = (write_report(run)).read_text()
    unfolded = re.sub(r"<details>.*?</details>", "", markup, flags=re.S)
    assert re.findall(r"text (\d)", unfolded) == ["1", "4", "7"]
    assert re.findall(r"text (\d)", markup) == list("1234567")


def test_prompt_stands_once_before_the_text(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [sample_event(1, "def f():", prompt="def "), sample_event(2, "g():", prompt="def ")])
    markup = write_report(run).read_text()
    assert "<pre><b>def </b>f():</pre>" in markup and "<pre><b>def </b>g():</pre>" in markup


def test_long_run_gives_a_small_page(tmp_path: Path) -> None:
    events = [run_event(max_steps=100_000)]
    for step in range(1, 100_001):
        events.append(train_event(step, loss=3 + math.sin(step) / 3, grad_norm=1 + math.cos(7 * step) / 2))
        if step % 100 == 0:
            events += [val_event(step), sample_event(step, "x" * 5000, "<" * 5000)]
    path = write_report(record(tmp_path / "run", events))
    assert path.stat().st_size < 1_000_000
    Page(path.read_text())


def test_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record(tmp_path / "run", [run_event()])
    assert main([str(run), "--out", str(tmp_path / "pages" / "demo.html")]) == 0
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["demo.html", "demo.md", "demo.png"]
    assert "demo.html" in capsys.readouterr().out
    assert not (run / "report.html").exists()


REAL = {"tokenizer": "gpt2", "n_params": 124_475_904, "batch_tokens": 524_288, "max_steps": 60}


def real_run(folder: Path, dataset: str | None, **changes: Any) -> Path:
    """A run of GPT-2's size in its tokens."""
    events = [run_event(dataset=dataset, **{**REAL, **changes})]
    events += [train_event(step, loss=9 - step / 10, tokens=step * 524_288) for step in range(1, 61)]
    events += [
        val_event(30, loss=6.0),
        hellaswag_event(30, 0.2612),
        val_event(60, loss=3.3),
        hellaswag_event(60, 0.3012),
    ]
    return record(folder, events)


@pytest.mark.parametrize(
    ("dataset", "line"),
    [("fineweb_edu", "3.292"), ("fineweb", "3.425"), ("openwebtext", "3.12"), ("mine", ""), (None, "")],
)
def test_a_loss_has_the_line_of_its_own_data_and_no_other(tmp_path: Path, dataset: str | None, line: str) -> None:
    loss = panels([read_record(real_run(tmp_path / "run", dataset))])[0]
    assert [loss.tick(rule.value) for rule in loss.rules] == ([line] if line else [])
    llmc_shards = real_run(tmp_path / "named", None, config={"data": "data/fineweb_10B"})
    assert [rule.value for rule in panels([read_record(llmc_shards)])[0].rules] == [3.424958]
    other_tokens = panels([read_record(real_run(tmp_path / "bytes", dataset, tokenizer="bytes"))])[0]
    assert other_tokens.rules == []


def test_hellaswag_stands_between_the_lines_of_its_size_and_chance(tmp_path: Path) -> None:
    for n_params, lines in ((124e6, ["29.45 %", "33.7 %"]), (1.5e9, ["48.89 %", "54.7 %"])):
        run = real_run(tmp_path / f"{n_params:.0f}", None, n_params=int(n_params))
        panel = next(panel for panel in panels([read_record(run)]) if panel.name == "hellaswag")
        assert [panel.tick(rule.value) for rule in panel.rules] == [*lines, "25 %"]
    page = page_of(run)
    assert "30.12 ± 0.46 %" in page.text and "GPT-2 1558M 48.89 % [1]" in page.text


def test_every_number_of_others_leads_to_its_source(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run", "fineweb")
    markup = write_report(run).read_text()
    marks = [int(n) for n in re.findall(r'href="#source-(\d+)"', markup)]
    listed = [int(n) for n in re.findall(r'<li id="source-(\d+)"', markup)]
    assert marks and set(marks) == set(listed) and listed == list(range(1, len(listed) + 1))
    told = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', markup, flags=re.S)[0])
    assert "llm.c dev/vislog.ipynb" in told["sources"] and len(told["sources"]) == len(listed)


def test_verdict_is_told_in_words_with_its_checks_in_order(tmp_path: Path) -> None:
    events = [
        run_event(dataset="fineweb", **REAL),
        train_event(1),
        verdict_event(1, state="on track"),
        verdict_event(2),
    ]
    run = record(tmp_path / "run", events)
    text = page_of(run).text
    checks = "What to check, the likeliest cause first: the batch the rate"
    assert f"Above by 0.100: 3.5, the reference 3.4 here [1] {checks}" in text
    assert "All 2 verdicts" in text and "On track" in text and "llm.c's log" in text
    markdown = (run / "report.md").read_text()
    assert "1. the batch\n2. the rate" in markdown


def test_reference_curve_of_the_verdict_lies_under_the_loss(tmp_path: Path) -> None:
    events = [run_event(dataset="fineweb", **{**REAL, "max_steps": 1000})]
    events += [train_event(step, tokens=step * 524_288) for step in range(1, 1001)]
    events += [verdict_event(250, band=0.3), verdict_event(500, band=None), verdict_event(750, band=0.1)]
    loss = panels([read_record(record(tmp_path / "run", events))])[0]
    (reference,) = [trace for trace in loss.traces if trace.source]
    np.testing.assert_allclose(reference.x, [0, 250, 500, 750, 1000], atol=0.1)  # steps
    np.testing.assert_allclose(reference.y, [11.0092, 6.171, 5.3743, 4.7097, 4.317])  # main.log of llm.c's run
    np.testing.assert_allclose(reference.spread, [np.nan, 0.3, 0.2, 0.1, np.nan], atol=1e-9)


def test_a_record_without_verdicts_is_judged_after_the_fact(tmp_path: Path) -> None:
    text = page_of(record(tmp_path / "run", whole_run())).text
    assert "Verdict Too short" in text and "fewer than one per parameter" in text


def test_certificate_is_the_same_on_the_page_to_copy_and_in_markdown(whole: Path) -> None:
    markup = (whole / "report.html").read_text()
    told = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', markup, flags=re.S)[0])
    copied = re.findall(r'<pre class="copy" tabindex="0">(.*?)</pre>', markup, flags=re.S)[0]
    in_markdown = re.findall(r"```json\n(.*?)\n```", (whole / "report.md").read_text(), flags=re.S)[0]
    assert json.loads(html.unescape(copied)) == json.loads(in_markdown) == told
    assert told["commit"] == "3f9c2ab" and told["seed"] == "1337" and told["wall_time"] == "2m11s"
    assert told["record"].endswith(read_record(whole).sha256)
    assert told["configuration"].endswith(hashlib.sha256(b"seed = 1337\n").hexdigest())


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    a = real_run(tmp_path / "a", "fineweb")
    b = real_run(tmp_path / "b", "fineweb", batch_tokens=262_144)
    path = write_report([a, b], tmp_path / "both.html")
    markup = path.read_text()
    page = Page(markup)
    assert '<th scope="col">a</th><th scope="col">b</th>' in markup
    assert '<th scope="row">HellaSwag</th><td>30.12 ± 0.46 %</td><td>30.12 ± 0.46 %</td>' in markup
    assert "var(--run1)" in markup and "var(--run2)" in markup and "data differ" not in page.text
    assert path.with_suffix(".md").read_text().count("| Validation loss | 3.3000 | 3.3000 |") == 1


def test_runs_on_different_data_get_no_line_and_are_told_apart(tmp_path: Path) -> None:
    runs = [real_run(tmp_path / name / "run", name) for name in ("fineweb", "fineweb_edu")]
    assert panels([read_record(run) for run in runs])[0].rules == []
    text = Page(write_report(runs, tmp_path / "both.html").read_text()).text
    assert "their losses cannot be compared" in text
    assert str(runs[0]) in text, "two folders of one name are called by their paths"


def test_no_two_runs_are_told_apart_by_color_alone() -> None:
    looks = [look_of(place) for place in range(MOST_RUNS)]
    assert len({look.ink for look in looks}) == len({look.marker for look in looks}) == MOST_RUNS
    assert all(str(one.dash) != str(other.dash) for one, other in itertools.pairwise(looks))


def test_results_of_evaluate_join_the_run(tmp_path: Path) -> None:
    run = record(tmp_path / "run", whole_run())
    other = {"loss": 9.87, "tokens": 99, "references": {}, "protocol": {}}
    protocol = {"accuracy": "the last word over all its tokens"}
    figures = {"accuracy": 0.3312, "accuracy_stderr": 0.0066, "count": 5153, "protocol": protocol, "elapsed_s": 2.0}
    (tmp_path / "r.json").write_text(
        json.dumps({"model": "m", "step": 60, "results": {"lambada": figures, "val_loss": other}})
    )
    assert main([str(run), "--results", str(tmp_path / "r.json")]) == 0
    text = Page((run / "report.html").read_text()).text
    assert "lambada accuracy 33.12 ± 0.66 % 5,153 GPT-2 124M 45.99 % [1]" in text
    assert "GPT-2 124M 32.56 % [2]" in text, "the harness's figure of the same model, beside the paper's"
    assert "the last word over all its tokens" in text
    assert "val_loss loss 9.8700 99" in text and "val_loss loss 1.5000 4,096" in text
    assert text.count("9.87") == 1, (
        "other tokens are another measure: not the run's own loss, and no point of its curve"
    )
    for bad in ("[]", "{}", '{"results": 3}', '{"results": {"a": 1}}', "nonsense"):
        (tmp_path / "r.json").write_text(bad)
        with pytest.raises(DataError, match="holds no results of evaluations"):
            write_report(run, None, tmp_path / "r.json")


def test_each_drawing_is_told_in_words_and_headings_come_in_order(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run", "fineweb")
    markup = write_report(run).read_text()
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', markup)
    assert len(labels) == markup.count("<svg")
    assert "validation: from 6 to 3.3 at 60 steps, between 3.3 and 6; GPT-2 124M: 3.425" in labels[0]
    levels = [int(n) for n in re.findall(r"<h(\d)", markup)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert markup.count("<th") == markup.count('scope="row"') + markup.count('scope="col"') + markup.count("<thead")


CSS = Path(report.__file__).parents[1] / "pages" / "page.css"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colors_are_readable_on_the_page(theme: int) -> None:
    """WCAG 2: 4.5 for text, 3 for lines; both on the page and on a card."""
    colors = dict(re.findall(r"--(\w+): (#\w{6})", CSS.read_text().split(":root {")[theme + 1]))
    assert len(colors) > 12

    def luminance(name: str) -> float:
        parts = [int(colors[name][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for ground in ("paper", "card"):
        for name in set(colors) - {"paper", "card", "rule", "grid"}:
            low, high = sorted((luminance(name), luminance(ground)))
            least = 4.5 if name in ("text", "faint") else 3
            assert (high + 0.05) / (low + 0.05) >= least, f"--{name} on --{ground}"


def test_a_single_slow_step_stays_to_be_seen() -> None:
    step_ms = np.full(20_000, 140.0)
    step_ms[7_777] = 2_000.0
    x, y = thin_peaks(np.arange(20_000.0), step_ms)
    assert len(x) == 500 and y.max() == 2_000.0


def test_wrong_use_is_refused_with_a_mend(tmp_path: Path) -> None:
    run = record(tmp_path / "demo", [run_event()])
    with pytest.raises(UsageError, match=r"did you mean 'demo'"):
        main([str(tmp_path / "dmo")])
    with pytest.raises(UsageError, match=r"holds no metrics\.jsonl.*demo"):
        main([str(tmp_path)])
    with pytest.raises(UsageError, match="is a file"):
        main([str(run / "metrics.jsonl")])
    with pytest.raises(UsageError, match=r"must be a file that ends in \.html"):
        main([str(run), "--out", str(tmp_path / "x.pdf")])
    with pytest.raises(UsageError, match="got 0 runs"):
        main([])
    with pytest.raises(UsageError, match=r"several runs needs a name: --out"):
        main([str(run), str(run)])
    with pytest.raises(UsageError, match="got 9 runs"):
        main([str(run)] * 9)
    assert not list(run.glob("report*"))


def test_damaged_record_is_refused_and_a_cut_last_line_is_not(tmp_path: Path) -> None:
    run = record(tmp_path / "run", [run_event(), train_event(1)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event":"train","st')
    assert write_report(run).exists()
    (run / "metrics.jsonl").write_text('{"event":"tr\n' + json.dumps(train_event(1)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        write_report(run)


def test_markup_escapes_all_but_markup() -> None:
    assert fill("<p>{a}{b}</p>", a="<&\"'{b}", b=Html("<br>")) == "<p>&lt;&amp;&#34;&#39;{b}<br></p>"
    assert fill("{a}", a="\x1b[2J\ud800") == r"\x1b[2J\ud800"
    assert join([Html("<br>"), "<i>"], " ") == "<br> &lt;i&gt;"  # type: ignore[list-item]


def test_thinned_curve_keeps_the_mean_and_shows_gaps() -> None:
    x, y = np.arange(10_000.0), np.sin(np.arange(10_000.0) / 500)
    thin_x, thin_y = thin(x, y, at_most=100)
    assert len(thin_x) == len(thin_y) == 100
    np.testing.assert_allclose([thin_x.mean(), thin_y.mean()], [x.mean(), y.mean()], atol=1e-9)  # equal buckets
    y[:150] = np.nan
    y[250] = np.inf
    _, thin_y = thin(x, y, at_most=100)
    assert np.isnan(thin_y[0]) and np.isfinite(thin_y[1:]).all()


def test_smoothing_equals_the_mean_of_each_window() -> None:
    y = np.random.default_rng(0).normal(size=200)
    y[50] = np.nan
    got = smooth(y, share=0.1)
    for place in range(len(y)):
        before = min(place, 10)
        window = y[place - before : place + before + 1]
        assert got[place] == pytest.approx(np.nanmean(window), abs=1e-12)  # sums of 200 doubles
    spiked = np.where(np.arange(200) == 20, 1e38, 1.0)
    np.testing.assert_allclose(smooth(spiked), 1.0)


def test_spread_keeps_the_first_and_the_last() -> None:
    assert spread(range(100), 3) == [0, 50, 99]
    assert spread([1, 2], 3) == [1, 2]
