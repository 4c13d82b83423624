"""The verb convert: there and back again without a bit changed; what is not proven does not appear."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from regpt2.base import shelves
from regpt2.base.errors import CheckpointError, Problem, UsageError
from regpt2.commands.convert import ConvertOptions, convert, main
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model import architecture
from regpt2.model.conversion import TOLERANCE, largest_difference
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.gpt import GPT, Block, GPTConfig
from regpt2.model.language_model import LayerCache
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.model.weights import gguf, huggingface, native, onnx

ONLY_GPT2 = ["gguf", "huggingface", "llmc", "nanogpt"]
WITH_CLIENTS = [gguf, huggingface, onnx]


@pytest.fixture(autouse=True)
def no_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the programs of others takes seconds each: tests/clients/ does that."""
    for entry in WITH_CLIENTS:
        monkeypatch.delattr(entry, "client_logits")


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


@pytest.mark.seconds
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
    with pytest.raises(UsageError, match="is not empty; choose another, or replace an earlier export"):
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


FILES = ["gguf", "nanogpt", "safetensors"]
ROUNDED = [("gguf", "fp16"), ("gguf", "bf16"), ("gguf", "q8_0"), ("llmc", "bf16"), ("safetensors", "fp16")]


@pytest.mark.process
@pytest.mark.parametrize("to", [*FILES, "llmc"])
def test_every_format_there_and_back_to_the_same_bytes(tmp_path: Path, to: str) -> None:
    write_native(tmp_path / "a", config=replace(SMALL, activation="gelu" if to == "nanogpt" else "gelu_tanh"))
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to=to))
    assert (tmp_path / "b").is_file() == (to in FILES)
    convert(ConvertOptions(str(tmp_path / "b"), tmp_path / "c", to="native"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(("to", "dtype"), ROUNDED)
def test_rounded_weights_are_within_the_rounding_of_their_type(
    tmp_path: Path, to: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(tmp_path / "a", config=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", to, "--dtype", dtype]) == 0
    assert (
        f"as {to}, {dtype}. Read back, every weight is the nearest in {dtype}; the largest" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("to", "dtype"), [("gguf", "bf16"), ("gguf", "q8_0")])
def test_weights_that_are_cut_and_not_rounded_are_seen(
    tmp_path: Path, to: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the writer drops what does not fit, as a cast of bits does; logits hardly tell."""
    write_native(tmp_path / "a", config=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    encoded = gguf._encoded

    def cut(tensor: Tensor, kind: int) -> bytes:
        if kind == 30:
            return encoded((tensor.view(torch.int32) & -65536).view(torch.float32), kind)
        return encoded(tensor, kind)

    monkeypatch.setattr(gguf, "_encoded", cut)
    monkeypatch.setattr(gguf.np, "copysign", lambda half, value: 0 * value)
    with pytest.raises(CheckpointError, match=f"tensor .* differs, expected the nearest values of {dtype}"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to=to, dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    model = GPT(SMALL)
    with torch.no_grad():
        model.get_parameter("h.0.mlp.c_fc.weight")[3, 5] = 1e5
    (tmp_path / "a").mkdir()
    native.write(model, tmp_path / "a", None)
    with pytest.raises(CheckpointError, match="its logits differ by nan of the largest"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="safetensors", dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_impossible_types_and_one_way_formats_are_refused(tmp_path: Path) -> None:
    write_native(tmp_path / "a")
    src, out = str(tmp_path / "a"), tmp_path / "b"
    assert "native can be written as fp32." in refused(ConvertOptions(src, out, to="native", dtype="fp16"))
    assert "gguf can be written as fp32, fp16, bf16, q8_0." in refused(ConvertOptions(src, out, to="gguf", dtype="q4"))
    assert "can only read that format" in refused(ConvertOptions(src, out, to="openai_tf"))
    assert "n_embd = 16 is not a multiple of 32" in refused(ConvertOptions(src, out, to="gguf", dtype="q8_0"))
    assert not out.exists()


def test_a_file_is_replaced_by_force_only_and_only_if_it_is_a_model(tmp_path: Path) -> None:
    write_native(tmp_path / "a")
    src, out = str(tmp_path / "a"), tmp_path / "out"
    out.write_text("years of work")
    assert "exists; choose another" in refused(ConvertOptions(src, out, to="gguf"))
    assert "is not from an export" in refused(ConvertOptions(src, out, to="gguf", force=True))
    out.unlink()
    convert(ConvertOptions(src, out, to="gguf"))
    convert(ConvertOptions(src, out, to="safetensors", force=True))
    assert load_model(out).model.config == SMALL
    (tmp_path / "folder").mkdir()
    assert "is a folder; name a file." in refused(ConvertOptions(src, tmp_path / "folder", to="gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "out"]


@pytest.mark.parametrize("answer", ["other logits", "a refusal", "its end", "nothing"])
def test_a_client_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process. The pool's own way of saying that a client took its process along is played."""
    write_native(tmp_path / "a")

    def client_logits(path: Path, ids: Tensor) -> Tensor | None:
        if answer == "a refusal":
            raise ValueError("I do not like it")
        if answer == "its end":
            raise BrokenProcessPool
        return None if answer == "nothing" else load_model(path).model(ids)[:, -1].detach() * 1.02

    monkeypatch.setattr(gguf, "client_logits", client_logits, raising=False)
    monkeypatch.setattr("regpt2.model.conversion.ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    options = ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="gguf")
    if answer == "nothing":
        convert(options)
        assert "llama.cpp is not installed" in capsys.readouterr().err
        return
    expected = {"other logits": "differ by", "a refusal": r"\(I do not like it\)", "its end": "BrokenProcessPool"}
    with pytest.raises(CheckpointError, match=f"llama.cpp .*{expected[answer]}"):
        convert(options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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
    with pytest.raises(Problem, match=r"a model as native needs .* MB and 0\.0 MB are free"):
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="native"))
    assert not (tmp_path / "b").exists()


class OwnBlock(Block):
    """The same weights, another mathematics."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        return super().forward(x, cache).flip(-1)


class OwnGPT(GPT):
    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.h[1] = OwnBlock(config)


class SilentGPT(GPT):
    """Computes the same logits today: they prove nothing about a class of its own."""


@dataclass(frozen=True, kw_only=True)
class OwnConfig(GPTConfig):
    architecture: str = "own"


def a_swapped_block() -> GPT:
    model = GPT(SMALL)
    model.h[0] = OwnBlock(SMALL)
    return model


@pytest.mark.parametrize("to", [*ONLY_GPT2, "native", "onnx", "safetensors"])
@pytest.mark.parametrize(
    "make",
    [lambda: OwnGPT(SMALL), a_swapped_block, lambda: SilentGPT(SMALL)],
    ids=["subclass", "swapped", "silent"],
)
def test_a_gpt_with_parts_of_its_own_is_refused(
    tmp_path: Path, to: str, make: Callable[[], GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regpt2.commands.convert.load_model", lambda _: LoadedModel(make().eval(), None, "mine"))
    said = refused(ConvertOptions("mine", tmp_path / "out", to=to))
    assert said.startswith(f"--to {to}: mine is not the gpt2 model that its configuration describes")
    assert not any(tmp_path.iterdir())


def test_a_subclass_of_the_modern_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnModern(ModernGPT):
        pass

    model = OwnModern(ModernConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=257)).eval()
    monkeypatch.setattr("regpt2.commands.convert.load_model", lambda _: LoadedModel(model, None, "mine"))
    said = refused(ConvertOptions("mine", tmp_path / "out", to="native"))
    assert "mine is not the modern model that its configuration describes: its OwnModern is a subclass" in said


@pytest.fixture
def own_architecture(monkeypatch: pytest.MonkeyPatch) -> OwnGPT:
    entry = SimpleNamespace(Config=OwnConfig, Model=OwnGPT)
    monkeypatch.setitem(shelves._plugins, (architecture.SHELF, "own"), entry)
    return OwnGPT(OwnConfig(**{name: getattr(SMALL, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}))


@pytest.mark.parametrize("to", ["native", "safetensors"])
def test_an_architecture_on_top_of_gpt_keeps_its_own_blocks(tmp_path: Path, to: str, own_architecture: OwnGPT) -> None:
    (tmp_path / "a").mkdir()
    native.write(own_architecture, tmp_path / "a", None)
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to=to))
    copy, ids = load_model(tmp_path / "b").model, torch.arange(30)[None]
    assert type(copy) is OwnGPT
    with torch.no_grad():
        assert torch.equal(copy(ids), own_architecture.eval()(ids))


@pytest.mark.parametrize("to", ONLY_GPT2)
def test_an_architecture_on_top_of_gpt_is_not_written_as_gpt2(
    tmp_path: Path, to: str, own_architecture: OwnGPT
) -> None:
    (tmp_path / "a").mkdir()
    native.write(own_architecture, tmp_path / "a", None)
    said = refused(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to=to))
    assert "holds GPT-2 alone" in said and "'own' with parts of its own" in said
