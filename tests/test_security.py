"""What comes from outside: files run nothing and take little, nothing is unpickled, no text drives a terminal."""

import json
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import TINY_RECIPE, Run
from regpt2.base.console import safe_text, say, warn
from regpt2.base.errors import CheckpointError
from regpt2.base.record.metrics import MetricsLog, read_events
from regpt2.commands.report import write_report
from regpt2.commands.sample import sample
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files import safe_pickle
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.files.safe_pickle import read_pickled
from regpt2.model.files.tensors import MAX_HEADER_BYTES
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.sampling.continue_text import SampleOptions
from warm_processes import run_python

CORPUS = Path(__file__).parent / "security" / "corpus.py"


def python(*arguments: object, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(CORPUS.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


# --- files ---


def test_every_malicious_file_is_refused_and_none_is_run(tmp_path: Path) -> None:
    done = python(CORPUS, tmp_path)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [verdict for verdict in verdicts if not verdict["ok"]], done.stderr
    assert done.returncode == 0, done.stderr
    kinds = Counter(verdict["case"].split(":")[0] for verdict in verdicts)
    assert len(verdicts) > 500 and kinds["code"] >= 35 and kinds["archive"] >= 25 and kinds["safetensors"] >= 40, kinds
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # of the corpus, which seldom changes
def test_the_code_in_the_corpus_does_run_where_nothing_guards_it(tmp_path: Path) -> None:
    """Else its being refused would prove nothing."""
    script = """if True:
        import contextlib, io, os, pickle, sys
        from pathlib import Path
        from bad_pickles import code
        canary = Path(sys.argv[1])
        for what, body in code(canary).items():
            if (pid := os.fork()) == 0:
                os.dup2(os.open(os.devnull, os.O_RDWR), 2)
                os.dup2(2, 1)
                with contextlib.suppress(Exception):
                    pickle.loads(body)
                os._exit(0)
            os.waitpid(pid, 0)
            if not canary.exists():
                print("harmless:", what)
            canary.unlink(missing_ok=True)
    """
    done = python("-c", script, tmp_path / "canary")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


PLANTS = {
    "code: os.system": "torch.load = lambda *a, weights_only, load=torch.load, **k: load(*a, weights_only=False, **k)",
    "state: a thousand views of one": "safe_pickle.plain_tensors = lambda s, n: {k: s[k].clone() for k in s}",
    "archive: compressed": "safe_pickle.check_archive = lambda *a: None",
    "native config: a billion wide": "load._check_sizes = load.fill_model.check_tensors = lambda *a: None",
    "safetensors: a name of escapes": "tensors._check_header = lambda path: None",
    "shard: one fewer than there are": "other_formats.expect_bytes = lambda *a: None",
    "manifest: a file name that climbs": "manifest.Path = lambda file: types.SimpleNamespace(name=file)",
}


def test_the_corpus_sees_each_missing_guard(tmp_path: Path) -> None:
    script = f"""if True:
        import os, sys, types
        from pathlib import Path
        import corpus, torch
        from regpt2.data.tokens import manifest, other_formats
        from regpt2.model.files import load, safe_pickle, tensors
        plants, cases = {PLANTS!r}, corpus.all_cases(Path(sys.argv[1]) / "canary")
        for name, plant in plants.items():
            corpus.all_cases = lambda canary: [case for case in cases if case.name == name]
            if (pid := os.fork()) == 0:
                exec(plant)
                os._exit(10 + sum(not verdict.ok for verdict in corpus.try_all(Path(sys.argv[1]))))
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 11:
                print("not seen:", plant)
    """
    done = python("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.fixture
def real_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpickles is an interpreter of its own, as for a user; other tests fork it."""
    monkeypatch.setattr(safe_pickle, "subprocess", subprocess)


@pytest.mark.usefixtures("real_child")
def test_a_foreign_file_is_unpickled_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "model.bin")

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("unpickled here")

    monkeypatch.setattr(torch, "load", fails)
    read = read_pickled(tmp_path / "model.bin")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.usefixtures("real_child")
def test_a_model_that_transformers_saved_by_pickle_is_read(tmp_path: Path) -> None:
    """With `lm_head.weight` tied to `wte.weight`: one storage, two names."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=300)
    theirs = GPT2LMHeadModel(config).eval()
    config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path).model
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(ids)[..., :300] - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.usefixtures("real_child")
def test_unpickling_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.bin")
    monkeypatch.setattr(safe_pickle, "SPARE_S", 0.05)
    with pytest.raises(CheckpointError, match=r"model\.bin is damaged.*reading it took more than 0 s"):
        read_pickled(tmp_path / "model.bin")


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize(
    "act", ["x = bytearray(1 << 30)", "open(sys.argv[1], 'wb').write(bytes(1 << 22))", "[0 for _ in iter(int, 1)]"]
)
def test_the_child_has_little_memory_disk_and_time(tmp_path: Path, act: str) -> None:
    script = f"""if True:
        import sys
        from regpt2.model.files import safe_pickle
        safe_pickle.SPARE_S = 1.0
        safe_pickle.limit_this_process(1000)
        {act}
    """
    done = run_python("-c", script, tmp_path / "file", timeout=60)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr or "File too large" in done.stderr or done.returncode < 0


def test_the_header_of_the_largest_gpt2_and_its_optimizer_fits() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=48, n_head=25, n_embd=1600))
    entries = {
        f"{name}/{kind}": {"dtype": "F32", "shape": list(p.shape), "data_offsets": [10**10, 10**10]}
        for name, p in model.named_parameters()
        for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    assert len(json.dumps(entries)) < MAX_HEADER_BYTES / 3


WITHOUT_PICKLE = """
import os, pickle, _pickle, sys, traceback
import torch

def used(*_, **__):
    traceback.print_stack()
    os._exit(99)  # an exception could be caught and forgotten

class Used:
    __init__ = used

for module in (pickle, _pickle):
    module.load = module.loads = used
    module.Unpickler = Used
torch.load = used

from regpt2.cli import main
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    if code := main(line.split("|")):
        sys.exit(code)
"""


def test_nothing_is_unpickled_on_the_way_from_training_to_the_report(tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    train = f"train|tiny.toml|--data|{tiny_data}|--run|run"
    lines = [
        f"{train}|--max-steps|4",
        f"{train}|--resume|must|--max-steps|8",
        f"evaluate|run|--data|{tiny_data}",
        "sample|run|a|--max-new-tokens|5",
        "explore|run",
        "convert|run|hf|--to|huggingface",
        "convert|hf|native|--to|native",
        "report|run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICKLE],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ ") == len(lines)
    planted = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICKLE + "pickle.loads(b'N.')"], input="", capture_output=True, timeout=60
    )
    assert planted.returncode == 99


# --- text ---

HOSTILE = (
    "".join(map(chr, range(256)))
    + "\x1b]52;c;aGk=\x07\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\"  # the clipboard, a link
    + "\x1b[2J\x1b[31;1m\x9b31m\x1bP$q\x1b\\\x90q\x9c\x1b_x\x1b\\"  # clear, colors, device control, a program's command
    + "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\x85\udc9b"
    + "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg/onload=alert(1)>"
    + "{}{0}${7*7}javascript:alert(1)"
)
ALLOWED = "\n\t"


def unsafe(text: str) -> set[str]:
    """Characters that drive a terminal or turn text around, by the Unicode standard's own classes."""
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"
    return {c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160 or c in bidi) and c not in ALLOWED}


@pytest.fixture
def bytes_model(tmp_path: Path) -> Path:
    """A tiny model of bytes, in a folder."""
    tokenizer = load_tokenizer("bytes")
    folder = tmp_path / "model"
    folder.mkdir()
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=2048, vocab_size=257)
    native.write(GPT(config), folder, Vocabulary("bytes", tokenizer.fingerprint))
    return folder


@pytest.mark.parametrize("n", [1, 2])
def test_what_a_model_writes_never_drives_the_terminal(
    bytes_model: Path, n: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [*range(256), *HOSTILE.encode("utf-8", "replace")]

    given = iter(ids)

    def draw(_: object, logits: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), next(given))

    monkeypatch.setattr("regpt2.sampling.writing._Pen.draw", draw)
    texts = sample(SampleOptions(str(bytes_model), HOSTILE, max_new_tokens=len(ids), n=n))
    shown = capsys.readouterr()
    assert unsafe(texts[0]) and not unsafe(shown.out) and not unsafe(shown.err)
    assert "\\x1b]52;c;aGk=\\x07" in shown.out


def test_lines_for_a_person_are_safe_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    warn(HOSTILE)
    shown = capsys.readouterr()
    assert not unsafe(shown.out + shown.err)
    assert safe_text(shown.out) == shown.out
    assert (shown.out + shown.err).encode()


def test_names_of_files_in_messages_are_safe(tmp_path: Path, regpt2: Run) -> None:
    name = "\x1b]52;c;aGk=\x07\x9b31m\u202edlof\n"
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{")
    for arguments in (["sample", name], ["report", name], ["train", f"{name}.toml"], ["evaluate", name], [name]):
        done = regpt2(*arguments)
        assert done.returncode in (1, 2)
        assert "\\x1b]52" in done.stderr and not unsafe(done.stdout + done.stderr), arguments
        assert "Traceback" not in done.stderr


def hostile_record(run: Path) -> list[dict[str, object]]:
    """A run whose every text is hostile."""
    log = MetricsLog(run / "metrics.jsonl")
    log.log("run", 0, recipe=HOSTILE, command=HOSTILE, device=HOSTILE, config={HOSTILE: HOSTILE}, version=HOSTILE)
    for step in range(1, 30):
        log.log("train", step, loss=3.0 / step, lr=1e-3, step_ms=10.0, tokens_per_s=1e4, tokens=100 * step)
    log.log("eval", 29, eval=HOSTILE, loss=HOSTILE, **{HOSTILE: 1.0})
    log.log("eval", 29, eval="val_loss", loss=2.5, perplexity=HOSTILE)
    log.log("sample", 29, prompt=HOSTILE, texts=[HOSTILE, HOSTILE])
    log.log("note", 29, text=HOSTILE)
    log.log("end", 29, reason=HOSTILE, elapsed_s=3.0)
    return list(read_events(run / "metrics.jsonl"))


def test_a_record_is_one_safe_line_and_reads_back_as_it_was(tmp_path: Path) -> None:
    events = hostile_record(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_bytes().decode()
    assert not unsafe(text)
    assert len(text.splitlines()) == len(events) == 35
    assert events[-2]["text"] == HOSTILE


class Tags(HTMLParser):
    """Everything on a page that is no text."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.attributes |= {(name, value or "") for name, value in attrs}


def test_a_report_of_hostile_text_is_a_page_without_it(tmp_path: Path) -> None:
    hostile_record(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert not unsafe(page)
    tags = Tags()
    tags.feed(page)
    assert not {"img", "iframe", "object", "link", "form", "a"} & set(tags.seen)
    # The one script is the certificate's data, which no browser runs; nothing in it can end it early.
    assert tags.seen["script"] == 1 and ("type", "application/json") in tags.attributes
    data = page.split('<script type="application/json">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data)
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "action")]
    assert all(value.startswith("#") for name, value in tags.attributes if name == "href")
    policy = next(value for name, value in tags.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 8
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text() + "\x1b[2J\n")
    shown = subprocess.run([sys.executable, "-m", "regpt2", "report", str(tmp_path)], capture_output=True, text=True)
    assert shown.returncode == 1 and not unsafe(shown.stderr)
