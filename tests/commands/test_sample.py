"""The verb sample: text streams whole and safe, the same for the same seed; what cannot be is refused."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regpt2 import cli
from regpt2.base.errors import CheckpointError, DataError, UsageError
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
            "a prompt of 64 tokens plus 1 to write is 65 tokens, and the model's context is 64. Shorten the prompt.",
        ),
        (
            {"prompt": "x" * 60, "max_new_tokens": 100},
            "plus 100 to write is 160 tokens, and the model's context is 64. Ask for at most 4 new tokens, or shorten",
        ),
        ({"n": 0}, "n = 0 must be at least 1."),
        ({"temperature": -0.5}, "temperature = -0.5 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan must be 0"),
        ({"temperature": float("inf")}, "temperature = inf must be 0"),
        ({"min_p": 2.0}, "min_p = 2.0 must be from 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty = -1.0 must be above 0"),
        ({"stop": ("x", "")}, "stop = '' is in every text"),
        ({"batch": 0, "n": 2}, "batch = 0 must be at least 1."),
        ({"logprobs": 3}, "--logprobs needs --json"),
        ({"logprobs": -1, "json": True}, "logprobs = -1 must be from 0 to the number of tokens, 257"),
        ({"logprobs": 258, "json": True}, "logprobs = 258 must be from 0"),
        ({"max_new_tokens": 10**9, "long": "crop"}, "max_new_tokens = 1,000,000,000 must be at most 1,000,000."),
        ({"prompts": Path("x.txt")}, "there are a prompt, 'a', and --prompts x.txt"),
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


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return give


def test_prompts_of_a_file_are_continued_as_each_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfthe cat\r\n\na\nthe cat\n")
    command = [str(tmp_path), "--max-new-tokens", "9", "--temperature", "0", "--device", "cpu"]
    assert cli.main(["sample", *command, "--prompts", str(tmp_path / "prompts.txt"), "--n", "2"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("---")] == [f"--- {n} of 6 ---" for n in range(1, 7)]
    alone = [sample(SampleOptions(str(tmp_path), one, max_new_tokens=9, temperature=0))[0] for one in ("the cat", "a")]
    texts = sample(SampleOptions(str(tmp_path), prompts=tmp_path / "prompts.txt", max_new_tokens=9, temperature=0))
    assert texts == [alone[0], alone[1], alone[0]] and out.count(f"---\n{alone[1]}\n") == 2
    assert re.fullmatch(r"\d+ tokens in .* tokens/s\n", err)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_json_lines_hold_all_of_each_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    write_parrot(tmp_path, b"a\x1b\xff; b\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": n, "prompt": one}) + "\n" for n, one in enumerate(("", "a\n\x1b;x"))))
    options = ["--json", "--logprobs", "2", "--temperature", "0", "--batch", str(batch), "--stop", " b", "--stop", "c"]
    assert main([str(tmp_path), "--prompts", str(prompts), "--max-new-tokens", "5", "--n", "2", *options]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" in err and "\x1b" not in out
    found = lines_of(out)
    assert [one["prompt"] for one in found] == ["", "", "a\n\x1b;x", "a\n\x1b;x"]
    assert found[0]["text"] == "a\x1b\ufffd; " and found[0]["finish_reason"] == "length"
    assert found[2]["text"] == "" and found[2]["finish_reason"] == "stop" and found[2]["tokens"] == list(b" b")
    for one in found:
        assert [kept["token"] for kept in one["logprobs"]] == one["tokens"]
        assert all(kept["logprob"] == kept["top"][0]["logprob"] <= 0 for kept in one["logprobs"])
        assert all(len(kept["top"]) == 2 and kept["text"] == kept["top"][0]["text"] for kept in one["logprobs"])
    assert main([str(tmp_path), "", "--json", "--temperature", "0", "--device", "cpu"]) == 0
    (one,) = lines_of(capsys.readouterr().out)
    assert one["finish_reason"] == "end_of_text" and "logprobs" not in one and one["tokens"][-1] == 256


def test_standard_input_is_a_prompt_or_lines_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], standard_input: Any
) -> None:
    write_model(tmp_path)
    command = [str(tmp_path), "--json", "--max-new-tokens", "2"]
    standard_input(b"two\nlines\r\n")
    assert main([*command, "-"]) == 0
    standard_input(b"two\nlines\r\n")
    assert main([*command, "--prompts", "-"]) == 0
    assert main([*command, "--", "-"]) == 0
    assert [one["prompt"] for one in lines_of(capsys.readouterr().out)] == ["two\nlines", "two", "lines", "-"]
    standard_input(b"\xff")
    with pytest.raises(DataError, match="standard input is not UTF-8 text"):
        main([*command, "-"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: bool) -> None:
    write_parrot(tmp_path, b"so it is")
    sample(SampleOptions(str(tmp_path), "", temperature=0, max_new_tokens=60, stop=("xx", "t is"), stream=stream))
    out, err = capsys.readouterr()
    assert out == "so i\n" and err.startswith("8 tokens in ")


def test_a_text_may_be_longer_than_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    long = sample(SampleOptions(str(tmp_path), "x" * 100, long="crop", max_new_tokens=150, temperature=0))[0]
    assert long.startswith("x" * 100)
    end = sample(SampleOptions(str(tmp_path), "x" * 64, long="crop", max_new_tokens=150, temperature=0))[0]
    assert end == long[36:], "only the last 64 are read"


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("none.txt", None, UsageError, "cannot be read"),
        ("empty.txt", b"\n \n", UsageError, "has no prompt"),
        ("bad.txt", b"a\xff", DataError, "is not UTF-8 text (byte 1)"),
        ("bad.jsonl", b'{"prompt": "a"}\n\n{"prompt": 5}', DataError, "bad.jsonl:3 is"),
        ("bad.jsonl", b'["prompt"]', DataError, "expected an object with the text"),
        ("bad.jsonl", b"[" * 5000, DataError, "bad.jsonl:1 is"),
        ("bad.jsonl", b"prompt", DataError, "bad.jsonl:1 is"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused(
    tmp_path: Path, name: str, data: bytes | None, error: type[Exception], message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error) as caught:
        sample(SampleOptions("nowhere", prompts=tmp_path / name))
    assert message in str(caught.value)
