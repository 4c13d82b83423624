"""Trained on shorter sequences than the model can take: the run says so, and nothing looks beyond unless told to."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_RECIPE
from regpt2 import cli
from regpt2.base.errors import CheckpointError
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.modern import ModernGPT
from regpt2.model.weights import native, safetensors
from regpt2.run import loop as train_module
from regpt2.sampling.twins.cpu import PackedGPT, TransposedLinear

RECIPE = (
    TINY_RECIPE.replace("seq_len = 32", "seq_len = 16")
    .replace("max_new_tokens = 8", "max_new_tokens = 40")
    .replace("max_steps = 12", "max_steps = 2")
)
RECIPES = {"gpt2": RECIPE, "modern": RECIPE.replace("dropout = 0.1", 'architecture = "modern"')}


def watched(patch: pytest.MonkeyPatch) -> list[int]:
    """Up to which position each pass through a model goes."""
    seen: list[int] = []

    def looking(kind: Any) -> Any:
        hidden = kind.hidden

        def looked(self: Any, ids: torch.Tensor, caches: Any = None, position: int = 0, dtype: Any = None) -> Any:
            seen.append(position + ids.shape[1])
            return hidden(self, ids, caches, position, dtype)

        return looked

    for kind in (GPT, ModernGPT):
        patch.setattr(kind, "hidden", looking(kind))
    return seen


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watched(monkeypatch)


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run that is evaluated on longer text than it trains on, and samples more."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tiny.toml").write_text(RECIPES[request.param])
    (folder / "long.jsonl").write_text(json.dumps({"text": "the cat and the dog and the bird saw the cat"}) + "\n")
    config = load_recipe(str(folder / "tiny.toml"))
    evals = dataclasses.replace(
        config.evals, names=("val_loss", "lambada"), files=(f"lambada={folder / 'long.jsonl'}",)
    )
    config = dataclasses.replace(config, data=str(tiny_data), run=str(folder / "run"), evals=evals, sample_every=2)
    with pytest.MonkeyPatch.context() as patch:
        found = watched(patch)
        train_module.train(config)
    assert max(found) == 16
    return folder / "run"


def test_the_start_of_the_run_names_the_positions_and_the_mend(run: Path) -> None:
    events = list(read_events(run / "metrics.jsonl"))
    (note,) = [event["text"] for event in events if event["event"] == "note" and "positions" in event["text"]]
    assert note.startswith("positions 16 to 31 of the model are never trained")
    assert "--batch.seq-len 32" in note and "--model.block-size 16" in note
    assert {event.get("eval") for event in events if event["event"] == "eval"} == {"val_loss", "lambada"}
    assert [event["step"] for event in events if event["event"] == "sample"] == [2]


def test_the_checkpoint_says_how_long_its_sequences_were(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert json.loads((checkpoint / "config.json").read_text())["trained_seq_len"] == 16
    model = load_model(run).model
    assert (model.context_size, model.config.block_size) == (16, 32)


def test_evaluate_goes_as_far_as_training_unless_told_to_go_on(
    run: Path, tiny_data: Path, longest: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", str(run), "--evals", "val_loss", "lambada", "--data", str(tiny_data), "--val-tokens", "64"]
    given += ["--files", f"lambada={run.parent / 'long.jsonl'}", "--out", str(run.parent / "results.json")]
    assert cli.main(given) == 0
    assert max(longest) == 16
    assert "was trained on sequences of 16 tokens: the windows have 16 tokens" in capsys.readouterr().err
    assert json.loads((run.parent / "results.json").read_text())["seq_len"] == 16
    assert cli.main([*given, "--seq-len", "32"]) == 0
    assert max(longest) == 32
    assert "the positions after that are untrained" in capsys.readouterr().err


def test_sample_goes_as_far_as_training_unless_told_to_go_on(
    run: Path, longest: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", str(run), "abc", "--seed", "3"]) == 0
    assert max(longest) == 15, "the last of 16 tokens is drawn, not read"
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["sample", str(run), "abc", "--max-new-tokens", "14"]) == 2
    said = capsys.readouterr().err
    assert (
        "a prompt of 3 tokens plus 14 to write is 17 tokens, and the model was trained on windows of 16" in said
        and "--context" in said
    )
    assert cli.main(["sample", str(run), "a" * 16]) == 2
    assert cli.main(["sample", str(run), "abc", "--max-new-tokens", "14", "--context", "33"]) == 2
    assert "context = 33 must be from 2 to the model's block_size, 32" in capsys.readouterr().err
    longest.clear()
    assert cli.main(["sample", str(run), "a" * 17, "--max-new-tokens", "15", "--context", "32"]) == 0
    assert max(longest) > 16
    assert "later positions are untrained" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("to", ["huggingface", "native", "safetensors"])
def test_convert_names_the_positions_and_our_own_formats_keep_them(
    run: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "huggingface" and isinstance(load_model(run).model, ModernGPT):
        pytest.skip("that format holds GPT-2 alone")
    assert cli.main(["convert", str(run), str(tmp_path / "copy"), "--to", to]) == 0
    assert "positions 16 to 31 were never trained" in capsys.readouterr().out
    assert load_model(tmp_path / "copy").model.context_size == (32 if to == "huggingface" else 16)


def test_a_model_that_does_not_say_it_was_trained_on_all_of_its_block(tmp_path: Path) -> None:
    """As files from before, and of other formats."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257))
    native.write(model, tmp_path, None)
    assert "trained_seq_len" not in (tmp_path / "config.json").read_text()
    assert load_model(tmp_path).model.context_size == 64
    model.trained_seq_len = 48
    native.write(model, tmp_path, None)
    safetensors.write(model, tmp_path / "one.safetensors", None)
    assert load_model(tmp_path).model.context_size == load_model(tmp_path / "one.safetensors").model.context_size == 48
    assert PackedGPT(model, TransposedLinear).context_size == 48, "nor does a twin for inference forget it"


@pytest.mark.parametrize("wrong", [0, 65, "16", 1.5, True, None])
def test_an_impossible_length_is_refused(tmp_path: Path, wrong: Any) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257))
    native.write(model, tmp_path, None)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "trained_seq_len": wrong}))
    if wrong is None:
        assert load_model(tmp_path).model.context_size == 64
        return
    with pytest.raises(CheckpointError, match=r"config.json: trained_seq_len = .* must be from 1 to .* 64"):
        load_model(tmp_path)


def test_where_every_position_is_trained_nothing_is_said(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE.replace("max_steps = 12", "max_steps = 1"))
    config = load_recipe(str(tmp_path / "tiny.toml"))
    train_module.train(dataclasses.replace(config, data=str(tiny_data), run=str(tmp_path / "run")))
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "copy"), "--to", "native"]) == 0
    assert cli.main(["evaluate", str(tmp_path / "copy"), "--data", str(tiny_data), "--val-tokens", "64"]) == 0
    assert "trained" not in "".join(capsys.readouterr())
