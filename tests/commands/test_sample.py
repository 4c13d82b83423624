"""The verb sample: text streams whole and safe, the same for the same seed; what cannot be is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2 import cli
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.commands.sample import main, sample
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.sampling.continue_text import SampleOptions

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257)


def write_model(folder: Path, config: GPTConfig = CONFIG, fingerprint: str | None = None) -> None:
    native.write(GPT(config), folder, Vocabulary("bytes", fingerprint or load_tokenizer("bytes").fingerprint))


@torch.no_grad()
def write_parrot(folder: Path, text: bytes) -> None:
    """A model that says `text`, then <|endoftext|>, whatever the prompt: position p shouts the id that comes next."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=257, block_size=64, vocab_size=257))
    for p in model.parameters():
        p.zero_()
    model.ln_f.weight.fill_(100.0)
    model.wte.weight[:257] = torch.eye(257)
    for place, token in enumerate([*text, 256]):
        model.wpe.weight[place, token] = 100.0
    native.write(model, folder, Vocabulary("bytes", load_tokenizer("bytes").fingerprint))


def test_text_streams_and_speed_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    assert main([str(tmp_path), "ROMEO:", "--max-new-tokens", "20", "--seed", "7", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ROMEO:") and out.endswith("\n") and len(out) > 10
    assert re.fullmatch(r"\d+ tokens in \d+\.\d s, [\d,.]+ tokens/s\n", err)


def test_streamed_text_equals_the_text_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    printed = []
    for stream in (True, False):
        sample(SampleOptions(str(tmp_path), "naïve", max_new_tokens=50, device="cpu", stream=stream))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["- item"],
        ["-item of a list", "--seed", "3"],
        ["--x or --y"],
        ["-- a b"],
        ["-5"],
        ["--", "--x"],
        ["--seed", "3", "--", "-h"],
        ["--", "--debug"],
        ["--", "--n"],
    ],
    ids=str,
)
def test_a_prompt_may_begin_with_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write_model(tmp_path)
    assert cli.main(["sample", "--max-new-tokens", "3", str(tmp_path), *arguments]) == 0
    prompt = next(one for one in arguments[::-1] if one.startswith("-") and one not in ("--", "--seed"))
    assert capsys.readouterr().out.startswith(prompt)


@pytest.mark.parametrize("prompt", ["--x", "-item", "--top-kk=5"])
def test_what_may_be_a_mistyped_option_is_refused_with_the_way_to_mean_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), prompt])
    assert caught.value.code == 2
    assert f"If {prompt!r} is the prompt, put it last, after --: MODEL -- {prompt!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "a", "--no-stream", "--temperature", "-1", "--max_new_tokens=5", "--n", "many"])
    assert "is the prompt" not in capsys.readouterr().err


def test_same_seed_same_text(tmp_path: Path) -> None:
    write_model(tmp_path)
    texts = [sample(SampleOptions(str(tmp_path), "a", seed=seed, max_new_tokens=30)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_several_continuations_are_headed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    texts = sample(SampleOptions(str(tmp_path), "a", n=3, max_new_tokens=10, device="cpu"))
    assert len(set(texts)) == 3
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("---")] == [f"--- {n} of 3 ---" for n in (1, 2, 3)]


class Spy:
    """Standard output that keeps every piece apart."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def write(self, text: str) -> None:
        self.pieces.append(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stream", [True, False])
def test_end_of_text_ends_it_and_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: bool) -> None:
    write_parrot(tmp_path, b"so it is")
    assert sample(SampleOptions(str(tmp_path), "", temperature=0, max_new_tokens=60, stream=stream)) == ["so it is"]
    out, err = capsys.readouterr()
    assert out == "so it is\n"
    assert err.startswith("9 tokens in ")


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no int8 instructions")
def test_int8_weights_on_a_cpu(tmp_path: Path) -> None:
    write_parrot(tmp_path, b"so it is")
    options = SampleOptions(str(tmp_path), "", temperature=0, max_new_tokens=60, dtype="int8", device="cpu")
    assert sample(options) == ["so it is"]


def test_int8_weights_are_refused_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UsageError, match="int8 needs a processor with AVX512-VNNI, which this one lacks; use bf16 or"):
        sample(SampleOptions(str(tmp_path), "", dtype="int8", device="cpu"))


def test_characters_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parrot(tmp_path, "a👍é".encode())
    spy = Spy()
    monkeypatch.setattr("sys.stdout", spy)
    sample(SampleOptions(str(tmp_path), "", temperature=0, max_new_tokens=20))
    assert [piece for piece in spy.pieces if piece] == ["a", "👍", "é", "\n"]


@pytest.mark.parametrize("stream", [True, False])
def test_control_characters_are_shown_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    write_parrot(tmp_path, b"\x1b[2J\r\x07")
    sample(SampleOptions(str(tmp_path), "", temperature=0, max_new_tokens=20, stream=stream))
    assert capsys.readouterr().out == "\\x1b[2J\\r\\x07\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": "x" * 64},
            "64 prompt tokens + 1 new ones = 65, the model can take 64; ask for at most 0",
        ),
        (
            {"prompt": "x" * 60, "max_new_tokens": 100},
            "60 prompt tokens + 100 new ones = 160, the model can take 64; ask for at most 4 new ones",
        ),
        ({"n": 0}, "n = 0 must be at least 1."),
        ({"temperature": -0.5}, "temperature = -0.5 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan must be 0"),
        ({"temperature": float("inf")}, "temperature = inf must be 0"),
        ({"device": "abacus"}, "device 'abacus' is not on this machine"),
        ({"model": "nowhere"}, "MODEL = 'nowhere' does not exist"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_before_anything_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    write_model(tmp_path)
    with pytest.raises(UsageError) as caught:
        sample(SampleOptions(**({"model": str(tmp_path), "prompt": "a"} | options)))
    assert message in str(caught.value)
    assert capsys.readouterr().out == ""


def test_another_vocabulary_of_the_same_name_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="was trained with a 'bytes' vocabulary of fingerprint 0000"):
        sample(SampleOptions(str(tmp_path), "a"))


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=300))
    with pytest.raises(CheckpointError, match="has 300 tokens, its tokenizer 'bytes' has 257"):
        sample(SampleOptions(str(tmp_path), "a"))


def test_a_model_that_names_no_tokenizer_needs_gpt2s_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native.write(GPT(CONFIG), tmp_path, None)
    with pytest.raises(CheckpointError, match=r"does not say which tokenizer .* 257 tokens are not GPT-2's 50,257"):
        sample(SampleOptions(str(tmp_path), "a"))
    native.write(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)), tmp_path, None)
    sample(SampleOptions(str(tmp_path), "Hello", max_new_tokens=5))
    assert "warning: " in (err := capsys.readouterr().err) and "using GPT-2's, which has the same size" in err
