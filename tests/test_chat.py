"""A chat model in other formats: the same prompts, the same answers, and they end where they should."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import write_random

from regpt2.commands.convert import ConvertOptions, convert
from regpt2.data.chat_template import SPECIAL, TEMPLATE, Message, encode, prompt_ids, render
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import gguf, huggingface, native
from regpt2.sampling.chat.conversation import Chat, ChatOptions
from regpt2.sampling.tokenizer import tokenizer_of

TALK = [
    Message("system", " Be brief. "),
    Message("user", "Hello, naïve 🙂\n\n 1 <|im_en"),
    Message("assistant", "Yes."),
]
TALK += [Message("user", "'s 2 + 2?")]
END = 50258


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chat model with GPT-2's tokenizer in three formats; its answers end after some tokens."""
    place = tmp_path_factory.mktemp("chat")
    write_random(place / "native", ends_at=60)
    with pytest.MonkeyPatch.context() as patch:  # starting the programs of others takes seconds each
        for entry in (gguf, huggingface):
            patch.delattr(entry, "client_logits")
        convert(ConvertOptions(str(place / "native"), place / "huggingface", to="huggingface"))
        convert(ConvertOptions(str(place / "huggingface"), place / "gguf", to="gguf"))
    return {name: place / name for name in ("native", "huggingface", "gguf")}


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in messages]


@functools.cache
def chat_of(path: Path) -> Chat:
    loaded = load_model(str(path))
    return Chat(loaded, tokenizer_of(loaded), ChatOptions(str(path), device="cpu", temperature=0))


@functools.cache
def answer_of(path: Path) -> str:
    answer = chat_of(path).answer(TALK)
    assert answer.finished and answer.n_dropped == 0
    return answer.text


def test_exports_keep_the_special_tokens_and_answer_alike(folders: dict[str, Path]) -> None:
    answers = {name: answer_of(path) for name, path in folders.items()}
    assert len(set(answers.values())) == 1 and len(answers["native"]) > 5
    for path in folders.values():
        assert (ref := load_model(str(path)).tokenizer) is not None and ref.added == SPECIAL


def test_transformers_renders_and_encodes_the_exported_template_alike(folders: dict[str, Path]) -> None:
    theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folders["huggingface"])
    ours = chat_of(folders["native"]).tokenizer
    for messages, asked in ((TALK, True), (TALK[:3], False), (TALK[1:2], True)):
        text = theirs.apply_chat_template(dicts(messages), tokenize=False, add_generation_prompt=asked)
        assert text == render(messages, add_generation_prompt=asked)
        ids = theirs.apply_chat_template(dicts(messages), add_generation_prompt=asked, return_dict=False)
        assert ids == [50256, *encode(messages, ours, add_generation_prompt=asked)[0].tolist()]
    settings = json.loads((folders["huggingface"] / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE


def test_transformers_generates_our_answer_and_stops_at_its_end(folders: dict[str, Path]) -> None:
    transformers: Any = importlib.import_module("transformers")
    folder = folders["huggingface"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.generation_config.eos_token_id == [50256, END]
    prompt = prompt_ids(TALK, chat_of(folder).tokenizer)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(ids) < len(prompt) + 40 and ids[-1] == END
    assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip() == answer_of(folders["native"])
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe(dicts(TALK), max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]
    assert said["role"] == "assistant" and said["content"].strip() == answer_of(folders["native"])


def test_the_gguf_package_finds_template_types_and_end(folders: dict[str, Path]) -> None:
    reader: Any = pytest.importorskip("gguf").GGUFReader(folders["gguf"])
    assert reader.get_field("tokenizer.chat_template").contents() == TEMPLATE
    assert [reader.get_field(f"tokenizer.ggml.{key}_token_id").contents() for key in ("eot", "eos")] == [END, 50256]
    types = reader.get_field("tokenizer.ggml.token_type")
    assert [int(types.parts[n][0]) for n in types.data[50255:]] == [1, 3, 3, 3]


def test_a_model_that_is_no_chat_model_has_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huggingface, "client_logits")
    monkeypatch.delattr(gguf, "client_logits")
    folder, base = tmp_path / "a", load_tokenizer("gpt2")
    folder.mkdir()
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, vocab_size=50258))
    native.write(model, folder, TokenizerRef("gpt2", base.fingerprint, added=("<|im_end|>",)))
    convert(ConvertOptions(str(folder), tmp_path / "b", to="huggingface"))
    convert(ConvertOptions(str(folder), tmp_path / "c", to="gguf"))
    assert "chat_template" not in (tmp_path / "b" / "tokenizer_config.json").read_text()
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 50256, "eos_token_id": 50256}
    assert (
        b"chat_template" not in (tmp_path / "c").read_bytes() and b"eot_token_id" not in (tmp_path / "c").read_bytes()
    )
