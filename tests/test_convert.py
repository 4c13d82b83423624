"""The verb convert: there and back again without a bit changed; what is not proven does not appear."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regpt2.base.errors import CheckpointError, Problem, UsageError
from regpt2.convert import TOLERANCE, ConvertOptions, convert, largest_difference, main
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.load import TokenizerRef, Vocabulary, load_model
from regpt2.model.weights import huggingface, native

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257)


def write_native(folder: Path, name: str = "bytes", config: GPTConfig = SMALL) -> GPT:
    tokenizer, model = load_tokenizer(name), GPT(config)
    folder.mkdir(parents=True)
    native.write(model, folder, Vocabulary(name, tokenizer.fingerprint))
    return model


def test_there_and_back_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(tmp_path / "a")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "huggingface"]) == 0
    assert main([str(tmp_path / "b"), str(tmp_path / "c"), "--to", "native"]) == 0
    for name in native.FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    said = capsys.readouterr().out
    assert f"{GPT(SMALL).n_params():,} parameters" in said
    assert "difference of logits is 0.0e+00" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_gpt2_export_works_in_transformers_as_it_is(tmp_path: Path) -> None:
    model = write_native(tmp_path / "a", "gpt2", GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "out", to="huggingface"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(huggingface.FILES)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Hello, 世界", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == load_tokenizer("gpt2").encode("Hello, 世界")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_a_model_with_an_unknown_vocabulary_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    native.write(GPT(SMALL), tmp_path / "a", Vocabulary("bytes", "0" * 64))
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="huggingface"))
    assert load_model(tmp_path / "b").tokenizer == TokenizerRef("bytes", "0" * 64)
    assert "The tokenizer's own files are left out." in capsys.readouterr().err


def test_an_earlier_export_is_replaced_by_force_only(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_native(first)
    write_native(second, config=GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=257))
    out = tmp_path / "out"
    convert(ConvertOptions(str(first), out, to="huggingface"))
    with pytest.raises(UsageError, match="is not empty; name another folder, or replace an earlier export"):
        convert(ConvertOptions(str(second), out, to="native"))
    assert load_model(out).model.config.n_layer == 2
    convert(ConvertOptions(str(second), out, to="native", force=True))
    assert {path.name for path in out.iterdir()} == set(native.FILES)
    assert load_model(out).model.config.n_layer == 1


def test_an_empty_destination_is_used(tmp_path: Path) -> None:
    write_native(tmp_path / "a")
    (tmp_path / "deep" / "out").mkdir(parents=True)
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "deep" / "out", to="native"))
    assert load_model(tmp_path / "deep" / "out").model.config == SMALL


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    write_native(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex', which is not from an export"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "out", to="native", force=True))
    assert (tmp_path / "out" / "thesis.tex").exists()


def refused(options: ConvertOptions) -> str:
    with pytest.raises(UsageError) as caught:
        convert(options)
    return str(caught.value)


def test_impossible_destinations_and_formats_are_refused(tmp_path: Path) -> None:
    write_native(tmp_path / "a")
    src = str(tmp_path / "a")
    (tmp_path / "file").touch()
    assert "is a file; name a folder." in refused(ConvertOptions(src, tmp_path / "file", to="native"))
    assert "is the source itself" in refused(ConvertOptions(src, tmp_path / "a", to="huggingface", force=True))
    message = refused(ConvertOptions(src, tmp_path / "b", to="hugingface"))
    assert "there is no 'hugingface'; did you mean 'huggingface'?" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize("there_before", [True, False])
def test_a_conversion_that_changes_the_model_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    """Planted: the writer forgets to transpose the square matrix, so that shapes fit and logits do not."""
    write_native(tmp_path / "a")
    if there_before:
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "out", to="huggingface"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")}
    write, right = huggingface.write, huggingface._CONV1D

    def write_wrongly(*args: Any) -> None:
        monkeypatch.setattr(huggingface, "_CONV1D", ("c_attn.weight", "mlp.c_proj.weight", "c_fc.weight"))
        write(*args)
        monkeypatch.setattr(huggingface, "_CONV1D", right)

    monkeypatch.setattr(huggingface, "write", write_wrongly)
    with pytest.raises(CheckpointError, match=r"is not the same model as .*logits differ by .* of the largest"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "out", to="huggingface", force=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["a", "out"] if there_before else ["a"])


def test_the_tolerance_sees_one_wrong_weight() -> None:
    """One of 12,000 weights, off by as much as a weight usually is."""
    model, other = GPT(SMALL), GPT(SMALL)
    assert largest_difference(model, other) == 0
    with torch.no_grad():
        other.get_parameter("h.0.mlp.c_fc.weight")[3, 5] += 0.02
    assert largest_difference(model, other) > TOLERANCE


def test_a_weight_that_hardly_changes_a_logit_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_native(tmp_path / "a")
    write = native.write

    def write_wrongly(model: GPT, *rest: Any) -> None:
        with torch.no_grad():
            model.get_parameter("h.1.ln_1.bias")[3] += 1e-9
            write(model, *rest)
            model.get_parameter("h.1.ln_1.bias")[3] = 0.0

    monkeypatch.setattr(native, "write", write_wrongly)
    with pytest.raises(CheckpointError, match=r"tensor h\.1\.ln_1\.bias differs, expected the same bits"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="native"))
    assert not (tmp_path / "b").exists()


def test_a_model_with_nan_is_refused(tmp_path: Path) -> None:
    model = GPT(SMALL)
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    (tmp_path / "a").mkdir()
    native.write(model, tmp_path / "a", None)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="native"))
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_native(tmp_path / "a")
    monkeypatch.setattr("regpt2.base.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(Problem, match=r"the native folder needs .* MB and 0\.0 MB are free"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="native"))
    assert not (tmp_path / "b").exists()
