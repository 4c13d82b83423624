"""The Hugging Face format. In: a folder as `transformers` writes it; out: a model's files, and back, without it.

Written so that `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline` take the folder as it is. Their names have the
prefix `transformer.`, and their Conv1D keeps a weight as (in, out) where nn.Linear has (out, in).
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.files import read_small, write_atomic
from regpt2.model.foreign import END_OF_TEXT, drop_equal_head, gpt2_tokenizer, token_texts
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.load import (
    CONFIG,
    TORCH_DTYPES,
    WEIGHTS,
    ModelFiles,
    TokenizerRef,
    Vocabulary,
    peek_json,
    read_json,
    read_tensors,
    tensors_of,
)
from regpt2.model.pickled import read_pickled

INDEX, PICKLE = f"{WEIGHTS}.index.json", "pytorch_model.bin"
FILES = (CONFIG, WEIGHTS, "generation_config.json", "merges.txt", "vocab.json", "tokenizer_config.json")
DTYPES = ("fp32", "bf16", "fp16")
CLIENT = "transformers"
PREFIX = "transformer."
_SHARD = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, kept as weights by older versions

# What our GPT-2 is, by key of config.json: the values that it can stand for, the default of transformers first.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def matches(path: Path) -> bool:
    """Does `config.json` name a model type, as every one of transformers does?"""
    return "model_type" in peek_json(path / CONFIG)


def read(path: Path) -> ModelFiles:
    """The model in folder `path`: one file or shards, with or without the prefix, 16-bit weights as fp32.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is no GPT-2.
    """
    document = read_json(path / CONFIG)
    config = _config(path / CONFIG, document)
    return ModelFiles(config, _our_tensors(path, _read_raw(path)), _tokenizer(path, document.get("regpt2")))


def write(model: GPT, folder: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write the model into `folder`, the configuration last; with GPT-2's vocabulary, the tokenizer's files too."""
    theirs = {
        PREFIX + name: (p.T if name.endswith(_CONV1D) else p).to(TORCH_DTYPES[dtype]).contiguous()
        for name, p in tensors_of(model).items()
    }
    write_atomic(folder / WEIGHTS, save(theirs, metadata={"format": "pt"}))
    eot = None if vocabulary is None else vocabulary.eot
    _write_json(
        folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot}
    )
    if vocabulary is not None and vocabulary.merges is not None:
        _write_tokenizer(folder, vocabulary, model.config.block_size)
    dtype_name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    _write_json(folder / CONFIG, _their_config(model.config, vocabulary) | {"dtype": dtype_name})


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


def _their_config(config: GPTConfig, vocabulary: Vocabulary | None) -> dict[str, Any]:
    eot = None if vocabulary is None else vocabulary.eot
    document: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": True,
    }
    if vocabulary is not None:  # for our own reading; transformers keeps what it does not know
        document["regpt2"] = {"tokenizer": {"name": vocabulary.name, "fingerprint": vocabulary.fingerprint}}
    return document


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, block_size: int) -> None:
    """The three files from which transformers makes GPT-2's tokenizer."""
    ids = {token: n for n, token in enumerate(token_texts(vocabulary) or ())}
    write_atomic(folder / "merges.txt", vocabulary.merges or b"")
    write_atomic(folder / "vocab.json", json.dumps(ids))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": block_size,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        },
    )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def _config(place: Path, document: dict[str, Any]) -> GPTConfig:
    for key, supported in _SUPPORTED.items():
        got = document.get(key, supported[0])
        if got not in supported:
            expected = " or ".join(map(repr, supported))
            raise CheckpointError(f"{place}: {key} = {got!r}, expected {expected}: it is another model than GPT-2.")
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(document.get(key, 1)) is not int:
            raise CheckpointError(f"{place}: {key} = {document[key]!r:.80} must be a whole number.")
    n_embd = document.get("n_embd", 768)
    if document.get("n_inner") not in (None, 4 * n_embd):
        raise CheckpointError(f"{place}: n_inner = {document['n_inner']}, this GPT-2 has 4 x n_embd = {4 * n_embd}.")
    try:
        return GPTConfig(
            n_layer=document.get("n_layer", 12),
            n_head=document.get("n_head", 12),
            n_embd=n_embd,
            block_size=document.get("n_positions", 1024),
            vocab_size=document.get("vocab_size", 50257),
            dropout=document.get("resid_pdrop", 0.1),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{place}: {error}") from None


def _tokenizer(folder: Path, ours: Any) -> TokenizerRef | None:
    """The vocabulary by our own export's note, else by the merges beside the weights; None where there is neither."""
    try:
        return TokenizerRef(str(ours["tokenizer"]["name"]), str(ours["tokenizer"]["fingerprint"]))
    except (TypeError, KeyError):
        merges = _merges(folder)
    return None if merges is None else gpt2_tokenizer(merges)


def _merges(folder: Path) -> list[str] | None:
    """The merges of a byte-pair encoding, "a b" each, from either of the files that can hold them."""
    if (folder / "merges.txt").exists():
        try:
            lines = read_small(folder / "merges.txt", CheckpointError).split("\n")
        except ValueError as error:
            raise CheckpointError(f"{folder / 'merges.txt'} is no text ({error}); copy it again.") from None
        return [line for line in lines if line and not line.startswith("#version")]
    bpe = peek_json(folder / "tokenizer.json").get("model")
    merges = bpe.get("merges") if isinstance(bpe, dict) else None
    if not isinstance(merges, list):
        return None
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]


def _read_raw(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, as they are there."""
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / PICKLE).exists():
        return read_pickled(folder / PICKLE)
    raise CheckpointError(f"{folder} holds none of {WEIGHTS}, {INDEX}, {PICKLE}: there are no weights to read.")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no object 'weight_map' from tensors to files.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if not _SHARD.fullmatch(file):
            raise CheckpointError(
                f"{folder / INDEX} points outside of its folder: {file!r:.100}, expected a file name."
            )
        tensors |= read_tensors(folder / file)
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{folder / INDEX}: tensor {lost[0]} is not in {weight_map[lost[0]]}.")
    return tensors


def _our_tensors(folder: Path, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """By GPT's names, in its orientation, in fp32; without masks, and without a head that only repeats `wte`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        name = name.removeprefix(PREFIX)
        if not name.endswith(_BUFFERS):
            tensors[name] = (tensor.T if name.endswith(_CONV1D) else tensor).to(torch.float32)
    drop_equal_head(folder, tensors)
    return tensors
