"""The texts of the GPT-2 paper's table: known answers of made-up models on made-up files, counts on the real ones.

With the `bytes` tokenizer a token is a byte, so that what is expected can be counted in the text.
"""

import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import enwik8, one_billion_words, ptb, text8, wikitext
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.detokenize import wikitext as detokenized
from regpt2.model.gpt import GPT, GPTConfig

REAL = Path(__file__).parents[3] / "shared" / "data" / "eval"
V, T = 257, 64


def uniform_model() -> GPT:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=T, vocab_size=V))
    torch.nn.init.zeros_(model.wte.weight)
    return model


CONTEXT = EvalContext(
    model=uniform_model(),
    world=World(rank=0, local_rank=0, size=1, device=torch.device("cpu")),
    data=None,
    seq_len=T,
    batch=64,
    val_tokens=0,
    tokenizer=load_tokenizer("bytes"),
)


def given(name: str, path: Path, **changes: object) -> EvalContext:
    return replace(CONTEXT, files={name: path}, **changes)  # type: ignore[arg-type]


def per(n_units: int, n_bytes: int) -> object:
    """The perplexity per unit of a uniform model."""
    return pytest.approx(V ** (n_bytes / n_units), rel=1e-5)


@pytest.mark.parametrize(("entry", "name"), [(ptb, "ptb"), (one_billion_words, "one_billion_words")])
def test_sentences_per_original_word(entry: object, name: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" it was n't <unk> \n $ N \n")
    text = "it wasn't <unk>\n$N\n"
    expected = {"perplexity": per(6, len(text)), "tokens": len(text), "words": 6}
    assert entry.evaluate(given(name, tmp_path / "text")) == expected  # type: ignore[attr-defined]
    assert entry.evaluate(given(name, tmp_path / "text", limit=1))["words"] == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(("entry", "name"), [(enwik8, "enwik8"), (text8, "text8")])
def test_bits_of_the_end_of_a_file(entry: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = "N_TEST_BYTES" if name == "enwik8" else "N_TEST_CHARACTERS"
    monkeypatch.setattr(entry, constant, 1000)
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
        archive.writestr(name, b"x" * 5000)
    metric, unit = ("bits_per_byte", "bytes") if name == "enwik8" else ("bits_per_character", "characters")
    expected = {metric: pytest.approx(math.log2(V), rel=1e-6), "tokens": 1000, unit: 1000}
    for path in (tmp_path, tmp_path / f"{name}.zip"):
        assert entry.evaluate(given(name, path)) == expected  # type: ignore[attr-defined]
    assert entry.evaluate(given(name, tmp_path, limit=2))["tokens"] == 2 * T  # type: ignore[attr-defined]


def test_bits_of_gpt2_tokens_are_of_the_bytes_they_stand_for(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=T, vocab_size=50257))
    torch.nn.init.zeros_(model.wte.weight)
    text = "Höhe und Tiefe, " * 20
    (tmp_path / "enwik8").write_text(text, encoding="utf-8")
    found = enwik8.evaluate(given("enwik8", tmp_path, model=model, tokenizer=tokenizer))
    n_tokens, n_bytes = len(tokenizer.encode(text)), len(text.encode())
    assert (found["tokens"], found["bytes"]) == (n_tokens, n_bytes)
    assert found["bits_per_byte"] == pytest.approx(n_tokens * math.log2(50257) / n_bytes, rel=1e-5)


RAW = (
    " \n = Two words = \n \n It is 1 @,@ 000 . \n \n = = Section = = \n \n More ( so ) . \n \n = Next = \n \n End . \n"
)
UNKNOWN = RAW.replace("More", "<unk>")
ARTICLES = ["== Section ==\n\nMore (so).", "End.\n"]


@pytest.fixture
def wikitext_folder(tmp_path: Path) -> Path:
    for name, text in (("wiki.test.raw", RAW), ("wikitext-2/wiki.test.tokens", UNKNOWN)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_wikitext_in_its_protocols(wikitext_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = wikitext.articles(RAW)
    assert (first + "\n" + second) == RAW.removeprefix(" \n")
    n_words, n_bytes = len(RAW.split()), len(detokenized(first)) + len(detokenized(second))
    found = wikitext.evaluate(given("wikitext", wikitext_folder))
    assert found == {
        "plain_perplexity": per(1, 1),
        "bits_per_byte": pytest.approx(math.log2(V), rel=1e-6),
        "word_perplexity": per(n_words + 4, n_bytes),
        "wikitext2_perplexity": per(n_words, n_bytes + len("<unk>") - len("More")),
        "wikitext103_perplexity": None,
        "tokens": len(RAW),
        "bytes": len(RAW),
    }
    assert "wikitext-103-v1.zip or wikitext-103/wiki.test.tokens" in capsys.readouterr().err.replace("\n", " ")


def test_wikitext_of_the_raw_file_alone_and_in_brief(wikitext_folder: Path) -> None:
    raw = wikitext_folder / "wiki.test.raw"
    found = wikitext.evaluate(given("wikitext", raw))
    assert found["word_perplexity"] and found["wikitext2_perplexity"] is found["wikitext103_perplexity"] is None
    brief = wikitext.evaluate(given("wikitext", raw, brief=True))
    assert brief == {key: found[key] for key in ("plain_perplexity", "bits_per_byte", "tokens", "bytes")}
    assert wikitext.evaluate(given("wikitext", raw, brief=True, limit=1))["tokens"] == len(wikitext.articles(RAW)[0])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"nor ptb\.test\.txt or .* give the file: --files ptb=PATH"):
        ptb.evaluate(given("ptb", tmp_path))
    with pytest.raises(
        DownloadError, match=r"not served as one file; give a local copy: --files one_billion_words=PATH"
    ):
        one_billion_words.evaluate(CONTEXT)
    (tmp_path / "text8").write_text("abc")
    with pytest.raises(UsageError, match="tokenizer"):
        text8.evaluate(given("text8", tmp_path, tokenizer=None))


@pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data")
def test_the_real_wikitext_test_set_has_the_words_that_it_should() -> None:
    """Merity et al. 2016, table 1: 245,569 tokens, which are the words and one end of each of 4,358 lines."""
    text = (REAL / "wiki.test.raw").read_bytes().decode()
    found = [len(part.split()) for part in wikitext.articles(text)]
    assert (len(found), sum(found)) == (62, 245_569 - 4_358)
    figures = wikitext.evaluate(given("wikitext", REAL, brief=True, limit=1))
    assert figures["bytes"] == len(wikitext.articles(text)[0].encode())
