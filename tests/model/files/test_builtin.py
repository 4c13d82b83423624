"""The model that comes with the package: what it is, and that transformers reads the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regpt2
from regpt2.base.errors import UsageError
from regpt2.model.files.load import load_model, peek_model
from regpt2.serving.models import names_of

FOLDER = Path(regpt2.__file__).parent / "builtin" / "novels"
TEXT = (
    "The carriage stopped before the door, and the old lady came out upon the steps with a letter in her hand. "
    '"You are late," she said, "and the others have gone in to supper."'
)


def test_it_is_a_small_gpt2() -> None:
    loaded = load_model("builtin:novels")
    assert (loaded.source, loaded.model.config.architecture) == ("builtin:novels", "gpt2")
    assert loaded.model.n_params() == 2_552_320
    assert (FOLDER / "model.safetensors").stat().st_size < 6e6
    assert peek_model("builtin:novels").config == loaded.model.config


def test_it_writes_down_english_with_fewer_bits_than_a_compressor_would() -> None:
    model = regpt2.load("builtin:novels", device="cpu")
    right = model.score(TEXT)
    assert right.bits_per_byte < 2.4  # gzip needs 3.4 and more on such prose
    words = TEXT.split()
    assert model.score(" ".join(words[::-1])).bits_per_byte > right.bits_per_byte + 0.3  # order counts


@torch.no_grad()
def test_transformers_reads_the_same_model_and_the_same_tokens() -> None:
    ours = regpt2.load("builtin:novels", device="cpu")
    ids = ours.tokenizer.encode(TEXT)
    assert AutoTokenizer.from_pretrained(FOLDER)(TEXT)["input_ids"] == ids
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["", "novel", "..", "../builtin/novels", "novels/", "/etc"])
def test_another_name_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(UsageError, match=r"does not come with regpt2; give builtin:novels\."):
        load_model(f"builtin:{name}")


def test_its_name_when_it_is_served() -> None:
    assert names_of(["builtin:novels", "hf:novels"]) == ["novels", "novels-2"]


def test_it_goes_on_learning_from_text_in_its_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for i in range(8):
        (tmp_path / "mine" / f"{i}.txt").write_text(f"Chapter {i}. {TEXT}\n" * 8)
    data, run = tmp_path / "data", tmp_path / "run"
    manifest = regpt2.prepare("text_files", data, input=tmp_path / "mine", tokenizer="builtin:novels", val_tokens=600)
    assert manifest.tokenizer == "bpe"
    before = regpt2.evaluate("builtin:novels", data=data, val_tokens=512)["val_loss"]["loss"]
    regpt2.train(
        "finetune", init="builtin:novels", data=data, run=run, max_steps=6, max_epochs=0, eval_every=6, sample_every=0,
        batch={"batch_tokens": 256, "micro_batch": 4, "seq_len": 64}, optim={"lr": 1e-3}, schedule={"warmup_steps": 1},
    )  # fmt: skip
    assert regpt2.evaluate(run, data=data, val_tokens=512)["val_loss"]["loss"] < before - 0.1
    assert '"init_source":"builtin:novels"' in (run / "metrics.jsonl").read_text()


def test_data_cannot_have_the_tokens_of_a_model_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UsageError, match=r"'builtin:poems' does not come with regpt2; give builtin:novels\."):
        regpt2.prepare("text_files", tmp_path / "data", input=tmp_path / "text.txt", tokenizer="builtin:poems")
