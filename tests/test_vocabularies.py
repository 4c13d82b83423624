"""A stranger's vocabulary in every verb: GPT-2's serves as it lies there, added rows are used, another's is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from conftest import Run, needs_bf16
from regpt2.base.errors import CheckpointError, DownloadError
from regpt2.commands.sample import sample
from regpt2.data import tokenizer as tokenizer_module
from regpt2.data.tokenizer import VOCAB_SHA256, find_vocab
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf, huggingface, native
from regpt2.sampling.continue_text import SampleOptions
from regpt2.sampling.tokenizer import tokenizer_of

VOCAB = find_vocab().read_bytes()
PADDED, NAMED = (None,) * 47, ("[PAD]", "<|user|>")


@pytest.fixture(autouse=True)
def no_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the programs of others takes seconds each: tests/clients/ does that."""
    for entry in (gguf, huggingface):
        monkeypatch.delattr(entry, "client_logits")


@torch.no_grad()
def small_model(rows: int, loud: int | None = None) -> GPT:
    """Its logit for the row `loud`, counted from GPT-2's last, is far above all others, whatever comes before."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=rows), seed=5)
    if loud is not None:
        model.ln_f.bias.fill_(3.0)
        model.wte.weight[50257 + loud :].fill_(5.0)
        model.wte.weight[50257 + loud].fill_(6.0)
    return model.eval()


def their_folder(folder: Path, model: GPT, **files: Any) -> Path:
    """A model in a Hugging Face folder, beside it GPT-2's merges or what is given: JSON, by the names of files."""
    folder.mkdir()
    huggingface.write(model, folder, None)
    for name, content in (files or {"merges": VOCAB}).items():
        if isinstance(content, bytes):
            (folder / f"{name}.txt").write_bytes(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def another(folder: Path) -> Path:
    return their_folder(folder, small_model(50257), tokenizer={"model": {"type": "Unigram", "vocab": [["a", -1.0]]}})


def padded(folder: Path, loud: int | None = None) -> Path:
    return their_folder(folder, small_model(50304, loud))


def named(folder: Path, loud: int | None = None) -> Path:
    ids = {text: n for n, text in enumerate(NAMED, start=50257)}
    return their_folder(folder, small_model(50259, loud), merges=VOCAB, added_tokens=ids)


# --- another's ---


def test_no_verb_makes_or_scores_text_with_another_tokenizer(tmp_path: Path, regpt2: Run) -> None:
    folder = another(tmp_path / "a")
    (tmp_path / "copa.jsonl").write_text('{"query": "It fell, so", "choices": ["a b", "c d"], "gold": 0}\n')
    why = "tokenizer.json describes a model of type 'Unigram', expected 'BPE'. So it can neither generate nor score"
    for arguments in (["sample", folder, "Hi"], ["evaluate", folder, "--evals", "copa", "--files", "copa=copa.jsonl"]):
        done = regpt2(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert why in done.stderr and "`regpt2 convert` converts the weights, without the vocabulary" in done.stderr
        assert "--evals val_loss --data DIR" in done.stderr
    assert "Nearest tokens and attention are left out." in regpt2("explore", folder).stdout


@pytest.mark.process
@pytest.mark.parametrize("to", ["huggingface", "gguf", "native", "safetensors", "nanogpt", "llmc"])
def test_exports_of_it_carry_no_vocabulary_and_its_name(tmp_path: Path, regpt2: Run, to: str) -> None:
    gelu = ":gelu" if to == "nanogpt" else ""
    done = regpt2("convert", f"{another(tmp_path / 'a')}{gelu}", tmp_path / "b", "--to", to)
    assert done.returncode == 0
    assert "The weights are converted. The tokenizer's own files are left out." in done.stderr
    files = sorted(path for path in (tmp_path / "b").rglob("*")) if (tmp_path / "b").is_dir() else [tmp_path / "b"]
    assert not any(b"endoftext" in path.read_bytes() for path in files)
    if to == "llmc":  # it has no place for a name: GPT-2's is taken, with a warning
        assert [path.name for path in files] == ["model.bin"]
        return
    ref = load_model(tmp_path / "b").tokenizer
    assert ref is not None and ref.name == "unigram" and ref.fingerprint != VOCAB_SHA256
    with pytest.raises(CheckpointError, match="was trained with the tokenizer 'unigram'; regpt2 supports only gpt2"):
        sample(SampleOptions(str(tmp_path / "b"), "Hi"))


def write_ids(folder: Path, rows: int) -> Path:
    """As nanoGPT has them: ids alone."""
    folder.mkdir()
    np.random.default_rng(1).integers(rows, size=400).astype("<u2").tofile(folder / "val.bin")
    return folder


@pytest.mark.parametrize("model", [another, padded, named])
def test_val_loss_needs_no_tokenizer_and_is_that_of_transformers(
    tmp_path: Path, regpt2: Run, monkeypatch: pytest.MonkeyPatch, model: Callable[[Path], Path]
) -> None:
    folder, data = model(tmp_path / "a"), write_ids(tmp_path / "data", 50257)
    monkeypatch.setattr("regpt2.evals.measuring.measure.tokenizer_of", lambda _: pytest.fail("it was asked for"))
    done = regpt2("evaluate", folder, "--data", data, "--evals", "val_loss", "--out", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())["results"]["val_loss"]
    ids = torch.from_numpy(np.fromfile(data / "val.bin", "<u2").astype(np.int64))[: 6 * 64 + 1]
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(ids[:-1].view(6, 64)).logits.flatten(0, 1)
    assert logits.shape[1] == load_model(folder).model.config.vocab_size
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:])), abs=1e-5)


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, regpt2: Run, tiny_data: Path) -> None:
    done = regpt2("evaluate", another(tmp_path / "a"), "--data", tiny_data)
    assert done.returncode == 1 and "was trained with 'unigram' (50257 tokens)" in done.stderr


# --- rows beyond GPT-2's ---


@pytest.mark.parametrize("model", [padded, named])
@torch.no_grad()
def test_logits_of_all_rows_are_those_of_transformers(tmp_path: Path, model: Callable[[Path], Path]) -> None:
    folder = model(tmp_path / "a")
    ids = torch.tensor([[1, 50256, 50257, 50258, 7]])
    ours, theirs = load_model(folder).model(ids), GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=needs_bf16), "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_text_is_never_sampled(
    tmp_path: Path, dtype: Any, temperature: float, capsys: pytest.CaptureFixture[str]
) -> None:
    if dtype == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no int8 instructions")
    folder = padded(tmp_path / "a", loud=3)
    options = SampleOptions(str(folder), "Hi", temperature=temperature, dtype=dtype, max_new_tokens=52, device="cpu")
    (text,) = sample(options)
    assert len(text) >= len("Hi") + 50, "each of them has a text"
    err = capsys.readouterr().err
    assert f"warning: {folder}: 47 rows beyond GPT-2's 50,257 tokens have no text; they are never sampled.\n" in err


def test_a_row_with_a_text_is_sampled_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SampleOptions(str(named(tmp_path / "a", loud=1)), "Hi", temperature=0, max_new_tokens=3, device="cpu")
    assert sample(options) == ["Hi<|user|><|user|><|user|>"]
    out, err = capsys.readouterr()
    assert out == "Hi<|user|><|user|><|user|>\n" and "warning" not in err


def test_a_padded_model_without_files_is_taken_for_gpt2s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = their_folder(tmp_path / "a", small_model(50304), generation_config={})
    sample(SampleOptions(str(folder), "Hi", max_new_tokens=2, device="cpu"))
    err = capsys.readouterr().err
    assert "does not say which tokenizer it was trained with; using GPT-2's" in err and "47 rows beyond" in err


@pytest.mark.seconds
@pytest.mark.parametrize("to", ["native", "safetensors", "huggingface", "gguf"])
@pytest.mark.parametrize(("model", "added"), [(padded, PADDED), (named, NAMED)], ids=["padded", "named"])
def test_exports_keep_the_texts_of_added_rows(
    tmp_path: Path, regpt2: Run, to: str, model: Callable[[Path], Path], added: tuple[str | None, ...]
) -> None:
    done = regpt2("convert", model(tmp_path / "a"), tmp_path / "b", "--to", to)
    assert done.returncode == 0, done.stderr
    loaded = load_model(tmp_path / "b")
    assert loaded.tokenizer is not None and loaded.tokenizer.added == added
    tokenizer = tokenizer_of(loaded)
    assert tokenizer.vocab_size == loaded.model.config.vocab_size
    assert len(tokenizer.textless) == added.count(None)
    assert tokenizer.decode([50257]) == (added[0] or "")


def test_gguf_has_an_entry_for_each_row(tmp_path: Path, regpt2: Run) -> None:
    """llama.cpp refuses a file with fewer tokens than rows. Unused ones are of type 5, named as by its converter."""
    regpt2("convert", padded(tmp_path / "a"), tmp_path / "b", "--to", "gguf")
    data = (tmp_path / "b").read_bytes()[: 4 << 20]
    cursor = gguf.Cursor(data, tmp_path / "b")
    cursor.take(8)
    _, n_keys = cursor.value("Q"), cursor.value("Q")
    keys = gguf._read_keys(cursor, n_keys)
    assert len(keys[gguf.TOKENS]) == len(keys[gguf.TOKEN_TYPES]) == 50304
    assert keys[gguf.TOKENS][50256:50258] == ["<|endoftext|>", "[PAD50257]"]
    assert keys[gguf.TOKEN_TYPES][50255:50258] == [1, 3, 5]


@pytest.mark.process
def test_a_format_that_loses_rows_is_refused(tmp_path: Path, regpt2: Run) -> None:
    """nanoGPT's files of 50,304 rows are read as GPT-2's 50,257."""
    done = regpt2("convert", f"{padded(tmp_path / 'a')}:gelu", tmp_path / "b", "--to", "nanogpt")
    assert done.returncode == 1 and "50,257 tokens, expected 50,304" in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("kind", lambda keys: keys.update({gguf.KIND: "llama"}), "is of kind 'llama' and splits text by 'gpt-2'"),
        ("split", lambda keys: keys.update({gguf.SPLIT: "starcoder"}), "splits text by 'starcoder', expected 'gpt2'"),
        ("no merges", lambda keys: keys.pop(gguf.MERGES), "of other tokens or merges"),
        ("tokens", lambda keys: keys[gguf.TOKENS].reverse(), "of other tokens or merges"),
    ],
)
def test_another_tokenizer_inside_gguf_is_refused(
    name: str, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    keys = their_keys()
    edit(keys)
    ref = gguf._tokenizer(Path("a.gguf"), keys, 50257)
    assert ref is not None and message in str(ref.objection) and ref.fingerprint != VOCAB_SHA256


def test_gpt2s_tokenizer_inside_gguf_is_proven() -> None:
    assert gguf._tokenizer(Path("a.gguf"), their_keys(), 50257) == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)
    old = {key: value for key, value in their_keys().items() if key != gguf.SPLIT}
    assert gguf._tokenizer(Path("a.gguf"), old, 50257) == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)
    assert gguf._tokenizer(Path("a.gguf"), {gguf.KIND: "none"}, 50257) is None


def their_keys() -> dict[str, Any]:
    """What a GGUF file of GPT-2's says of its tokenizer, by a program that is not ours."""
    merges = VOCAB.decode().split("\n")[1:-1]
    first = list(tokenizer_module.byte_characters().values())
    tokens = [*first, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    return {gguf.KIND: "gpt2", gguf.SPLIT: "gpt-2", gguf.TOKENS: tokens, gguf.MERGES: merges}


# --- no network, no cache ---


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPT-2's vocabulary; a test that reaches for the network fails."""
    monkeypatch.setattr(tokenizer_module, "_packaged_vocab", lambda: None)
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "empty"))


@pytest.mark.seconds
@pytest.mark.parametrize("by", ["merges", "crlf", "tokenizer.json", "gguf"])
def test_the_merges_beside_the_weights_serve_as_the_vocabulary(
    tmp_path: Path, nowhere: None, by: str, regpt2: Run
) -> None:
    model, folder = small_model(50257), tmp_path / "a"
    vocabulary = Vocabulary("gpt2", VOCAB_SHA256, 50256, VOCAB)
    if by == "gguf":
        gguf.write(model, folder, vocabulary)
    elif by == "tokenizer.json":
        folder.mkdir()
        huggingface.write(model, folder, vocabulary)
        (folder / "merges.txt").unlink()
    else:
        their_folder(folder, model, merges=VOCAB.replace(b"\n", b"\r\n") if by == "crlf" else VOCAB)
    assert tokenizer_of(load_model(folder)).encode("Hello, 世界") == [15496, 11, 220, 10310, 244, 45911, 234]
    assert regpt2("sample", folder, "Hi", "--max-new-tokens", 2, "--device", "cpu").returncode == 0
    done = regpt2("convert", folder, tmp_path / "b", "--to", "huggingface")
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "b" / "merges.txt").read_bytes() == VOCAB


def test_without_any_the_message_names_the_cache(
    tmp_path: Path, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    native.write(small_model(50257), folder, Vocabulary("gpt2", VOCAB_SHA256))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"vocab\.bpe"):
        sample(SampleOptions(str(folder), "Hi"))
