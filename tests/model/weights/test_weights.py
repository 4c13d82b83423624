"""Weight formats: what we write, transformers reads, and the reverse; what is damaged or no GPT-2 is refused."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gpt import SHAPES, batch, random_gpt, shape_name, transformers_twin
from test_weights_shelf import unpickle_here
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

from regpt2.base.errors import CheckpointError
from regpt2.data.tokenizer import Tokenizer, find_vocab, load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.fill_model import load_into
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import huggingface, native

CONFIG = SHAPES[2]  # 3 layers, 257 tokens of 320 rows
BYTES = Vocabulary("bytes", "f" * 64, eot=256)


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def gpt2_export(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Tokenizer) -> Path:
    """A model with GPT-2's vocabulary in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = Vocabulary("gpt2", gpt2_tokenizer.fingerprint, gpt2_tokenizer.eot, merges=find_vocab().read_bytes())
    huggingface.write(random_gpt(SHAPES[4]), folder, vocabulary)
    return folder


def exported(folder: Path, entry: Any, config: GPTConfig = CONFIG) -> GPT:
    model = random_gpt(config)
    entry.write(model, folder, BYTES)
    return model


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def same(a: GPT, b: GPT) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_native_tensors_are_unpadded_fp32_views() -> None:
    model = random_gpt(CONFIG)
    tensors = native.tensors(model)
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert tensors["wte.weight"].shape == (257, 48)
    assert all(t.is_contiguous() and t.dtype == torch.float32 and not t.requires_grad for t in tensors.values())
    assert tensors["wte.weight"].data_ptr() == model.wte.weight.data_ptr()
    assert native.tensors(random_gpt(CONFIG).bfloat16())["wte.weight"].dtype == torch.float32


def test_loading_sets_the_padding_rows_to_zero() -> None:
    model = GPT(CONFIG)
    torch.nn.init.ones_(model.wte.weight)
    load_into(model, native.tensors(random_gpt(CONFIG)))
    assert same(model, random_gpt(CONFIG))
    assert not model.wte.weight[257:].any()


@pytest.mark.parametrize("config", SHAPES[1:], ids=shape_name)
def test_transformers_reads_our_export(tmp_path: Path, config: GPTConfig) -> None:
    model = exported(tmp_path, huggingface, config)
    read: Any = GPT2LMHeadModel.from_pretrained
    theirs, info = read(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, _ = batch(config)
    with torch.no_grad():
        assert (model(ids) - theirs.eval()(ids).logits).abs().max() < 1e-4
    assert theirs.config.eos_token_id == 256 and theirs.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_we_read_what_transformers_writes(tmp_path: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    model = random_gpt(CONFIG)
    transformers_twin(model).to(dtype).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded = load_model(tmp_path)
    assert same(loaded.model, model.to(dtype).float())
    assert loaded.tokenizer is None


def test_names_without_prefix_masks_and_an_equal_head_are_accepted(tmp_path: Path) -> None:
    """As in the official gpt2 file, and as older versions wrote."""
    model = exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): t.clone() for name, t in raw.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
    old |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path).model, model)


@pytest.mark.process
def test_a_pickle_is_read_as_tensors_only(tmp_path: Path) -> None:
    model = exported(tmp_path, huggingface)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same(load_model(tmp_path).model, model)


def test_pickled_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle_here(monkeypatch)
    model = exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(raw)}
    for shard in set(shards.values()):
        torch.save({name: tensor for name, tensor in raw.items() if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert same(load_model(tmp_path).model, model)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        load_model(tmp_path)


WRAPPED = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("before", WRAPPED)
@pytest.mark.parametrize("within", ["", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_names_by_ddp_and_compile_in_any_order_are_the_models_own(tmp_path: Path, before: str, within: str) -> None:
    """Around the whole, and around each block."""
    model = exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    renamed = {before + name.replace(".mlp.", f".{within}mlp."): tensor for name, tensor in raw.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path).model, model)


def test_the_same_tensor_by_two_names_must_be_the_same(tmp_path: Path) -> None:
    model = exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    twice = {f"module.{name}": tensor.clone() for name, tensor in raw.items() if "wpe" in name}
    save_file(raw | twice, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path).model, model)
    save_file(raw | {name: tensor + 1 for name, tensor in twice.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a second wpe\.weight, with other numbers"):
        load_model(tmp_path)


@pytest.mark.parametrize("positions", ["max_position_embeddings", "n_ctx", "both"])
def test_other_names_of_the_sizes_are_read_as_transformers_reads_them(tmp_path: Path, positions: str) -> None:
    model = exported(tmp_path, huggingface)
    document = json.loads((tmp_path / "config.json").read_text())
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    for key in ("n_embd", "n_layer", "n_head", "n_positions", "n_ctx"):
        del document[key]
    sizes |= {positions: 32} if positions != "both" else {"n_positions": 32, "n_ctx": 1024}  # the first counts
    (tmp_path / "config.json").write_text(json.dumps(document | sizes))
    loaded: Any = load_model(tmp_path).model
    assert same(loaded, model) and loaded.config.n_head == 4
    if positions == "max_position_embeddings":  # transformers passes over n_ctx
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        ids, _ = batch(CONFIG)
        with torch.no_grad():
            assert (loaded(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_a_folder_without_model_type_is_known_by_its_class(tmp_path: Path) -> None:
    model = exported(tmp_path, huggingface)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: document[key] for key in document if key != "model_type"}))
    assert same(load_model(tmp_path).model, model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("file", ["huggingface", "native", "pickle"])
def test_quantized_weights_are_refused_by_their_type(
    tmp_path: Path, dtype: torch.dtype, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpickle_here(monkeypatch)
    exported(tmp_path, native if file == "native" else huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in raw if name.endswith("h.1.mlp.c_fc.weight"))
    raw[name] = raw[name].to(dtype)
    if file == "pickle":
        (tmp_path / "model.safetensors").unlink()
        torch.save(raw, tmp_path / "pytorch_model.bin")
    else:
        save_file(raw, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight.* of type .*: quantized weights, whose"
    ) as caught:
        load_model(tmp_path)
    assert "damaged" not in str(caught.value)


def test_another_head_is_named_with_its_class(tmp_path: Path) -> None:
    exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    save_file(raw | {"score.weight": torch.ones(2, 48)}, tmp_path / "model.safetensors")
    change_json(tmp_path / "config.json", architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"not part of a language model: .* \['GPT2ForSequenceClassification'\]"):
        load_model(tmp_path)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (open_for_writing, (str(self.path),))


def open_for_writing(path: str) -> None:
    Path(path).touch()


@pytest.mark.process
@pytest.mark.parametrize("content", ["code", "garbage", "no dict"])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path, content: str) -> None:
    exported(tmp_path, huggingface)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    if content == "garbage":
        path.write_bytes(b"no zip at all")
    else:
        torch.save({"wte.weight": Evil(tmp_path / "touched")} if content == "code" else torch.ones(3), path)
    with pytest.raises(
        CheckpointError, match=r"holds more than tensors|refers to test_weights\.open_|is no zip archive"
    ):
        load_model(tmp_path)
    assert not (tmp_path / "touched").exists()


class Shell:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def test_what_a_pickle_would_run_is_named_and_torchs_advice_to_run_it_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpickle_here(monkeypatch)
    exported(tmp_path, huggingface)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wte.weight": Shell()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refers to (posix|nt)\.system, which may run code") as caught:
        load_model(tmp_path)
    assert "weights_only" not in str(caught.value)


ODD_TEXTS = [
    "Hello, I'm a language model,",
    "  leading, trailing  and   inner   spaces  \n\n\t tabs\r\n",
    "naïve café Zürich Ελλάδα Привет мир עברית العربية",
    "日本語 한국어 中文 ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff",
    "e\u0301 \u200b\ufeff\u00a0\u2003\x00\x07 it's WE'LL 12345 3.14e-10",
    "".join(map(chr, random.Random(0).choices(range(1, 0xD7FF), k=300))),
]


def test_transformers_tokenizer_from_our_folder_gives_our_ids(gpt2_export: Path, gpt2_tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(gpt2_export)
    assert len(theirs) == gpt2_tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == gpt2_tokenizer.eot
    for text in ODD_TEXTS:
        ids = gpt2_tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_pipeline_takes_our_folder_as_it_is(gpt2_export: Path) -> None:
    generator = pipeline("text-generation", model=str(gpt2_export))
    result = generator("Hello", max_new_tokens=3, do_sample=False, pad_token_id=50256)
    assert result[0]["generated_text"].startswith("Hello")


@pytest.mark.parametrize("beside", ["merges.txt", "tokenizer.json", "other merges", "nothing"])
def test_vocabulary_of_a_foreign_folder_is_told_by_its_merges(
    tmp_path: Path, gpt2_export: Path, gpt2_tokenizer: Tokenizer, beside: str
) -> None:
    transformers_twin(random_gpt(SHAPES[4])).save_pretrained(tmp_path)
    if beside == "tokenizer.json":
        AutoTokenizer.from_pretrained(gpt2_export).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "merges.txt").exists()
    elif beside == "merges.txt":
        merges = (gpt2_export / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2")
        (tmp_path / "merges.txt").write_text("#version: 0.2 - by another writer" + merges, encoding="utf-8")
    elif beside == "other merges":
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    ref = huggingface.read(tmp_path).tokenizer
    if beside == "nothing":
        assert ref is None
    else:
        assert ref is not None and (ref.name == "gpt2") == (ref.objection is None) == (beside != "other merges")
        assert (ref.fingerprint == gpt2_tokenizer.fingerprint) == (beside != "other merges")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama', expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function = 'relu', expected 'gelu_new' or 'gelu'"),
        ({"activation_function": "gelu_10"}, "activation_function = 'gelu_10', expected 'gelu_new' or 'gelu'"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon = '1e-5', expected 1e-05 of type float"),
        ({"scale_attn_weights": None}, "scale_attn_weights = None, expected True of type bool"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of 'gptq': quantized weights"),
        ({"hidden_size": 64}, "n_embd = 48 and hidden_size = 64 are two names of the same size"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many' must be a whole number"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, expected False"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True, expected False"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False, expected True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False, expected True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06, expected 1e-05"),
        ({"n_inner": 100}, "n_inner = 100, this GPT-2 has 4 x n_embd = 192"),
        ({"n_head": 5}, "model.n_embd = 48 must be a multiple of model.n_head = 5; the nearest is 50."),
        ({"n_embd": "wide"}, "config.json: "),
        ({"n_embd": 96}, "tensor wte.weight has shape [257, 48], expected [257, 96]"),
        ({"n_layer": 4}, "tensor h.3.attn.c_attn.bias is missing: got 40 tensors, expected 52"),
        ({"n_layer": 2}, "tensor h.2.attn.c_attn.bias [144] belongs to no GPT of this shape"),
        ({"vocab_size": 300}, "tensor wte.weight has shape [257, 48], expected [300, 48]"),
    ],
    ids=str,
)
def test_what_is_no_gpt2_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    exported(tmp_path, huggingface)
    change_json(tmp_path / "config.json", **values)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, huggingface)
    raw = load_file(tmp_path / "model.safetensors")
    save_file(raw | {"lm_head.weight": raw["transformer.wte.weight"] * 1.0001}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"wte.weight": "../elsewhere.safetensors"}, "points outside of its folder: '../elsewhere.safetensors'"),
        ({"wte.weight": "model-1.safetensors"}, "model-1.safetensors is missing"),
        ({"wte.weight": 7}, "has no object 'weight_map'"),
        (None, "has no object 'weight_map'"),
        ({"other": "shard.safetensors"}, "tensor other is not in shard.safetensors"),
    ],
    ids=str,
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    exported(tmp_path, huggingface)
    (tmp_path / "model.safetensors").rename(tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("entry", [native, huggingface], ids=["native", "huggingface"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], "is damaged or no safetensors file"),
        (lambda data: data[:4], "is damaged or no safetensors file"),
        (lambda data: b"", "(0 bytes) is damaged or no safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "is damaged or no safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "is damaged or no safetensors file"),
    ],
    ids=["cut short", "no header", "empty", "long header", "bad json"],
)
def test_damaged_weights_are_refused(
    tmp_path: Path, entry: Any, damage: Callable[[bytes], bytes], message: str
) -> None:
    exported(tmp_path, entry)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("entry", [native, huggingface], ids=["native", "huggingface"])
def test_a_folder_without_weights_is_refused(tmp_path: Path, entry: Any) -> None:
    exported(tmp_path, entry)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing|holds no weights: expected model"):
        load_model(tmp_path)


MODEL = {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 32, "vocab_size": 257}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "has version 2 of the native format, expected 1; it needs another version of regpt2."),
        ({"model": None}, "has no object 'model'"),
        ({"model": MODEL | {"n_layers": 3}}, "model.n_layers is not a setting of a GPT; did you mean 'n_layer'?"),
        ({"model": MODEL | {"n_layer": 3.0}}, "model.n_layer = 3.0 must be of type int."),
        ({"model": MODEL | {"n_layer": True}}, "model.n_layer = True must be of type int."),
        ({"model": {"n_layer": 3}}, "model.n_head is missing."),
        ({"model": MODEL | {"n_head": 5}}, "model.n_embd = 48 must be a multiple of model.n_head = 5"),
        (
            {"model": MODEL | {"block_size": 33}},
            "wpe.weight has shape [32, 48], expected [33, 48] by the configuration: ",
        ),
        ({"tokenizer": {"name": "gpt2"}}, "must have a 'name' and a 'fingerprint', or be null."),
    ],
    ids=str,
)
def test_a_wrong_native_configuration_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    exported(tmp_path, native)
    change_json(tmp_path / "config.json", **values)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)


def test_refused_tensors_change_nothing() -> None:
    model, before = random_gpt(CONFIG), random_gpt(CONFIG)
    tensors = native.tensors(random_gpt(CONFIG, seed=9))
    with pytest.raises(
        CheckpointError,
        match=r"tensor ln_f\.weight has shape \[47\], expected \[48\] by the config",
    ):
        load_into(model, tensors | {"ln_f.weight": torch.ones(47)})
    assert same(model, before)


# Planted bugs: a conversion that forgets to transpose, in either direction, does not pass the comparison above.


def test_planted_wrong_transposition_on_writing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """c_proj of attention is square: a shape check cannot see it, only logits can."""
    monkeypatch.setattr(huggingface, "_CONV1D", ("c_attn.weight", "mlp.c_proj.weight", "c_fc.weight"))
    model = exported(tmp_path, huggingface)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids, _ = batch(CONFIG)
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() > 1e-2


def test_planted_wrong_transposition_on_reading_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_gpt(CONFIG)
    transformers_twin(model).save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface, "_CONV1D", ("c_attn.weight", "mlp.c_proj.weight", "c_fc.weight"))
    ids, _ = batch(CONFIG)
    with torch.no_grad():
        assert (model(ids) - load_model(tmp_path).model(ids)).abs().max() > 1e-2
