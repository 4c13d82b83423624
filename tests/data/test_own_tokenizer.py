"""A tokenizer of one's own: made by our verb, proven by tokenizers and transformers, kept by data and checkpoints."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, pipeline

import regpt2
from regpt2.base.byte_level.merges import END_OF_TEXT, vocab_bytes
from regpt2.cli import main
from regpt2.data.fast_tokenizer import fast_tokenizer
from regpt2.data.own_vocabulary import read_own, tokenizer_json
from regpt2.data.tokenizer import OWN_FILE, BytePairTokenizer, BytesTokenizer, find_vocab, load_tokenizer
from regpt2.data.tokens.shards import open_tokens, verify
from regpt2.data.train_tokenizer import TrainTokenizerOptions, _Texts
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf, huggingface, llmc, nanogpt, native, safetensors

DOCS = Path(__file__).parents[2] / "docs"
N = 700


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the verb itself."""
    made = tmp_path_factory.mktemp("own") / "tokenizer.json"
    assert main(["tokenizer", "train", "--input", str(DOCS), "--vocab-size", str(N), "--out", str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def ours(file: Path) -> BytePairTokenizer:
    return BytePairTokenizer(read_own(file))


@pytest.fixture(scope="module")
def theirs(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder."""
    out = tmp_path_factory.mktemp("data") / "mine"
    regpt2.prepare(DOCS, out, tokenizer=str(file), workers=1, val_tokens=4000)
    return out


# --- the verb ---


def test_the_same_text_gives_the_same_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [word for path in sorted(DOCS.rglob("*.md")) for word in ("--input", str(path))]
    assert main(["tokenizer", "train", *inputs, "--vocab-size", str(N), "--out", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    said = capsys.readouterr().out
    assert f"{N} tokens (256 bytes, {N - 257} merges, end of text)" in said
    assert " bytes per token; GPT-2's tokenizer: " in said  # of held-out text, if a document happens to be held out


def test_it_learns_the_merges_that_counting_pairs_gives(tmp_path: Path) -> None:
    """Counted by hand: "low" 5 times, "lower" twice, "newest" 6 times, "widest" 3 times, each with a space in front."""
    words = {" low": 5, " lower": 2, " newest": 6, " widest": 3}
    (tmp_path / "a.txt").write_text("".join(word * n for word, n in words.items()))
    out = tmp_path / "t.json"
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "260", "--out", str(out)]
    assert main(command) == 0
    merges = json.loads(out.read_text())["model"]["merges"]
    assert merges in (["e s", "es t", "l o"], ["s t", "e st", "l o"])  # nine times, nine times, seven times


def test_held_out_documents_are_not_learned_from(tmp_path: Path) -> None:
    """Of 60 documents some are held out, by the same rule as prepare's; what they repeat is no token."""
    texts = [f"document{n:02d}" * 3 for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = regpt2.prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer="bytes", workers=1)
    seen: list[str] = []
    seen += _Texts(TrainTokenizerOptions((tmp_path / "a.jsonl",), 300, tmp_path / "t.json"))
    assert len(seen) == manifest.splits["train"].documents < 60


def test_a_small_text_gives_fewer_tokens_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("abab abab")
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "9000", "--out"]
    assert main([*command, str(tmp_path / "new" / "tokenizer.json")]) == 0
    said = capsys.readouterr()
    assert "tokens instead of 9,000; for more, add text" in said.err
    assert "no document was held out" in said.out
    assert BytePairTokenizer(read_own(tmp_path / "new")).decode([256]) in ("ab", "abab")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--input", "{docs}", "--vocab-size", "256", "--out", "{tmp}/t"], 2, "must be from 257"),
        (["train", "--input", "{docs}", "--vocab-size", "65536", "--out", "{tmp}/t"], 2, "to 65,535: ids are kept"),
        (["train", "--input", "{docs}", "--vocab-size", "300", "--out", "{docs}/data.md"], 2, "exists; name another"),
        (["train", "--input", "{tmp}/no", "--vocab-size", "300", "--out", "{tmp}/t"], 2, "no such file or folder"),
        (["train", "--input", "{tmp}", "--vocab-size", "300", "--out", "{tmp}/t"], 1, "no file to read"),
        (["train", "--vocab-size", "300", "--out", "{tmp}/t"], 2, "--input PATH is missing"),
        (["trian"], 2, "did you mean 'train'?"),
        ([], 2, "Available: train"),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(docs=DOCS, tmp=tmp_path) for word in arguments]
    assert main(["tokenizer", *filled]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_an_empty_text_and_a_missing_package_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    command = ["tokenizer", "train", "--input", str(tmp_path), "--vocab-size", "300", "--out", str(tmp_path / "t.json")]
    assert main(command) == 1
    assert "there is no document in the input" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(command) == 2
    assert "pip install 'regpt2[tokenizer]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# --- ids ---

# Letters that came with Unicode 16 and later are symbols to some of the programs' tables.
KNOWN = st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z", "Cc"], max_codepoint=0x2FFF)
WORDS = st.sampled_from(["the ", " tokens", "don't", "\n\n", "  ", " 'S", "naïve", "日本", "🙂", "3.14", "\t"])
TEXTS = st.lists(st.one_of(st.text(KNOWN, max_size=6), WORDS), max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS.filter(lambda text: END_OF_TEXT not in text))
def test_ids_are_those_of_the_package_and_give_the_text_back(
    ours: BytePairTokenizer, theirs: Tokenizer, text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)


def test_it_is_gpt2s_layout_with_end_of_text_last(ours: BytePairTokenizer, theirs: Tokenizer) -> None:
    assert (ours.vocab_size, ours.eot, ours.start_id, ours.name) == (N, N - 1, N - 1, "bpe")
    assert theirs.get_vocab_size() == N and theirs.token_to_id(END_OF_TEXT) == ours.eot
    text = f"a{END_OF_TEXT}b"
    assert ours.eot not in ours.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.encode_with_end_of_text(text) == theirs.encode(text).ids
    assert fast_tokenizer("auto", ours) is ours


def test_every_document_is_longer_in_bytes_alone(ours: BytePairTokenizer) -> None:
    text = (DOCS / "data.md").read_text()
    assert len(ours.encode(text)) < 0.7 * len(BytesTokenizer().encode(text))


# --- files of others ---


def end_first(fast: Any) -> None:
    """As `tokenizers` writes it where the trainer is given the special token."""
    ids = fast["model"]["vocab"]
    ids.update({token: n + 1 for token, n in ids.items()} | {END_OF_TEXT: 0})
    fast["added_tokens"][0]["id"] = 0


FOREIGN: dict[str, tuple[Callable[[Any], object], str]] = {
    "end of text first": (end_first, "gives '!' the id 1, expected 0 (the layout of ids is GPT-2's 256 bytes"),
    "another token": (lambda f: f["added_tokens"].append({"id": N, "content": "[PAD]"}), "has the token '[PAD]'"),
    "another end": (lambda f: f["added_tokens"][0].update(content="</s>"), "has the token '</s>'"),
    "lower case": (lambda f: f.update(normalizer={"type": "Lowercase"}), "has the normalizer Lowercase"),
    "no split": (lambda f: f["pre_tokenizer"].update(use_regex=False), "splits text by ByteLevel"),
    "unigram": (lambda f: f["model"].update(type="Unigram"), "describes a model of type 'Unigram'"),
    "a merge less": (lambda f: f["model"]["merges"].pop(), "expected"),
    "a list": (lambda f: f.clear(), "has no object 'model'"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_with_other_ids_is_refused(
    what: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOREIGN[what]
    fast = json.loads(file.read_text())
    change(fast)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    command = ["prepare", "text_files", "--input", str(DOCS), "--out", str(tmp_path / "d"), "--tokenizer"]
    assert main([*command, str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert message in err and "is no byte-level BPE as GPT-2's: it " in err and "regpt2 tokenizer train" in err
    assert err.count("\n") == 1 and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is damaged ("), (b"\xff", "is damaged ("), (b"[" * 10**5, "is damaged ("), (b"[]", "holds a JSON list")],
)
def test_a_damaged_file_is_one_message(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(regpt2.DataError, match=message.replace("(", r"\(")):
        read_own(tmp_path / "t.json")


def test_gpt2s_own_file_and_wrong_options_are_named(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / OWN_FILE).write_bytes(find_vocab().read_bytes())
    (tmp_path / "gpt2.json").write_text(tokenizer_json(find_vocab().read_bytes()))
    command = ["prepare", "text_files", "--input", str(DOCS), "--out", str(tmp_path / "d"), "--tokenizer"]
    for arguments, code, message in [
        ([str(tmp_path / "gpt2.json")], 1, "choose --tokenizer gpt2 instead"),
        (["gtp2"], 2, "did you mean 'gpt2'?"),
        ([str(tmp_path / "no.json")], 2, "no such file"),
        ([str(DOCS)], 2, "there is no tokenizer.json in this folder"),
        ([str(file), "--vocab", str(file)], 2, "is for gpt2"),
        ([str(file), "--encoder", "gigatoken"], 2, "gigatoken is for the gpt2 tokenizer, not for bpe"),
    ]:
        assert main([*command, *arguments]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


# --- data folders ---


def test_a_data_folder_needs_no_path_any_more(folder: Path, ours: BytePairTokenizer, file: Path) -> None:
    with open_tokens(folder, "val") as val, open_tokens(folder, "train") as train:
        assert (val.vocab_size, val.tokenizer_name, val.tokenizer_fingerprint) == (N, "bpe", ours.fingerprint)
        text = val.tokenizer().decode(val.read(0, 4000).tolist()) + train.tokenizer().decode(
            train.read(0, train.n_tokens).tolist()
        )
    documents = [path.read_text() for path in sorted(DOCS.rglob("*.md"))]
    for document in documents:  # a long one may be cut into pieces, each a document of its own
        assert END_OF_TEXT + document[:1000] in text
    assert text.replace(END_OF_TEXT, "") == "".join(documents).replace(END_OF_TEXT, "")
    assert (folder / OWN_FILE).read_bytes() == read_own(file)


def test_a_lost_or_changed_vocabulary_is_found_and_mended(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    (mine / OWN_FILE).unlink()
    with pytest.raises(regpt2.DataError, match="is missing: it holds the tokenizer's merges"):
        open_tokens(mine, "train")
    assert main(["verify", str(mine)]) == 1
    assert f"BAD  {mine / OWN_FILE}" in capsys.readouterr().out
    again = {"tokenizer": str(file), "workers": 1, "val_tokens": 4000}
    regpt2.prepare(DOCS, mine, **again)
    assert main(["verify", str(mine)]) == 0
    (mine / OWN_FILE).write_bytes(vocab_bytes(["a b"]))
    with pytest.raises(regpt2.DataError, match="damaged, or of another tokenizer"):
        open_tokens(mine, "train")
    (tmp_path / "other.json").write_text(tokenizer_json(vocab_bytes(["a b"])))
    with pytest.raises(regpt2.UsageError, match="its tokenizer_fingerprint is"):
        regpt2.prepare(DOCS, mine, **again | {"tokenizer": str(tmp_path / "other.json")})
    assert verify(folder) == []


def test_other_formats_keep_the_vocabulary_and_mixtures_compare_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", str(folder), str(tmp_path / "n"), "--to", "llmc"]) == 0
    assert main(["reshard", str(tmp_path / "n"), str(tmp_path / "back"), "--to", "native"]) == 0
    assert "its tokens are those of its vocab.bpe" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--against", str(tmp_path / "back")]) == 0
    assert main(["reshard", str(tmp_path / "n"), str(tmp_path / "x"), "--to", "native", "--tokenizer", "gpt2"]) == 2
    pairs = [f"{a} {b}" for a in ascii_lowercase for b in ascii_lowercase][: N - 257]  # as many tokens, others
    (tmp_path / "other.json").write_text(tokenizer_json(vocab_bytes(pairs)))
    regpt2.prepare(DOCS, tmp_path / "o", tokenizer=str(tmp_path / "other.json"), workers=1)
    two = ["--mix", f"{folder}=1", f"{tmp_path / 'o'}=1", "--run", str(tmp_path / "run")]
    assert main(["train", "demo", *two, "--model.vocab-size", str(N)]) == 1
    assert "with another 'bpe' of" in capsys.readouterr().err


# --- runs ---


def test_a_run_keeps_it_in_its_checkpoints_and_resumes_bit_for_bit(
    folder: Path, ours: BytePairTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    shape = {"vocab_size": N, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32}
    options: dict[str, Any] = {"data": str(data), "run": str(tmp_path / "run"), "model": shape, "max_steps": 4}
    options |= {"save_every": 2, "eval_every": 4, "sample_every": 4, "device": "cpu"}
    options |= {"batch": {"micro_batch": 2, "batch_tokens": 64, "seq_len": 32}, "evals": {"val_tokens": 320}}
    regpt2.train("demo", **options)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    expected = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    regpt2.train("demo", **options)
    assert (last / "model.safetensors").read_bytes() == expected
    shutil.rmtree(data)
    loaded = regpt2.load(last)
    assert loaded.tokenizer.fingerprint == ours.fingerprint
    assert loaded.tokenizer.encode("The tokens") == ours.encode("The tokens")
    assert ours.fingerprint in (tmp_path / "run" / "metrics.jsonl").read_text()


# --- exports ---

ADDED = ("[PAD]", None, "<|user|>")


def vocabulary(name: str, ours: BytePairTokenizer, added: tuple[str | None, ...] = ()) -> Vocabulary:
    tokenizer = ours if name == "bpe" else load_tokenizer(name)
    return Vocabulary(name, tokenizer.fingerprint, tokenizer.eot, tokenizer.vocab, added=added)


@torch.no_grad()
def tiny(rows: int) -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=48, vocab_size=rows)).eval()


@pytest.mark.parametrize("added", [(), ADDED], ids=["plain", "added"])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("entry", [huggingface, gguf, native, safetensors, nanogpt], ids=lambda e: e.__name__[22:])
def test_every_format_gives_the_tokenizer_back(
    entry: Any, name: str, added: tuple[str | None, ...], ours: BytePairTokenizer, tmp_path: Path
) -> None:
    if added and entry is nanogpt:
        pytest.skip("its format has no names of rows")
    whole = vocabulary(name, ours, added)
    size = N if name == "bpe" else 257
    place = tmp_path / "m"
    if entry.FILES:
        place.mkdir()
    entry.write(tiny(size + len(added)), place, whole)
    model = regpt2.load(place)
    assert model._loaded.tokenizer is not None and model._loaded.tokenizer.added == added
    assert model.tokenizer.fingerprint == whole.fingerprint and model.tokenizer.vocab_size == size + len(added)
    base = ours if name == "bpe" else BytesTokenizer()
    assert model.tokenizer.encode("The naïve 日本\n") == base.encode("The naïve 日本\n")
    if added:
        assert model.tokenizer.encode("<|user|>") == [size + 2]


def test_llmc_holds_the_tokens_and_takes_the_file_beside(file: Path, ours: BytePairTokenizer, tmp_path: Path) -> None:
    llmc.write(tiny(N), tmp_path, vocabulary("bpe", ours))
    data, at, tokens = (tmp_path / "gpt2_tokenizer.bin").read_bytes(), 1024, []
    assert np.frombuffer(data, "<u4", 4).tolist() == [20240328, 2, N, N - 1]
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    assert tokens == ours.id_bytes
    with pytest.raises(regpt2.CheckpointError, match=r"give its tokenizer\.json in the same way"):
        _ = regpt2.load(tmp_path).tokenizer
    assert regpt2.load(tmp_path, tokenizer=file).tokenizer.fingerprint == ours.fingerprint


def test_merges_that_were_changed_in_a_model_are_refused(ours: BytePairTokenizer, tmp_path: Path) -> None:
    native.write(tiny(N), tmp_path, vocabulary("bpe", ours))
    config = json.loads((tmp_path / "config.json").read_text())
    config["tokenizer"]["merges"] += "a b\n"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(regpt2.CheckpointError, match="the tokenizer's merges have SHA-256"):
        regpt2.load(tmp_path)


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
def test_transformers_and_its_pipeline_continue_as_we_do(name: str, ours: BytePairTokenizer, tmp_path: Path) -> None:
    whole = vocabulary(name, ours)
    assert whole.eot is not None
    huggingface.write(tiny(whole.eot + 1), tmp_path, whole)
    model = regpt2.load(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The tokens of a text", "naïve 日本 🙂\n\n x"):
        assert auto(text)["input_ids"] == model.tokenizer.encode(text)
        assert auto.decode(model.tokenizer.encode(text)) == text
    assert len(auto) == whole.eot + 1 == auto.eos_token_id + 1
    writer = pipeline("text-generation", str(tmp_path), device="cpu")
    (theirs,) = writer("The tokens", max_new_tokens=12, do_sample=False)
    ours_text = model.generate("The tokens", max_new_tokens=12, temperature=0)
    assert theirs["generated_text"] == ours_text and len(ours_text) > len("The tokens")


def made_by_tokenizers(folder: Path, *, special_first: bool) -> Tokenizer:
    """What a person makes without us, with the package's own trainer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT] if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(DOCS / "training.md").read_text()], trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("special_first", [False, True])
def test_a_model_of_others_with_an_own_tokenizer(special_first: bool, tmp_path: Path) -> None:
    theirs = made_by_tokenizers(tmp_path, special_first=special_first)
    huggingface.write(tiny(theirs.get_vocab_size()), tmp_path, None)
    if special_first:
        with pytest.raises(
            regpt2.CheckpointError, match=r"not GPT-2's: .* gives '!' the id 1, expected 0 \(the layout"
        ):
            _ = regpt2.load(tmp_path).tokenizer
        return
    tokenizer = regpt2.load(tmp_path).tokenizer
    assert tokenizer.name == "bpe" and tokenizer.encode("The naïve text") == theirs.encode("The naïve text").ids
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(regpt2.CheckpointError, match=r"merges\.txt has 1 merges that are not those of tokenizer\.json"):
        _ = regpt2.load(tmp_path).tokenizer


def test_a_folder_whose_tokenizer_does_not_fit_its_rows_is_refused(ours: BytePairTokenizer, tmp_path: Path) -> None:
    huggingface.write(tiny(N - 5), tmp_path, replace(vocabulary("bpe", ours)))
    with pytest.raises(regpt2.CheckpointError, match=f"has {N} tokens, the model has {N - 5}"):
        _ = regpt2.load(tmp_path).tokenizer
