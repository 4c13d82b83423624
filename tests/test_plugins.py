"""Entries from outside: the examples of CONTRIBUTING run for real; what is wrong with a plugin is one line."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Run, shard_tokens
from regpt2.base import shelves
from regpt2.base.errors import ConfigError, UsageError
from regpt2.config.recipe_files import defaults_for
from regpt2.config.run import EvalConfig
from regpt2.config.toml_file import read_toml, to_toml
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.architecture import build_model
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig

pytestmark = pytest.mark.seconds
PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"\*\*(\w+)\.py\*\*: (.*?)\n\n```python\n(.*?)```", PAGE, re.DOTALL)
OPTIM = 'SHELF = "optim"\ndef build(named_parameters, config, world, compiled): ...\n'


@pytest.fixture(autouse=True)
def no_plugin_stays() -> Iterator[None]:
    yield
    shelves.use_plugins([])


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """The files of the page."""
    for name, _, code in EXAMPLES:
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


def test_the_page_has_an_example_for_every_kind_of_entry() -> None:
    said = {re.search(r'^SHELF = "(\w+)"', code, re.MULTILINE)[1] for _, _, code in EXAMPLES}  # type: ignore[index]
    assert said == {"optim", "evals", "datasets", "weights", "architectures"}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in EXAMPLES])
def test_the_commands_of_the_page_have_options_that_exist(name: str, text: str, examples: Path, regpt2: Run) -> None:
    commands = re.findall(r"`regpt2 ([^`]+)`", text)
    assert commands
    for command in commands:
        words = shlex.split(command)
        shown = regpt2(*words, "--help")
        assert shown.returncode == 0, shown.stderr
        for option in (word for word in words if word.startswith("--") and word != "--plugin"):
            assert option in shown.stdout, command


def train(regpt2: Run, recipe: Path, data: Path, *options: object, code: int = 0) -> str:
    """Train a tiny model in ./run; returns what was said on standard error."""
    done = regpt2("train", recipe, "--data", data, "--run", "run", "--sample-every", 0, *options)
    assert done.returncode == code, done.stderr
    return done.stderr


def runs(folder: Path) -> list[dict[str, object]]:
    events = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "run"]


def test_an_optimizer_trains_is_recorded_and_is_missed(
    examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    own = "--plugin", "sign_sgd.py", "--optim.name", "sign_sgd", "--optim.sign-sgd.shrink", 0.5
    train(regpt2, tiny_recipe, tiny_data, *own, "--max-steps", 1, "--save-every", 1)
    before, after = build_model(read_toml(examples / "run/config.toml").model, seed=1337), load_model("run").model
    moved = [(after.get_parameter(name) - p).abs().detach() for name, p in before.named_parameters()]
    rate = 3e-3 / 4  # the first of four steps of warm-up
    assert max(float(step.max()) for step in moved) == pytest.approx(0.5 * rate, rel=1e-3)
    plugin = examples / "sign_sgd.py"
    digest = hashlib.sha256(plugin.read_bytes()).hexdigest()
    assert runs(examples)[0]["plugins"] == {"optim/sign_sgd": {"file": str(plugin), "sha256": digest}}
    assert "[optim.sign_sgd]\nshrink = 0.5\n" in (examples / "run/config.toml").read_text()

    said = train(regpt2, examples / "run/config.toml", tiny_data, "--max-steps", 3, code=2)
    assert re.fullmatch(r"regpt2: .*/run/config.toml: optim: there is no 'sign_sgd'.*--plugin FILE.py\.\n", said)
    said = train(regpt2, tiny_recipe, tiny_data, "--max-steps", 3, code=2)  # the recipe's own optimizer is another run
    assert "there is no 'sign_sgd'" in said and said.count("\n") == 1
    train(regpt2, examples / "run/config.toml", tiny_data, "--plugin", "sign_sgd.py", "--max-steps", 2)
    plugin.write_text(plugin.read_text() + "\n# another\n")
    said = train(regpt2, examples / "run/config.toml", tiny_data, "--plugin", "sign_sgd.py", "--max-steps", 3)
    assert "optim/sign_sgd" in said and "has changed since this run began" in said
    assert [run["step"] for run in runs(examples)] == [0, 1, 2]


def test_a_run_without_plugins_says_nothing_of_them(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    train(regpt2, tiny_recipe, tiny_data, "--max-steps", 1)
    assert "plugins" not in runs(tmp_path)[0]
    assert type(defaults_for("demo", []).optim) is OptimConfig and type(defaults_for("demo", []).evals) is EvalConfig


def test_no_code_runs_but_by_plugin(examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run) -> None:
    own = "--optim.name", "sign_sgd", "--evals.names", "val_loss", "vowels"
    train(regpt2, tiny_recipe, tiny_data, "--plugin", "sign_sgd.py", "--plugin", "vowels.py", *own, "--max-steps", 4)
    for name, _, _ in EXAMPLES:
        (examples / f"{name}.py").write_text("open('it_ran', 'w').close()\n")
    for command in (
        ("sample", "run", "a"),
        ("report", "run"),
        ("evaluate", "run", "--data", tiny_data),
    ):
        assert regpt2(*command).returncode == 0, command
    train(regpt2, examples / "run/config.toml", tiny_data, code=2)
    assert not (examples / "it_ran").exists()


def test_an_evaluation_measures_a_model_and_a_run(
    examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    own = "--plugin", "vowels.py", "--evals.names", "val_loss", "vowels", "--evals.vowels.prompt", "b"
    train(regpt2, tiny_recipe, tiny_data, *own, "--max-steps", 4)
    model, bytes_of = load_model("run").model, load_tokenizer("bytes")

    def share(prompt: str) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([bytes_of.encode(prompt)]))[0, -1]
        return float(
            torch.tensor([logits[ord(vowel)] for vowel in "aeiou"]).logsumexp(0).sub(logits.logsumexp(0)).exp()
        )

    events = map(json.loads, (examples / "run/metrics.jsonl").read_text().splitlines())
    recorded = [event["share"] for event in events if event.get("eval") == "vowels"]
    assert recorded[-1] == pytest.approx(share("b"), rel=1e-4)
    done = regpt2(
        "evaluate", "run", "--plugin", "vowels.py", "--evals", "vowels", "--vowels.prompt", "xy", "--out", "o.json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((examples / "o.json").read_text())["results"]["vowels"]
    assert found["share"] == pytest.approx(share("xy"), rel=1e-4) and found["options"] == {"prompt": "xy"}


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_is_prepared_by_workers(workers: int, examples: Path, regpt2: Run) -> None:
    command = (
        "prepare",
        "counting",
        "--plugin",
        "counting.py",
        "--tokenizer",
        "bytes",
        "--out",
        "data",
        "--workers",
        workers,
    )
    done = regpt2(*command, "--counting.up-to", 50)
    assert done.returncode == 0, done.stderr
    ids = shard_tokens(examples / "data", "train") + shard_tokens(examples / "data", "val")
    text = bytes(id if id < 256 else 10 for id in ids)  # the end of a text as a line's
    assert sorted(text.split(b"\n")[1:]) == sorted(2 * [b"number %d" % n for n in range(50)])
    assert regpt2(*command, "--counting.up-to", 50).returncode == 0
    again = regpt2(*command)
    assert again.returncode == 2 and "its counting.up_to is '50', this command's is '1000'" in again.stderr


def test_weights_are_written_and_read(examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run) -> None:
    train(regpt2, tiny_recipe, tiny_data, "--max-steps", 4)
    done = regpt2("convert", "run", "w.plain", "--plugin", "plain.py", "--to", "plain")
    assert done.returncode == 0 and "every weight is the same" in done.stdout, done.stderr
    assert regpt2("sample", "w.plain", "a", "--plugin", "plain.py").returncode == 0
    assert regpt2("sample", "w.plain", "a").returncode == 1  # nobody else knows the file


def test_a_variant_of_the_model_keeps_its_own_forward(
    examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    own = "--plugin", "narrow.py", "--model.architecture", "narrow", "--model.factor", 0.7
    train(regpt2, tiny_recipe, tiny_data, *own, "--max-steps", 3, "--save-every", 3)
    model = load_model("run").model
    plain = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), 0.7 * plain.eval()(ids))
    done = regpt2("evaluate", "run", "--plugin", "narrow.py", "--data", tiny_data, "--out", "o.json")
    assert done.returncode == 0, done.stderr
    events = map(json.loads, (examples / "run/metrics.jsonl").read_text().splitlines())
    recorded = [event["loss"] for event in events if event.get("eval") == "val_loss"][-1]
    assert recorded == pytest.approx(
        json.loads((examples / "o.json").read_text())["results"]["val_loss"]["loss"], rel=1e-3
    )
    missing = regpt2("sample", "run", "a")
    assert missing.returncode == 2
    assert re.fullmatch(r"regpt2: run/.*/config.json: architectures: there is no 'narrow'.*FILE.py\.\n", missing.stderr)


@pytest.mark.process
def test_the_runs_of_a_comparison_have_the_plugins_too(
    examples: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    arms = f"own={tiny_recipe} --optim.name sign_sgd", f"usual={tiny_recipe}"
    own = "--seeds", 1, "--out", "cmp", "--plugin", "sign_sgd.py", "--", "--data", tiny_data, "--max-steps", 6
    done = regpt2("compare", *arms, *own)
    assert done.returncode == 0, done.stderr + (examples / "cmp/own/seed-1/train.log").read_text()
    assert "--plugin" in json.loads((examples / "cmp/compare.json").read_text())["plan"]["command"]


FAULTS = {
    "SyntaxError": ("def build(:\n", r"cannot be imported: SyntaxError: invalid syntax \(mine.py, line 1\)"),
    "ImportError": ("import nothing_like_it\n", r"No module named 'nothing_like_it' \(mine.py, line 1\)"),
    "exit": ("import sys; sys.exit(0)\n", "cannot be imported: SystemExit"),
    "no shelf": ("x = 1\n", "no line SHELF = .*'datasets', .*'optim'"),
    "wrong shelf": ('SHELF = "optm"\n', "SHELF = 'optm', expected one of"),
    "unhashable": ("SHELF = []\n", r"SHELF = \[\], expected one of"),
    "no name": (OPTIM.replace("build", "biuld"), r"`build\(named_parameters, .*this one has none. It has biuld"),
    "arguments": (OPTIM.replace("config, ", ""), r"needs `build\(.*has build\(named_parameters, world, compiled\)"),
    "not callable": ('SHELF = "optim"\nbuild = 3\n', "has 3, which cannot be called"),
    "wrong type": ('SHELF = "evals"\nPROTOCOLS = 1\ndef evaluate(context): ...\n', "`PROTOCOLS: dict`; this one has 1"),
    "optional": (OPTIM + "IGNORES = 'eps'\n", "needs `IGNORES: tuple`"),
    "by half": ('SHELF = "weights"\ndef read(path): ...\n', r"needs `matches\(path\) -> bool`"),
    "other half": ('SHELF = "datasets"\nDESCRIPTION = "x"\n', r"needs `plan\(source\) -> Plan`"),
    "class": ('SHELF = "architectures"\nclass Config: ...\nclass Model: ...\n', "needs `Config: GPTConfig`"),
    "options": (OPTIM + "class Options: ...\n", "`Options` must be a dataclass whose fields all have defaults"),
    "no default": (
        OPTIM + "import dataclasses\n@dataclasses.dataclass\nclass Options:\n    a: int\n",
        "`Options` must be a dataclass whose fields all have defaults",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_plugin_is_one_line(fault: str, tmp_path: Path, regpt2: Run) -> None:
    text, expected = FAULTS[fault]
    (tmp_path / "mine.py").write_text(text)
    done = regpt2("doctor", "--plugin", "mine.py", "--help")
    assert done.returncode == 2
    assert re.search(expected, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "mine.py") in done.stderr
    with pytest.raises(UsageError):
        regpt2("doctor", "--plugin", "mine.py", "--debug")


def test_names_are_taken_once(tmp_path: Path, regpt2: Run) -> None:
    for name in ("lion", "mine", "other/mine", "my-lion"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(OPTIM)
    (tmp_path / "limit.py").write_text(
        'SHELF = "evals"\nfrom dataclasses import dataclass\n@dataclass\nclass Options:\n    a: int = 1\n'
        "def evaluate(context): ...\nPROTOCOLS = {}\n"
    )
    for files, expected in (
        (("lion.py",), "lion.py: optim has 'lion' already; rename the file"),
        (("mine.py", "other/mine.py"), "other/mine.py: optim has 'mine' already"),
        (("my-lion.py",), "must be called NAME.py"),
        (("none.py",), "none.py: there is no such file"),
        (("other",), "other: there is no such file"),
        (("",), "--plugin needs a file"),
    ):
        done = regpt2("plan", "demo", *(f"--plugin={file}" for file in files))
        assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert regpt2("plan", "--plugin").returncode == 2
    assert regpt2("plan", "demo", *2 * ["--plugin", "mine.py"]).returncode == 0  # the same one
    clash = regpt2("evaluate", "run", "--plugin", "limit.py", "--evals", "limit")
    assert clash.returncode == 2 and "'limit' is an option already; rename the entry" in clash.stderr


def test_an_architecture_says_its_own_name(tmp_path: Path, regpt2: Run) -> None:
    text = 'SHELF = "architectures"\nfrom regpt2.model.gpt import GPT as Model, GPTConfig as Config\n'
    (tmp_path / "mine.py").write_text(text)
    done = regpt2("plan", "demo", "--plugin", "mine.py", "--model.architecture", "mine")
    assert done.returncode == 2 and "mine.py: Config.architecture = 'gpt2' must be 'mine'" in done.stderr


def test_options_survive_a_recipe_and_leave_with_their_entry(examples: Path, tiny_recipe: Path) -> None:
    shelves.use_plugins([str(examples / "sign_sgd.py"), str(examples / "vowels.py")])
    words = ["--optim.name=sign_sgd", "--evals.names", "vowels", "--seed", "3"]
    config = defaults_for(str(tiny_recipe), words)
    optim, evals = replace(config.optim, name="sign_sgd"), replace(config.evals, names=("vowels",))
    chosen = replace(config, run="r", optim=optim, evals=evals)
    (examples / "again.toml").write_text(to_toml(chosen))
    assert read_toml(examples / "again.toml") == chosen
    plain = defaults_for(str(examples / "again.toml"), ["--optim.name", "adamw", "--evals.names", "val_loss"])
    assert type(plain.optim) is OptimConfig and type(plain.evals) is EvalConfig
    (examples / "again.toml").write_text(to_toml(chosen).replace("shrink = 1.0", "shrnk = 1.0"))
    with pytest.raises(ConfigError, match=r"unknown key 'optim.sign_sgd.shrnk'; did you mean 'shrink'"):
        read_toml(examples / "again.toml")


def install(folder: Path, line: str, code: str) -> None:
    """A package with one entry point, as pip leaves it."""
    (folder / "its-1.0.dist-info").mkdir()
    (folder / "its-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: its\nVersion: 1.0\n")
    (folder / "its-1.0.dist-info/entry_points.txt").write_text(line)
    (folder / f"its_{folder.name}.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    shelves._installed.cache_clear()
    yield tmp_path
    shelves._installed.cache_clear()


def test_an_installed_package_adds_an_entry(site: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run) -> None:
    code = next(code for name, _, code in EXAMPLES if name == "sign_sgd")
    install(site, f"[regpt2.optim]\ntheirs = its_{site.name}\n", code)
    assert shelves.entries("training.optim") == ["theirs", "adamw", "lion", "muon"]
    train(regpt2, tiny_recipe, tiny_data, "--optim.name", "theirs", "--optim.theirs.shrink", 0.5, "--max-steps", 3)
    assert list(runs(site)[0]["plugins"]) == ["optim/theirs"]  # type: ignore[call-overload]
    (site / "theirs.py").write_text(OPTIM)
    with pytest.raises(UsageError, match="has 'theirs' already"):
        shelves.use_plugins([str(site / "theirs.py")])


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("lion = its", OPTIM, "of the package its: optim has 'lion' already; uninstall that package"),
        ("theirs = its", "import nothing_like_it", "of the package its cannot be imported: ModuleNotFoundError"),
        ("theirs = its", "x = 1", r"theirs = its_\w+ of the package its: an entry of optim needs `build"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_message(site: Path, line: str, code: str, expected: str) -> None:
    install(site, f"[regpt2.optim]\n{line}_{site.name}\n", code)
    with pytest.raises(UsageError, match=expected):
        shelves.load("training.optim", "theirs")


@pytest.mark.parametrize("shelf", shelves.SHELVES)
def test_every_name_of_a_contract_is_required(shelf: str, tmp_path: Path) -> None:
    """A built-in entry as a plugin is one; without a name of its contract it is none."""
    built_in = {"data.datasets": "text_files", "model.weights": "native", "evals": "ptb", "training.optim": "lion"}
    entry = f"regpt2.{shelf}.{built_in.get(shelf) or shelves.entries(shelf)[0]}"
    contract = __import__(f"regpt2.{shelf}", fromlist=["CONTRACT"]).CONTRACT
    name = entry.rsplit(".", 1)[1]
    head = f'from {entry} import *\nSHELF = "{shelves.kind_of(shelf)}"\n'
    (tmp_path / f"my_{name}.py").write_text(head)
    shelves.use_plugins([str(tmp_path / f"my_{name}.py")])
    for number, missing in enumerate({**contract.required, **contract.ways[0]}):
        path = tmp_path / f"less_{number}.py"
        path.write_text(f"{head}del {missing}\n")
        with pytest.raises(UsageError, match=f"needs `{missing}"):
            shelves.use_plugins([str(path)])
