"""What comes from outside (23 to 30). In: a bench; out: nothing obeyed, nothing executed, nothing kept?"""

import html.parser
import http.server
import importlib
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import points
import torch
import trial
from suite import Bench, Fault, NotHere, Outcome

from regpt2.base.errors import DownloadError
from regpt2.base.files import sha256_bytes
from regpt2.base.net import http_client
from regpt2.base.net.download import download
from regpt2.data.tokenizer import load_tokenizer

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\x9b31m\x90q\x9c",
    "<script>alert(1)</script>",
    "</pre></script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "javascript:alert(1)//%0a--></style><svg/onload=alert(1)>",
    "\u202egnp.exe\u2066\u2069\u200f",
    '\n{"event":"end","step":1}\n\r\r\x08\x08\x00',
    "${7*7}{{7*7}}<%= 7*7 %>`id`$(id)",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
)
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def hostile_output(bench: Bench) -> Outcome:
    """A model and a prompt that speak to the terminal and the browser: neither obeys, and the record stays a record."""
    outcome = Outcome()
    for text in HOSTILE[: bench.planned]:
        run = bench.new("run")
        options = ("--max-steps", 2, "--sample-every", 1, "--sample.prompt", text, "--sample.max-new-tokens", 8)
        options += ("--model.block-size", 128, "--batch.seq-len", 128)  # room for each text and more
        process = trial.start(bench, run, *options, before=lambda text=text: _make_it_say(text), page=True)
        code, said = process.wait(), process.log.read_bytes().decode(errors="replace")
        wrong = [] if code == 0 else [f"exit code {code}: {said[-500:]}"]
        wrong += [f"the terminal was sent {match!r}" for match in _OBEYED.findall(said)[:1]]
        wrong += _record_is_one(run) if code == 0 else []
        wrong += _page_is_inert(run / "report.html") if code == 0 else []
        outcome.fired(not wrong, f"{text!r}: {'; '.join(wrong)}")
    return outcome


def _make_it_say(text: str) -> None:
    """Whatever is sampled is the hostile text."""
    ids = list(load_tokenizer("bytes").encode(text))
    points.patch("regpt2.run.intervals:generate", lambda generate: lambda *_, **__: torch.tensor([ids]))


def _record_is_one(run: Path) -> list[str]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    kinds = [event["event"] for event in events]
    ok = kinds.count("end") == 1 and kinds.count("sample") == 2 and kinds[-1] == "end"
    return [] if ok else [f"the record has {kinds}"]


class _Elements(html.parser.HTMLParser):
    """Elements, attributes and the text of scripts, as a browser sees them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.bad: list[str] = []
        self.in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_script = tag == "script"
        self.bad += [f"<{tag} {name}>" for name, _ in attrs if name.startswith("on")]
        self.bad += [
            f"<{tag} {n}={v}>" for n, v in attrs if n in ("src", "href") and not str(v).startswith(("data:image/", "#"))
        ]

    def handle_data(self, data: str) -> None:
        if self.in_script and "alert" in data:
            self.bad.append("hostile text in a script")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False


def _page_is_inert(page: Path) -> list[str]:
    if not page.exists():
        return ["there is no page"]
    elements = _Elements()
    elements.feed(page.read_text())
    return elements.bad[:2]


def malicious_files(bench: Bench) -> Outcome:
    """The corpus of the security tests: refused, nothing executed, in bounded memory."""
    folder = Path(__file__).parents[1] / "security"
    if not (folder / "corpus.py").is_file():
        raise NotHere("tests/security/corpus.py is not there yet")
    sys.path.insert(0, str(folder))
    outcome = Outcome()
    for name, wrong in bench.ask(lambda: _try_corpus(bench.folder), timeout_s=300):
        outcome.fired(not wrong, f"{name}: {wrong}")
    return outcome


def _try_corpus(folder: Path) -> list[tuple[str, str]]:
    (folder / "corpus").mkdir()
    verdicts = importlib.import_module("corpus").try_all(folder / "corpus")
    return [(v.case, "" if v.ok else f"{v.ended}, {v.seconds:.1f} s: {v.message}"[:500]) for v in verdicts]


MUTATIONS = 20  # of each input, drawn anew for each seed of the suite


def fuzz_replay(bench: Bench) -> Outcome:
    """Every kept input of the fuzz targets, and each with flipped bits and cut: refused in a message, or read."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
    outcome = Outcome()
    for name, wrong in bench.ask(lambda: _feed_all(bench), timeout_s=300):
        outcome.fired(not wrong, f"{name}: {wrong}")
    return outcome


def _feed_all(bench: Bench) -> list[tuple[str, str]]:
    """What is wrong with how each input was met."""
    seeds, targets = importlib.import_module("seeds"), importlib.import_module("targets")
    found = []
    for name in targets.TARGETS:
        for data in seeds.inputs(name):
            targets.TARGETS[name](data)  # what is imported on first use is not charged to an input
            for mutated in (data, *(_mutated(data, bench.rng) for _ in range(MUTATIONS))):
                try:
                    targets.feed(name, mutated)
                    found.append((name, ""))
                except Exception as error:
                    found.append((name, f"{type(error).__name__}: {error} on {mutated[:40]!r}"[:300]))
    shutil.rmtree(targets._place(), ignore_errors=True)  # a trial leaves without saying goodbye
    return found


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """With some bits flipped, or cut."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.3 else changed)


GOOD = os.urandom(1000) * 100
SHA256 = sha256_bytes(GOOD)


class _Poisoned(http.server.BaseHTTPRequestHandler):
    """A server on loopback that answers each path in its own wrong way."""

    def do_GET(self) -> None:
        getattr(self, f"answer_{self.path.strip('/')}")()

    def log_message(self, *_: object) -> None:
        """Silent."""

    def body(self, data: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def answer_good(self) -> None:
        self.body(GOOD)

    def answer_short(self) -> None:
        self.body(GOOD[:-1000], len(GOOD))

    def answer_shorter_without_saying(self) -> None:
        self.body(GOOD[:-1000])

    def answer_long(self) -> None:
        self.body(GOOD + b"more")

    def answer_swapped(self) -> None:
        self.body(os.urandom(len(GOOD)))

    def answer_empty(self) -> None:
        self.body(b"")

    def answer_page(self) -> None:
        self.body(b"<html>please log in</html>")

    def answer_redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", "/swapped")
        self.end_headers()

    def answer_loop(self) -> None:
        self.send_response(302)
        self.send_header("Location", "/loop")
        self.end_headers()

    def answer_file(self) -> None:
        self.send_response(302)
        self.send_header("Location", "file:///etc/hostname")
        self.end_headers()

    def answer_missing(self) -> None:
        self.send_error(404)

    def answer_broken(self) -> None:
        self.send_error(500)

    def answer_slow(self) -> None:
        self.body(GOOD[:10], len(GOOD))
        time.sleep(3)

    def answer_garbage(self) -> None:
        self.wfile.write(b"\x00\xff not HTTP\r\n\r\n")

    def answer_closed(self) -> None:
        self.connection.close()


WAYS = tuple(
    name.removeprefix("answer_") for name in vars(_Poisoned) if name.startswith("answer_") and name != "answer_good"
)


def poisoned_download(bench: Bench) -> Outcome:
    """Short, long, swapped, redirected, slow answers: refused in one message, and what was there before is kept."""
    outcome = Outcome()
    for way, wrong in bench.ask(lambda: _download_all(bench.folder, WAYS[: bench.planned])).items():
        outcome.fired(not wrong, f"{way}: {wrong}")
    return outcome


def _download_all(folder: Path, ways: tuple[str, ...]) -> dict[str, str]:
    """What is wrong with how each was met."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Poisoned)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    found = {}
    for way in ways:
        place = folder / way
        found[way] = _refused(f"{address}/{way}", place / "new") or _refused(
            f"{address}/{way}", place / "old", b"former"
        )
    download(f"{address}/good", folder / "good", SHA256)
    assert (folder / "good").read_bytes() == GOOD, "a good download is not kept"
    return found


def _refused(url: str, path: Path, former: bytes | None = None) -> str:
    path.parent.mkdir(exist_ok=True)
    if former is not None:
        path.write_bytes(former)
    try:
        with patch.object(http_client, "TIMEOUT_S", 0.5):
            download(url, path, SHA256, tries=1)
    except DownloadError:
        left = sorted(other.name for other in path.parent.iterdir() if other.suffix != ".part")  # to be continued
        kept = path.read_bytes() if path.exists() else None
        return "" if kept == former and left == ([path.name] if former else []) else f"left behind: {left}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


FAULTS = [
    Fault(23, "replay of fuzzing", (200, 200), fuzz_replay),
    Fault(28, "hostile output", (len(HOSTILE), len(HOSTILE)), hostile_output),
    Fault(29, "malicious files", (500, 500), malicious_files),
    Fault(30, "poisoned downloads", (len(WAYS), len(WAYS)), poisoned_download),
]
