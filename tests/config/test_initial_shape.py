"""The shape of a run that begins from a model: taken from there, and every word against it is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RECIPE, Run
from regpt2.base.errors import ConfigError
from regpt2.config.recipe_files import configured, defaults_for, load_recipe
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import to_toml
from regpt2.model.files import load
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.model.weights import native

SHAPE = GPTConfig(n_layer=1, n_head=5, n_embd=20, block_size=48, vocab_size=300, dropout=0.3)
WITHOUT_MODEL = TINY_RECIPE[: TINY_RECIPE.index("[model]")] + TINY_RECIPE[TINY_RECIPE.index("[batch]") :]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    native.write(GPT(SHAPE), folder, None)
    return folder


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modern")
    native.write(ModernGPT(ModernConfig(n_layer=1, n_head=2, n_embd=16, block_size=48, vocab_size=300)), folder, None)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A recipe that states nothing of the model."""
    (tmp_path / "bare.toml").write_text(WITHOUT_MODEL)
    return tmp_path / "bare.toml"


def test_the_shape_is_the_model_s_and_dropout_and_padding_are_the_recipe_s(source: Path, bare: Path) -> None:
    assert configured(str(bare), {"init": ""}).model == GPTConfig()
    found = configured(str(bare), {"init": source})
    assert found.model == dataclasses.replace(SHAPE, dropout=0.0) and found.init == str(source)
    given = configured(str(bare), {"init": source, "model": {"block_size": 32, "dropout": 0.2, "vocab_multiple": 1}})
    assert given.model == dataclasses.replace(SHAPE, block_size=32, dropout=0.2, vocab_multiple=1)
    bare.write_text(f'init = "{source}"\n' + WITHOUT_MODEL + "\n[model]\nn_head = 5\nblock_size = 40\n")
    assert load_recipe(str(bare)).model == dataclasses.replace(SHAPE, dropout=0.0, block_size=40)


def test_the_command_line_and_python_find_the_same_shape(source: Path, bare: Path, tmp_path: Path, regpt2: Run) -> None:
    def planned(*options: object) -> Any:
        done = regpt2("plan", bare, "--init", source, "--json", tmp_path / "plan.json", *options)
        assert not done.stderr, done.stderr
        return json.loads((tmp_path / "plan.json").read_text())

    def n_weights(model: dict[str, Any]) -> int:
        return sum(p.numel() for p in GPT(configured(str(bare), {"init": source, "model": model}).model).parameters())

    whole, cropped = planned(), planned("--model.block-size=40", "--model.dropout", 0.1)
    assert whole["memory"]["parts"]["weights"] == 4 * n_weights({})
    assert cropped["memory"]["parts"]["weights"] == 4 * n_weights({"block_size": 40})


def test_a_length_that_nobody_stated_is_what_the_model_can_take(source: Path) -> None:
    tokens = {"batch_tokens": 96, "micro_batch": 1}
    assert configured({"init": source, "run": "r", "batch": tokens}, {}).batch.seq_len == 48
    assert configured({"init": source, "run": "r", "batch": tokens}, {"model.block_size": 24}).batch.seq_len == 24
    assert (
        configured({"init": source, "run": "r", "batch": tokens | {"seq_len": 64}}, {"batch.seq_len": 8}).batch.seq_len
        == 8
    )
    with pytest.raises(ConfigError, match=r"batch.seq_len = 64 is longer than model.block_size = 48"):
        configured({"init": source, "run": "r", "batch": tokens | {"seq_len": 64}}, {})


@pytest.mark.parametrize(
    ("key", "value", "got"),
    [
        ("n_layer", 2, "1"),
        ("n_head", 4, "5"),
        ("n_embd", 40, "20"),
        ("block_size", 49, "48"),
        ("vocab_size", 299, "300"),
        ("activation", "gelu", "'gelu_tanh'"),
        ("architecture", "modern", "'gpt2'"),
        ("n_layer", "two", "1"),
    ],
)
def test_another_shape_is_refused_wherever_it_is_stated(
    key: str, value: Any, got: str, source: Path, bare: Path
) -> None:
    said = rf"model\.{key} = {value!r}, but .*source.* has {got}\. .*leave it out"
    with pytest.raises(ConfigError, match=said):
        configured({"init": str(source), "run": "r", "model": {key: value}}, {})
    if value != "two":  # a wrong type is refused by the parser
        with pytest.raises(ConfigError, match=said):
            configured(str(bare), {"init": source, "model": {key: value}})
    bare.write_text(WITHOUT_MODEL + f"\n[model]\n{key} = {json.dumps(value)}\n")
    with pytest.raises(ConfigError, match=said):
        configured(str(bare), {"init": source})


def test_switches_of_the_modern_model_are_its_own(modern: Path, bare: Path) -> None:
    assert configured(str(bare), {"init": modern, "model": {"document_mask": True}}).model.document_mask  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"model.qk_norm = False, but .* has True"):
        configured(str(bare), {"init": modern, "model": {"qk_norm": False}})
    with pytest.raises(ConfigError, match=r"model.architecture = 'gpt2', but .* has 'modern'"):
        configured(str(bare), {"init": modern, "model": {"architecture": "gpt2"}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--init", "no-such-model"), "MODEL = 'no-such-model' does not exist"),
        (("--init", "hf:../x"), "cannot be a model of the hub"),
        (("--init", "SOURCE", "--model.n-layer", 3), "model.n_layer = 3, but"),
        (("--init=SOURCE", "--model.block-size=64"), "leave it out, or give at most 48"),
        (("--init", "SOURCE", "--model.architecture", "modern"), "model.architecture = 'modern', but"),
        (("--init", "SOURCE", "--model.vocab-size", 257), "model.vocab_size = 257, but"),
        (("--init", "SOURCE", "--model.block-size", 16), "batch.seq_len = 32 is longer than model.block_size = 16"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_one_line(
    options: tuple[object, ...], said: str, source: Path, bare: Path, tmp_path: Path, regpt2: Run
) -> None:
    found = regpt2("train", bare, "--run", "run", *[str(one).replace("SOURCE", str(source)) for one in options])
    assert found.returncode == 2 and said in found.stdout + found.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_that_was_recorded_is_a_recipe_of_the_same_run(source: Path, bare: Path, tmp_path: Path) -> None:
    config = configured(str(bare), {"init": source, "model": {"block_size": 40}})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_recipe(str(tmp_path / "config.toml")) == config


def test_a_look_at_the_shape_does_not_read_the_weights(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "read_tensors", None)
    found = load.peek_model(f"{source}:gelu")
    assert found.config == dataclasses.replace(SHAPE, activation="gelu")
    assert RunConfig().init == ""


def test_an_option_replaces_a_word_of_the_recipe_that_disagrees(source: Path, bare: Path) -> None:
    bare.write_text(WITHOUT_MODEL + "\n[model]\nblock_size = 1024\n")
    assert configured(str(bare), {"init": source, "model": {"block_size": 40}}).model.block_size == 40
    options = ["--init", str(source), "--model.block-size", "40"]
    assert defaults_for(str(bare), options).model.block_size == 48  # the parser then sets 40
