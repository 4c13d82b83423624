"""`import regpt2`: what the functions give, held against transformers, NumPy, the command and the record itself."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from conftest import TINY_RECIPE, Run
from regpt2 import api
from regpt2.base.console import safe_text
from regpt2.base.device import settings_kept
from regpt2.cli import main

pytestmark = pytest.mark.seconds
ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = tomllib.loads(TINY_RECIPE)
TEXT = "the cat sees a dog and the dog sees a cat, so all is well in the house and in the garden"


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, by the function; read only."""
    folder = tmp_path_factory.mktemp("api") / "run"
    assert api.train(RECIPE, run=folder, data=str(tiny_data)).run == folder
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> api.Model:
    return api.load(str(run))


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_logits_are_those_of_transformers_without_rows_of_padding(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(vocab_size=259, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(shape).eval()
    theirs.save_pretrained(tmp_path)
    ours = api.load(tmp_path, device="cpu")
    assert ours.config.padded_vocab_size > 259
    rows = np.random.default_rng(0).integers(0, 259, size=(3, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(rows)).logits
    found = ours.logits(rows)
    assert found.shape == (3, 32, 259) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # fp32, summed in another order
    for one in (rows[0].tolist(), rows[0], torch.from_numpy(rows[0]), torch.from_numpy(rows[0]).int()):
        torch.testing.assert_close(ours.logits(one), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ids", [[], [0] * 33, [257], [-1], [0.5], [[[0]]]], ids=str)
def test_ids_that_the_model_cannot_take_are_refused(model: api.Model, ids: Any) -> None:
    with pytest.raises(api.UsageError, match="ids"):
        model.logits(ids)


@pytest.mark.parametrize("text", ["a", TEXT, TEXT * 3], ids=len)
def test_a_score_is_the_cross_entropy_of_every_token_once(model: api.Model, text: str) -> None:
    """By NumPy from the logits, in windows of 32 of which the last begins earlier."""
    stream, seq_len = [256, *text.encode()], 32
    nats = 0.0
    for start in range(0, len(stream) - 1, seq_len):
        end = min(start + seq_len, len(stream) - 1)
        first = max(0, end - seq_len)
        logits = model.logits(stream[first:end]).double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats -= sum(log_p[place - first, stream[place + 1]] for place in range(start, end))
    score = model.score(text)
    assert score.nats == pytest.approx(nats, rel=1e-5)  # fp32 logits
    assert (score.n_tokens, score.n_bytes) == (len(text), len(text))
    assert score.nats_per_token == pytest.approx(nats / len(text), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / len(text) / np.log(2), rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(nats / len(text)), rel=1e-5)


def test_an_empty_text_has_no_score(model: api.Model) -> None:
    with pytest.raises(api.UsageError, match="empty"):
        model.score("")


def test_generated_text_is_that_of_the_command(model: api.Model, run: Path, regpt2: Run) -> None:
    options = ("--max-new-tokens", 12, "--seed", 7, "--top-k", 0, "--temperature", 1.5, "--no-stream")
    told = {"max_new_tokens": 12, "seed": 7, "top_k": 0, "temperature": 1.5}
    assert safe_text(model.generate("a", **told)) + "\n" == regpt2("sample", run, "a", *options).stdout
    three = regpt2("sample", run, "a", *options, "--n", 3).stdout
    assert (
        "".join(f"--- {n} of 3 ---\n{safe_text(text)}\n" for n, text in enumerate(model.generate(["a"] * 3, **told), 1))
        == three
    )


def test_prompts_of_a_list_keep_their_order_and_do_not_depend_on_each_other(model: api.Model) -> None:
    alone = [model.generate(prompt, 5) for prompt in ("the", "a cat", "")]
    assert model.generate(["the", "a cat", ""], 5) == alone
    first, other, second = model.generate(["the", "a", "the"], 8)
    assert [first, second] == model.generate(["the", "the"], 8) and first != second and other.startswith("a")


def test_a_stream_is_the_text_in_pieces_and_can_be_left(model: api.Model) -> None:
    whole = model.generate("the", 20, temperature=0)
    with unchanged():
        pieces = model.stream("the", 20, temperature=0)
        first = next(pieces)
    assert "the" + first + "".join(pieces) == whole == model.generate("the", np.int64(20), temperature=np.float32(0))
    for piece in model.stream("the", 20, temperature=0):
        assert whole.startswith("the" + piece)
        break
    left = model.stream("the", 20)
    next(left)
    left.close()
    assert next(left, "") == ""
    with pytest.raises(api.UsageError, match="a stream has one continuation"):
        model.stream("the", n=2)


def test_completions_hold_what_the_text_is_made_of(model: api.Model) -> None:
    texts = model.generate(["the", "a cat"], 12, temperature=0, stop="e")
    found = model.complete(["the", "a cat"], 12, temperature=0, stop="e", logprobs=3, n=2)
    assert [one.prompt + one.text for one in found] == [texts[0], texts[0], texts[1], texts[1]]
    for one in found:
        assert one.logprobs is not None and len(one.logprobs) == len(one.tokens)
        assert [kept.top[0][0] for kept in one.logprobs] == list(one.tokens), "greedy takes the likeliest"
        logits = model.logits([*model.tokenizer.encode(one.prompt), *one.tokens])
        expected = logits.log_softmax(dim=1)[len(one.prompt) - 1, one.tokens[0]]
        assert one.logprobs[0].logprob == pytest.approx(float(expected), abs=1e-4)
    (one,) = model.complete("the " * 30, 40, long="crop", temperature=0)
    assert len(one.tokens) == 40 and one.logprobs is None and one.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_kk": 5}, "top_kk"),
        ({"device": "cpu"}, "device is an option of the command"),
        ({"long": "slide"}, "long = 'slide' must be one of 'refuse', 'crop'"),
        ({"stop": 5}, "stop = 5"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"logprobs": -1}, "logprobs = -1"),
    ],
    ids=str,
)
def test_what_a_model_cannot_write_by_is_refused_at_once(model: api.Model, options: Any, message: str) -> None:
    for write in (model.complete, model.stream):
        with pytest.raises(api.UsageError, match=message):
            write("a", 3, **options)


def test_a_recorded_column_holds_what_the_lines_say(run: Path) -> None:
    columns = api.read_record(str(run))
    assert {len(column) for column in columns.values()} == {13} and columns["step"].tolist() == list(range(13))
    for kind, prefix, names in (
        ("train", "", ("loss", "lr", "grad_norm", "step_ms", "tokens")),
        ("eval", "val_loss.", ("loss", "bits_per_byte", "seen_tokens")),
    ):
        lines = {event["step"]: event for event in events(run) if event["event"] == kind}
        for name in names:
            column = columns[prefix + name]
            assert {int(step): column[step] for step in np.flatnonzero(np.isfinite(column))} == {
                step: event[name] for step, event in lines.items()
            }
    assert columns["skipped"][1:].tolist() == [0.0] * 12 and np.isnan(columns["skipped"][0])


def test_a_figure_shows_the_recorded_values(run: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure = api.plot(str(run))
    lines = [list(line.get_ydata()) for axes in figure.axes for line in axes.lines]
    train, val = ([e for e in events(run) if e["event"] == kind] for kind in ("train", "eval"))
    for drawn in ([e["loss"] for e in train], [e["loss"] for e in val], [e["lr"] for e in train]):
        assert drawn in lines
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    (axes,) = api.plot(run, panels="grad_norm").axes
    assert [e["grad_norm"] for e in train] in [list(line.get_ydata()) for line in axes.lines]
    assert len(api.plot([run, run], panels=["loss", "step_ms"]).axes) == 2
    assert dict(matplotlib.rcParams) == before
    assert not (run / "report.html").exists(), "nothing is written"
    with pytest.raises(api.UsageError, match="did you mean 'loss'"):
        api.plot(run, panels="los")


def test_a_report_says_what_it_wrote(run: Path, tmp_path: Path) -> None:
    paths = api.report([str(run)], str(tmp_path / "page.html"))
    assert [path.name for path in paths] == ["page.html", "page.png", "page.md"] and all(map(Path.is_file, paths))


def test_evaluation_is_that_of_the_command(model: api.Model, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    told = {"data": tiny_data, "val_tokens": 512}
    found = [api.evaluate(one, "val_loss", **told) for one in (model, run, str(run))]
    out = tmp_path / "out.json"
    assert main(["evaluate", str(run), "--data", str(tiny_data), "--val-tokens", "512", "--out", str(out)]) == 0
    expected = json.loads(out.read_text())["results"]["val_loss"]["loss"]
    assert {one["val_loss"]["loss"] for one in found} == {expected}
    in_the_run = [event for event in events(run) if event["event"] == "eval"][-1]["loss"]
    assert expected == pytest.approx(in_the_run, rel=1e-6)  # fp32, in other batches


def test_what_was_changed_in_a_module_is_what_is_measured(run: Path, tiny_data: Path, capsys: Any) -> None:
    changed = api.load(run)
    with torch.no_grad():
        for parameter in changed.module.parameters():
            parameter.zero_()
    capsys.readouterr()
    assert api.evaluate(changed, data=tiny_data)["val_loss"]["loss"] == pytest.approx(np.log(257), rel=1e-6)
    assert capsys.readouterr().out == ""
    with pytest.raises(api.UsageError, match="device belongs to load"):
        api.evaluate(changed, data=tiny_data, device="cpu")


def test_two_runs_in_one_process_do_not_meet(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Dropout is on, and between them somebody draws random numbers."""
    torch.manual_seed(5)
    again = api.train(RECIPE, run=tmp_path / "again", data=tiny_data)
    losses = [[e["loss"] for e in events(folder) if e["event"] == "train"] for folder in (run, again.run)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@contextmanager
def unchanged() -> Iterator[None]:
    def state() -> Any:
        kept = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")}
        matmuls: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        precision: list[Any] = [one.fp32_precision for one in matmuls]
        with suppress(RuntimeError):  # torch names none where one backend alone was set
            precision.append(torch.get_float32_matmul_precision())
        handlers = {name: signal.getsignal(number) for name, number in kept.items()}
        deterministic = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        streams = (sys.stdout, sys.stderr, torch.distributed.is_initialized(), torch.get_num_threads())
        return precision, handlers, deterministic, streams, torch.get_rng_state().tolist()

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("setting", ["high", "highest", "one backend"])
def test_torch_and_signals_are_left_as_they_were(
    model: api.Model, tiny_data: Path, tmp_path: Path, setting: str
) -> None:
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    if setting == "one backend":
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # type: ignore[attr-defined]
    else:
        torch.set_float32_matmul_precision(setting)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with unchanged():
            api.train(RECIPE, run=tmp_path / "run", data=tiny_data, max_steps=2, precision="fp32")
        with unchanged():
            api.load(tmp_path / "run").generate("a", 3)
        with unchanged():
            api.evaluate(model, data=tiny_data)
        with unchanged(), pytest.raises(api.UsageError):
            api.train(RECIPE, run=tmp_path / "other", data=tiny_data, max_steps=2, precision="fp16")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, handler)


def test_a_result_does_not_depend_on_the_precision_that_was_set(model: api.Model) -> None:
    before = model.logits([1, 2, 3])
    torch.set_float32_matmul_precision("medium")
    with settings_kept():
        assert torch.get_float32_matmul_precision() == "highest", "as in a new process"
    assert torch.equal(model.logits([1, 2, 3]), before) and torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_step": 3}, "did you mean 'max_steps'"),
        ({"optim.lrr": 3}, "did you mean 'lr'"),
        ({"optim": {"lr": "fast"}}, "optim.lr = 'fast' is a str, expected float"),
        ({"deterministic": 1}, "expected bool"),
        ({"precision": "fp8"}, "must be one of"),
        ({"run": ""}, "needs a run folder"),
    ],
    ids=str,
)
def test_a_wrong_option_of_a_run_is_named(options: dict[str, Any], said: str, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match=re.escape(said)):
        api.train(RECIPE, **{"run": tmp_path / "run", "data": tiny_data, **options})
    assert not (tmp_path / "run").exists()


def test_options_of_a_run_may_be_nested_or_dotted(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(api, "train_run", seen.append)
    common: dict[str, Any] = {"max_steps": 20, "data": tiny_data}
    api.train(str(tiny_recipe), optim={"lr": 1e-4, "betas": [0.9, 0.99]}, **common)
    api.train(tiny_recipe, **{"optim.lr": 1e-4, "optim.betas": (0.9, 0.99)}, **common)
    api.train(tiny_recipe, **{"model.architecture": "modern", "model.n_layer": 3, "model.qk_norm": False}, **common)
    api.train(tiny_recipe, mix=[f"{tiny_data}=1", f"{tmp_path}=2"])
    assert seen[0] == seen[1] and seen[0].optim.lr == 1e-4 and seen[0].optim.betas == (0.9, 0.99)
    assert (seen[0].run, seen[0].data, seen[0].max_steps) == ("runs/tiny", str(tiny_data), 20)
    assert (seen[0].model.n_embd, seen[0].schedule.warmup_steps) == (32, 4), "the rest is the recipe's"
    assert (seen[2].model.architecture, seen[2].model.n_layer, seen[2].model.n_embd) == ("modern", 3, 32)
    assert seen[3].data == "" and len(seen[3].mix) == 2


def test_prepared_folders_are_those_of_the_command(tmp_path: Path, regpt2: Run) -> None:
    (tmp_path / "text").mkdir()
    for n in range(30):
        (tmp_path / f"text/{n}.txt").write_text(f"{TEXT} {n}" * (1 + n % 3))
    options = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 1, "min_chars": 95}
    manifest = api.prepare(str(tmp_path / "text"), str(tmp_path / "ours"), **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = regpt2("prepare", "text_files", "--input", tmp_path / "text", "--out", tmp_path / "theirs", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours/manifest.json").read_bytes() == (tmp_path / "theirs/manifest.json").read_bytes()
    assert manifest.skipped and manifest.splits["train"].tokens > 1000
    with pytest.raises(api.UsageError, match="did you mean 'tokenizer'"):
        api.prepare("text", tmp_path / "x", tokeniser="bytes")
    with pytest.raises(api.UsageError, match=r"filters\.min_chars"):
        api.prepare("text", tmp_path / "x", min_chars="a few")


def test_out_of_memory_is_a_problem_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(api, "train_run", fails)
    with pytest.raises(api.Problem, match=r"lower --batch\.micro-batch"):
        api.train(RECIPE, run=tmp_path)


def python(code: str, folder: Path, **environment: str) -> SimpleNamespace:
    (folder / "script.py").write_text(code)
    source = {"PYTHONPATH": str(ROOT / "src"), "PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr)


@pytest.mark.process
def test_the_package_loads_nothing_before_a_name_is_used_and_then_all(tmp_path: Path) -> None:
    done = python(
        """
import sys, regpt2
print(sorted({"torch", "numpy", "tyro", "matplotlib", "regpt2.api"} & set(sys.modules)))
print(sorted(set(regpt2.__all__) - set(dir(regpt2))))
try: regpt2.trian
except AttributeError as error: print(error, error.name, error.obj is regpt2)
print(callable(regpt2.train), regpt2.UsageError.__name__, "matplotlib.pyplot" in sys.modules)
from regpt2 import *
from regpt2 import api
print(set(api.__all__) ^ set(regpt2.__all__), all(globals()[name] is getattr(api, name) for name in api.__all__))
""",
        tmp_path,
    )
    assert done.out.splitlines() == [
        "[]", "[]", "module 'regpt2' has no attribute 'trian' trian True", "True UsageError False", "set() True",
    ]  # fmt: skip


def test_no_part_of_the_package_hides_a_name_of_the_door() -> None:
    parts = {path.stem for path in (ROOT / "src/regpt2").iterdir()}
    assert not parts & set(api.__all__)


@pytest.mark.process
def test_the_page_runs_as_it_is_written(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S))
    assert code.count("regpt2.") > 8
    (tmp_path / "my_text").mkdir()
    for n in range(60):
        (tmp_path / f"my_text/{n}.txt").write_text(f"{TEXT} {n} " * 40)
    done = python(code, tmp_path)
    assert "Once upon a time" in done.out and (tmp_path / "loss.png").stat().st_size > 10_000
    (start,) = [event for event in events(tmp_path / "runs/mine") if event["event"] == "run"]
    assert start["command"] == "python script.py"


def test_no_page_teaches_a_deep_import() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    deep = [(page.name, line) for page in pages for line in page.read_text().splitlines() if "from regpt2." in line]
    assert not deep


@pytest.mark.slow  # the checker reads torch
@pytest.mark.process
def test_a_strict_type_checker_sees_through_the_door(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        """from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import regpt2

model = regpt2.load("runs/demo", device="cpu")
assert_type(model, regpt2.Model)
assert_type(model.generate("a", 3), str)
assert_type(model.generate(["a", "b"], temperature=0.5), list[str])
assert_type(model.logits([1, 2]), Tensor)
assert_type(model.score("a").bits_per_byte, float)
assert_type(regpt2.train("demo", max_steps=3), regpt2.Summary)
assert_type(regpt2.prepare("a", Path("b")).splits["train"].tokens, int)
assert_type(regpt2.read_record("a"), dict[str, NDArray[np.float64]])
assert_type(regpt2.report(["a", "b"]), list[Path])
regpt2.evaluate(model, evals=["hellaswag"]).failed["x"].upper()
regpt2.plot("a").savefig("b")
regpt2.nonsense
model.generate(3)
regpt2.load("a", dtype="fp8")
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache/user"), "user.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    wrong = re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)
    assert wrong == [("22", "attr-defined"), ("23", "type-var"), ("24", "arg-type")], done.stdout + done.stderr
