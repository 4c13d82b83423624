"""The Hugging Face format. In: a folder as `transformers` writes it; out: a model's files, and back, without it.

`AutoModelForCausalLM`, `AutoTokenizer` and `pipeline` accept a written folder as it is. Their names have the prefix
`transformer.`, and their Conv1D stores a weight as (in, out) where nn.Linear has (out, in).
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.files import write_atomic
from regpt2.model.files.binary import drop_equal_head, own_weights
from regpt2.model.files.contract import CONFIG, QUANTIZED, TORCH_DTYPES, WEIGHTS, ModelFiles, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.native_config import describe_tokenizer, parse_tokenizer
from regpt2.model.files.safe_json import peek_json, read_json, write_json
from regpt2.model.files.safe_pickle import read_pickled
from regpt2.model.files.tensors import read_tensors
from regpt2.model.files.tokenizer_files import FILES as TOKENIZER_FILES
from regpt2.model.files.tokenizer_files import read_tokenizer, write_tokenizer
from regpt2.model.files.vocabulary import token_texts
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.activation import Activation

PICKLE = "pytorch_model.bin"
FILES = (CONFIG, WEIGHTS, "generation_config.json", *TOKENIZER_FILES)
DTYPES = ("fp32", "bf16", "fp16")
CHARACTERS_NOTE = "They are in config.json for regpt2; transformers has no tokenizer of this kind."
CLIENT = "transformers"
PREFIX = "transformer."
_SHARD = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# For each size GPT-2's own key of config.json, and the key of other models: transformers reads both.
_KEYS = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
}
# Transformers' names for the two forms of GELU, of each the one that we write first. gelu_10 and others are neither.
_GELUS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    "gelu_python": "gelu",
}
# Keys of config.json and the values of them that are our GPT-2, the default of transformers first.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(_GELUS),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def matches(path: Path) -> bool:
    """Does `config.json` name a model type, as every one of transformers does, or at least a class of GPT-2's?"""
    document = peek_json(path / CONFIG)
    return "model_type" in document or "GPT2" in str(document.get("architectures"))


def read(path: Path) -> ModelFiles:
    """The model in folder `path`: one file or shards, safetensors or pickled, 16-bit weights as fp32."""
    files, architectures = peek(path), read_json(path / CONFIG).get("architectures")
    return replace(files, tensors=_our_tensors(path, _read_raw(path), architectures))


def peek(path: Path) -> ModelFiles:
    """The same without its tensors."""
    document = read_json(path / CONFIG)
    config = _config(path / CONFIG, document)
    ours = document.get("regpt2")  # the note of our own export; files of another tokenizer may have been added since
    note = ours.get("tokenizer") if isinstance(ours, dict) else None
    tokenizer = read_tokenizer(path, config.vocab_size) or parse_tokenizer(path / CONFIG, note)
    return ModelFiles(config, {}, tokenizer)


def write(model: GPT, folder: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write the model into `folder`, the configuration last; of a tokenizer whose tokens are known, its files too."""
    theirs = {
        PREFIX + name: (p.T if name.endswith(_CONV1D) else p).to(TORCH_DTYPES[dtype]).contiguous()
        for name, p in tensors_of(model).items()
    }
    write_atomic(folder / WEIGHTS, save(theirs, metadata={"format": "pt"}))
    write_json(folder / "generation_config.json", _generation(vocabulary))
    if vocabulary is not None and token_texts(vocabulary) is not None:
        write_tokenizer(folder, vocabulary, model.config.block_size)
    dtype_name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    write_json(folder / CONFIG, _their_config(model.config, vocabulary) | {"dtype": dtype_name})


@torch.no_grad()
def client_logits(folder: Path, ids: Tensor) -> Tensor | None:
    """What transformers computes with the folder, in fp32."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(ids).logits[:, -1]
    return logits


def _generation(vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Where generation ends: of a chat model at the end of an answer too, which config.json has no place for."""
    eot = None if vocabulary is None else vocabulary.eot
    if vocabulary is None or vocabulary.end_of_turn is None:
        return {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot}
    return {"bos_token_id": eot, "eos_token_id": [eot, vocabulary.end_of_turn], "pad_token_id": eot}


def _their_config(config: GPTConfig, vocabulary: Vocabulary | None) -> dict[str, Any]:
    eot = None if vocabulary is None else vocabulary.eot
    document: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{size: getattr(config, size) for size in ("n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        "vocab_size": config.vocab_size,
        "activation_function": next(name for name, form in _GELUS.items() if form == config.activation),
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        "tie_word_embeddings": True,
    }
    if vocabulary is not None:  # read by us alone; transformers keeps unknown keys
        document["regpt2"] = {"tokenizer": describe_tokenizer(vocabulary)}
    return document


def _config(place: Path, document: dict[str, Any]) -> GPTConfig:
    if document.get("quantization_config") is not None:
        got = document["quantization_config"]
        method = got.get("quant_method") if isinstance(got, dict) else got
        raise CheckpointError(f"{place}: quantization_config of {method!r:.80}: {QUANTIZED}")
    for key, supported in _SUPPORTED.items():
        got, expected = document.get(key, supported[0]), " or ".join(map(repr, supported[:2]))
        if type(got) is not type(supported[0]) or got not in supported:
            raise CheckpointError(
                f"{place}: {key} = {got!r:.80}, expected {expected} of type {type(supported[0]).__name__}; correct the "
                "key or leave it out, unless this is another model than GPT-2."
            )
    sizes: dict[str, Any] = {name: _size(place, document, name) for name in _KEYS}
    if document.get("n_inner") not in (None, inner := 4 * sizes["n_embd"]):
        raise CheckpointError(f"{place}: n_inner = {document['n_inner']}, this GPT-2 has 4 x n_embd = {inner}.")
    try:
        return GPTConfig(
            **sizes,
            activation=_GELUS[document.get("activation_function", "gelu_new")],
            dropout=document.get("resid_pdrop", 0.1),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{place}: {error}") from None


def _size(place: Path, document: dict[str, Any], name: str) -> int:
    """A size of the model; where the configuration leaves it out, GPT-2's value."""
    given = {key: document[key] for key in _KEYS[name] if key in document}
    if not given and name == "block_size" and "n_ctx" in document:  # the oldest files have only this
        given = {"n_ctx": document["n_ctx"]}
    for key, value in given.items():
        if type(value) is not int:
            raise CheckpointError(f"{place}: {key} = {value!r:.80} must be a whole number.")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{key} = {value}" for key, value in given.items())
        raise CheckpointError(f"{place}: {both} are two names of the same size; leave the wrong one out.")
    return int(next(iter(given.values()), getattr(GPTConfig, name)))


def _read_raw(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder as stored, from the same files that transformers would take."""
    for name, read_file in {WEIGHTS: read_tensors, PICKLE: read_pickled}.items():
        if (folder / name).exists():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return _read_shards(folder / f"{name}.index.json", read_file)
    raise CheckpointError(
        f"{folder} holds no weights: expected {WEIGHTS} or {PICKLE}, or the .index.json of either with its shards."
    )


def _read_shards(index: Path, read_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no object 'weight_map' from tensors to files.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if not _SHARD.fullmatch(file):
            raise CheckpointError(f"{index} points outside of its folder: {file!r:.100}, expected a file name.")
        tensors |= read_file(index.parent / file)
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{index}: tensor {lost[0]} is not in {weight_map[lost[0]]}.")
    return tensors


def _our_tensors(folder: Path, raw: dict[str, Tensor], architectures: Any) -> dict[str, Tensor]:
    """With GPT's names and orientation, in fp32; without masks, and without a head that only repeats `wte`."""
    tensors = own_weights(folder, raw)
    for name in tensors:
        if name.split(".")[0] not in ("wte", "wpe", "h", "ln_f", "lm_head"):
            raise CheckpointError(
                f"{folder}: tensor {name} is not part of a language model: it was saved as {architectures!r:.80}, "
                "expected GPT2LMHeadModel or GPT2Model. To use it as a language model, save its `transformer` alone."
            )
    drop_equal_head(folder, tensors)
    return {name: tensor.T if name.endswith(_CONV1D) else tensor for name, tensor in tensors.items()}
