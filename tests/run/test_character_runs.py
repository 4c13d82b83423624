"""nanoGPT's character-level data all the way: train, resume, sample, evaluate, explore, convert; its checkpoints."""

import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_RECIPE
from regpt2.base import shelves
from regpt2.base.errors import CheckpointError, DataError
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.commands.explore import explore
from regpt2.data.characters import CharacterTokenizer
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.sampling.tokenizer import tokenizer_of

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. é\n"
CHARACTERS = "".join(sorted(set(TEXT)))
STOI = {ch: i for i, ch in enumerate(CHARACTERS)}
META = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)), "stoi": STOI}
NANOGPT_FORM = ":gelu"  # of GELU: its models have the exact one
RECIPE = (
    TINY_RECIPE.replace("max_steps = 12", "max_steps = 20")
    .replace("save_every = 4", "save_every = 10")
    .replace("vocab_size = 257", f"vocab_size = {len(CHARACTERS)}")
    .replace('prompt = "a"', 'prompt = ""')
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nanoGPT's data, a recipe, and a run of it."""
    folder = tmp_path_factory.mktemp("characters")
    data = folder / "shakespeare_char"
    data.mkdir()
    ids = np.array([STOI[ch] for ch in TEXT * 40], dtype=np.uint16)
    ids[:2000].tofile(data / "train.bin")
    ids[2000:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps(META))
    (folder / "char.toml").write_text(RECIPE)
    assert main(train_arguments(folder, "run")) == 0
    return folder


def train_arguments(folder: Path, run: str) -> list[str]:
    return ["train", str(folder / "char.toml"), "--data", str(folder / "shakespeare_char"), "--run", str(folder / run)]


def test_a_run_records_characters_and_their_bytes(place: Path) -> None:
    events = list(read_events(place / "run" / "metrics.jsonl"))
    assert [event["tokenizer"] for event in events if event["event"] == "run"] == ["characters"]
    assert any("characters of its meta.pkl" in event["text"] for event in events if event["event"] == "note")
    (final,) = [event for event in events if event["event"] == "eval" and event["step"] == 20]
    targets = (TEXT * 40)[2001 : 2001 + int(final["tokens"])]
    n_bytes = len(targets.encode())
    assert len(targets) < n_bytes, "there is a character of two bytes"
    assert math.isclose(final["bits_per_byte"], final["loss"] / math.log(2) * len(targets) / n_bytes, rel_tol=1e-9)
    texts = [text for event in events if event["event"] == "sample" for text in event["texts"]]
    assert texts and all(text.startswith("\n") and set(text) <= set(CHARACTERS) for text in texts)


def test_a_resumed_run_equals_an_uninterrupted_one(place: Path) -> None:
    shutil.copytree(place / "run", place / "stopped")
    shutil.rmtree(place / "stopped" / "checkpoints" / "step-00000020")
    assert main(train_arguments(place, "stopped")) == 0
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        one, other = (place / run / "checkpoints" / "step-00000020" / name for run in ("run", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_checkpoint_holds_its_characters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = place / "run" / "checkpoints" / "step-00000020"
    assert json.loads((checkpoint / "config.json").read_text())["tokenizer"]["characters"] == CHARACTERS
    capsys.readouterr()
    assert main(["sample", str(place / "run"), "Speak", "--max-new-tokens", "10", "--no-stream"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Speak") and len(text) == len("Speak") + 10 + 1 and set(text) <= set(CHARACTERS)
    assert main(["sample", str(place / "run"), "", "--max-new-tokens", "10"]) == 0
    told = capsys.readouterr()
    assert "this model has no end of text; continuing the empty prompt after '\\n'" in told.err
    assert len(told.out) == 10 + 1
    assert main(["sample", str(place / "run"), "Speak!"]) == 2
    assert "'!', character 6 of the text, is not one of the" in capsys.readouterr().err
    assert main(["explore", str(place / "run")]) == 0
    assert "attention in" in capsys.readouterr().out


def test_evaluate_finds_the_loss_of_the_run(place: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(place / "shakespeare_char"), "--val-tokens", "512", "--out", str(tmp_path / "out.json")]
    assert main(["evaluate", str(place / "run"), *arguments]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]["val_loss"]
    events = read_events(place / "run" / "metrics.jsonl")
    (final,) = [event for event in events if event["event"] == "eval" and event["step"] == 20]
    assert math.isclose(found["loss"], final["loss"], rel_tol=1e-5)  # other batches: another order of sums
    assert math.isclose(found["bits_per_byte"], final["bits_per_byte"], rel_tol=1e-5)


def test_evaluate_refuses_other_characters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "val.bin").write_bytes((place / "shakespeare_char" / "val.bin").read_bytes())
    turned = CHARACTERS[::-1]
    meta = META | {"itos": dict(enumerate(turned)), "stoi": {ch: i for i, ch in enumerate(turned)}}
    (other / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert main(["evaluate", str(place / "run"), "--data", str(other)]) == 1
    assert "prepare the data with the model's tokenizer" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("to", ["native", "nanogpt", "safetensors", "llmc"])
def test_convert_says_where_the_characters_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    run = f"{place / 'run'}{NANOGPT_FORM if to == 'nanogpt' else ''}"
    assert main(["convert", run, str(tmp_path / "out"), "--to", to]) == 0
    said = capsys.readouterr().out
    assert f"Its {len(CHARACTERS)} tokens are characters." in said
    assert ("keep the meta.pkl of its data" in said) == (to == "llmc")
    if to == "nanogpt":
        assert "sample.py reads them from data/characters/meta.pkl" in said
        assert torch.load(tmp_path / "out", weights_only=True)["config"]["dataset"] == "characters"


@pytest.mark.process
@pytest.mark.parametrize("to", ["native", "safetensors", "huggingface", "nanogpt", "gguf"])
def test_an_export_holds_its_characters_or_takes_them_from_meta_pkl(place: Path, tmp_path: Path, to: str) -> None:
    model, tokenizer = load_model(place / "run").model, CharacterTokenizer(CHARACTERS)
    vocabulary = Vocabulary(tokenizer.name, tokenizer.fingerprint, characters=tokenizer.characters)
    out = tmp_path / "out"
    if shelves.load("model.weights", to).FILES:
        out.mkdir()
    shelves.load("model.weights", to).write(model, out, vocabulary)
    loaded = load_model(out)
    if to == "gguf":
        with pytest.raises(CheckpointError, match=r"does not include the characters .*--tokenizer nanoGPT/data"):
            tokenizer_of(loaded)
        assert tokenizer_of(loaded, place / "shakespeare_char").characters == CHARACTERS
    else:
        assert tokenizer_of(loaded).characters == CHARACTERS


@pytest.fixture(scope="module")
def nanogpt(place: Path) -> LoadedModel:
    """A checkpoint as nanoGPT's own train.py writes it: it does not say what its ids are."""
    checkpoint_path = place / "ckpt.pt"
    assert main(["convert", f"{place / 'run'}{NANOGPT_FORM}", str(checkpoint_path), "--to", "nanogpt"]) == 0
    checkpoint = torch.load(checkpoint_path, weights_only=True)
    kept = {"model": checkpoint["model"], "model_args": checkpoint["model_args"]}
    torch.save(kept | {"config": {"dataset": "shakespeare_char"}, "iter_num": 20}, checkpoint_path)
    return load_model(f"{checkpoint_path}{NANOGPT_FORM}")


@pytest.mark.process
def test_characters_of_nanogpts_own_checkpoint_come_from_meta_pkl(
    place: Path, nanogpt: LoadedModel, tmp_path: Path
) -> None:
    data = place / "shakespeare_char"
    with pytest.raises(CheckpointError, match=r"For nanoGPT's character-level data give the meta\.pkl of its folder"):
        tokenizer_of(nanogpt)
    for named in (data, data / "meta.pkl"):
        assert tokenizer_of(nanogpt, named).characters == CHARACTERS
    with pytest.raises(DataError, match=r"none\.pkl is missing"):
        tokenizer_of(nanogpt, tmp_path / "none.pkl")
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "meta.pkl").write_bytes((data / "meta.pkl").read_bytes())
    for beside in (tmp_path, tmp_path / "ckpt.pt", f"{tmp_path / 'ckpt.pt'}{NANOGPT_FORM}"):
        assert tokenizer_of(replace(nanogpt, source=str(beside))).characters == CHARACTERS
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "itos": {0: "a"}, "stoi": {"a": 0}}))
    with pytest.raises(CheckpointError, match=f"has {len(CHARACTERS)} tokens, its tokenizer 'characters' has 1"):
        tokenizer_of(replace(nanogpt, source=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"give the meta\.pkl of its own data"):
        tokenizer_of(load_model(place / "run"), tmp_path)


@pytest.mark.process
@pytest.mark.usefixtures("nanogpt")
def test_nanogpts_own_checkpoint_is_sampled_evaluated_and_converted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, data = f"{place / 'ckpt.pt'}{NANOGPT_FORM}", str(place / "shakespeare_char")
    prompt = ["Speak", "--max-new-tokens", "5", "--no-stream"]
    capsys.readouterr()
    assert main(["sample", f"{place / 'run'}{NANOGPT_FORM}", *prompt]) == 0
    expected = capsys.readouterr().out
    assert main(["sample", checkpoint, *prompt, "--tokenizer", data]) == 0
    assert capsys.readouterr().out == expected
    assert main(["evaluate", checkpoint, "--data", data]) == 0  # needs no characters
    assert main(["convert", checkpoint, str(tmp_path / "native"), "--to", "native", "--tokenizer", data]) == 0
    assert json.loads((tmp_path / "native" / "config.json").read_text())["tokenizer"]["characters"] == CHARACTERS


def test_a_model_is_explored_whose_characters_the_default_texts_have_not() -> None:
    tokenizer = CharacterTokenizer("0123456789")
    ref = TokenizerRef(tokenizer.name, tokenizer.fingerprint, characters=tokenizer.characters)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=10)).eval()
    found = explore(LoadedModel(model, ref, "digits"))
    assert ": give a text to --prompt" in found.no_text
    found = explore(LoadedModel(model, ref, "digits"), prompt="2024")
    assert [one.token for one in found.neighbors] == ["7"], "the one default token that is a digit"
    assert found.attention is not None and found.attention.tokens == ["2", "0", "2", "4"]


class Evil:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.vocab-size", "50257"], f"set --model.vocab-size {len(CHARACTERS)}"),
        (["--sample.prompt", "Hello!"], "sample.prompt: 'H', character 1 of the text, is not one of the"),
        (["--model.architecture", "modern", "--model.document-mask"], "document_mask = true needs an end of text"),
    ],
    ids=["size", "prompt", "mask"],
)
def test_settings_that_do_not_suit_characters_are_refused_before_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    recipe = tmp_path / "other.toml"
    if "modern" in arguments:
        recipe.write_text(RECIPE.replace("dropout = 0.1", 'architecture = "modern"\ndocument_mask = true'))
        arguments = []
    else:
        recipe.write_text(RECIPE)
    data, run = str(place / "shakespeare_char"), tmp_path / "run"
    assert main(["train", str(recipe), "--data", data, "--run", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "metrics.jsonl").exists()


def test_a_pickle_with_code_ends_the_command_and_does_not_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).write_bytes((place / "shakespeare_char" / name).read_bytes())
    (data / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    arguments = ["train", str(place / "char.toml"), "--data", str(data), "--run", str(tmp_path / "run")]
    for command in (arguments, ["inspect", str(data)], ["sample", str(place / "run"), "--tokenizer", str(data)]):
        assert main(command) == 1
        assert "it holds more than dicts, texts and whole numbers" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
