"""What we write as GGUF, in the hands of llama.cpp and of its own Python reader."""

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import write_random

from regpt2.base.byte_level.merges import merges_in, vocab_bytes
from regpt2.base.errors import CheckpointError
from regpt2.commands.convert import ConvertOptions, convert
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import Message, prompt_ids, render
from regpt2.data.tokenizer import BytePairTokenizer, Tokenizer, find_vocab, load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf as our_gguf
from regpt2.model.weights import native
from regpt2.sampling.chat.conversation import Chat, ChatOptions
from regpt2.sampling.tokenizer import tokenizer_of, vocabulary_of

pytestmark = pytest.mark.clients
TEXT = "Hello, I'm a language model — naïve 日本語 🙂\n\n  12345"
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


def known(name: str) -> Tokenizer:
    """A built-in tokenizer, or for "bpe" one of one's own: GPT-2's first 1,000 merges."""
    if name != "bpe":
        return load_tokenizer(name)
    return BytePairTokenizer(vocab_bytes(merges_in(find_vocab().read_bytes())[:1000]))


def vocabulary(name: str) -> Vocabulary:
    tokenizer = known(name)
    return Vocabulary(name, tokenizer.fingerprint, tokenizer.eot, tokenizer.vocab)


@torch.no_grad()
def random_model(vocab_size: int) -> GPT:
    """Every tensor is another."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=vocab_size))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        p.normal_(mean=1.0 if "ln" in name and name.endswith("weight") else 0.0, std=0.15, generator=generator)
    model.wte.weight[vocab_size:] = 0.0
    return model.eval()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_reader_of_the_gguf_package_finds_the_same_numbers(tmp_path: Path, dtype: str) -> None:
    """And its quantizer writes the same bytes."""
    gguf: Any = pytest.importorskip("gguf")
    model, kind = random_model(257), gguf.GGMLQuantizationType[TYPES[dtype]]
    our_gguf.write(model, tmp_path / "a.gguf", vocabulary("bytes"), dtype)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, p in tensors_of(model).items():
        tensor = found.pop(names.get_name(f"transformer.{name}", (".weight", ".bias")))
        matrix = p.dim() == 2 and name != "wpe.weight"
        expected = gguf.quants.quantize(p.numpy(), kind) if matrix else p.numpy()
        assert tensor.tensor_type == (kind if matrix else gguf.GGMLQuantizationType.F32)
        assert tensor.data.tobytes() == expected.tobytes(), name
    assert not found
    assert reader.get_field("general.architecture").contents() == "gpt2"


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    model = random_model(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gpt2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_token_list(["a"] * 257)
    writer.add_token_types([1] * 257)
    for name, p in tensors_of(model).items():
        writer.add_tensor(names.get_name(f"transformer.{name}", (".weight", ".bias")), p.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert all(map(torch.equal, model.parameters(), load_model(tmp_path / "a.gguf").model.parameters()))


def served(path: Path, n_ctx: int = 64) -> Any:
    xllamacpp: Any = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity, params.warmup = str(path), n_ctx, 1, -1, False
    return xllamacpp.Server(params)


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt2", "fp32"), ("gpt2", "q8_0"), ("bytes", "bf16"), ("bytes", "fp16"), ("bpe", "fp32")]
)
def test_convert_asks_llamacpp(tmp_path: Path, name: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "a").mkdir()
    native.write(random_model(known(name).vocab_size), tmp_path / "a", vocabulary(name))
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf", dtype=dtype))
    assert "llama.cpp computes the same log probabilities within" in capsys.readouterr().out


@pytest.mark.parametrize("added", [("[PAD]", "<|user|>"), (None,) * 47], ids=["named", "padded"])
def test_convert_asks_llamacpp_of_rows_beyond_gpt2s(
    tmp_path: Path, added: tuple[str | None, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "a").mkdir()
    native.write(random_model(50257 + len(added)), tmp_path / "a", replace(vocabulary("gpt2"), added=added))
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf"))
    assert "llama.cpp computes the same log probabilities within" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "bytes", "bpe"])
def test_llamacpp_makes_our_ids_of_a_text(tmp_path: Path, name: str) -> None:
    """It has no call for ids alone: it counts them, and text and ids give the same next token."""
    tokenizer = known(name)
    our_gguf.write(random_model(tokenizer.vocab_size), tmp_path / "a.gguf", vocabulary(name))
    server = served(tmp_path / "a.gguf")
    text = TEXT[:40]
    asked: dict[str, Any] = {"max_tokens": 1, "logprobs": 5, "cache_prompt": False, "logit_bias": [[64, 1e4]]}
    by_text, by_ids = (server.handle_completions({"prompt": p} | asked) for p in (text, tokenizer.encode(text)))
    assert by_text["usage"]["prompt_tokens"] == len(tokenizer.encode(text))
    assert by_text["choices"][0]["logprobs"]["content"] == by_ids["choices"][0]["logprobs"]["content"]


def asked_of(server: Any, path: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_llamacpp_renders_encodes_and_answers_a_conversation_alike(tmp_path: Path) -> None:
    """Its trim removes ASCII's white space alone, and it parses special tokens in a message: documented."""
    write_random(tmp_path / "a", ends_at=60)
    loaded = load_model(str(tmp_path / "a"))
    tokenizer = tokenizer_of(loaded)
    assert isinstance(tokenizer, AddedTokens)
    our_gguf.write(loaded.model, tmp_path / "a.gguf", vocabulary_of(loaded))
    server, system = served(tmp_path / "a.gguf", n_ctx=128), Message("system", "\tBe brief.\r\n")
    for content in ("'s 2 + 2?", " naïve 🙂\n\n 1 <|im_en ", "12\n  def f():\n", "日本語", "... e\u0301", ""):
        turns = [Message("user", content), Message("assistant", "Yes."), Message("user", content or "a")]
        for messages in ([system, *turns], turns[:1]):
            dicts = [{"role": one.role, "content": one.content} for one in messages]
            prompt = asked_of(server, "/apply-template", {"messages": dicts})["prompt"]
            assert prompt == render(messages, add_generation_prompt=True)
            found = asked_of(server, "/tokenize", {"content": prompt, "parse_special": True})["tokens"]
            assert found == prompt_ids(messages, tokenizer)
    talk = [system, Message("user", "2 + 2?"), Message("assistant", "4"), Message("user", "'s 3 + 3?")]
    dicts = [{"role": one.role, "content": one.content} for one in talk]
    said = server.handle_chat_completions({"messages": dicts, "temperature": 0, "max_tokens": 60})["choices"][0]
    ours = Chat(loaded, tokenizer, ChatOptions("", device="cpu", temperature=0)).answer(talk)
    assert said["finish_reason"] == "stop" and ours.finished and len(ours.text) > 20
    assert said["message"]["content"].strip() == ours.text


def test_a_file_that_only_llamacpp_finds_wrong_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: reader and writer share a mistake, norms in each other's place, so that reading back shows nothing."""
    pytest.importorskip("xllamacpp")
    (tmp_path / "a").mkdir()
    native.write(random_model(257), tmp_path / "a", vocabulary("bytes"))
    names = our_gguf._BLOCK_NAMES | {"attn_norm": "ln_2", "ffn_norm": "ln_1"}
    monkeypatch.setattr(our_gguf, "_BLOCK_NAMES", names)
    with pytest.raises(CheckpointError, match=r"llama\.cpp computes log probabilities that differ by"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "a.gguf", to="gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
