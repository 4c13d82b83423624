"""GGUF, the format of llama.cpp. In: a file of F32, F16, BF16 or Q8_0 weights; out: a model's files, and back.

Magic, version, keys with values, the list of tensors, and from the next multiple of 32 bytes their numbers. Matrices
are stored in the chosen type; norms, biases and positions stay F32. The tokenizer is inside.
"""

import importlib.util
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.base.files import atomic_file, sha256_bytes
from regpt2.model.files.binary import Cursor, begins_with, config_of, damaged, drop_equal_head, read_array
from regpt2.model.files.contract import GPT2_TOKENS, ModelFiles, TokenizerRef, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.vocabulary import (
    OWN,
    added_texts,
    gpt2_tokenizer,
    is_gpt2_order,
    merges_of,
    other_vocabulary,
    token_texts,
)
from regpt2.model.gpt import GPT

FILES: tuple[str, ...] = ()
ACTIVATION = "gelu_tanh"
DTYPES = ("fp32", "fp16", "bf16", "q8_0")
CLIENT = "llama.cpp"
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MOST_HEADER_BYTES = 16 << 20  # GPT-2's, which holds its vocabulary, has 1.9 MB
BLOCK, BLOCK_BYTES = 32, 34  # of Q8_0: one fp16 scale, 32 int8
TENSOR_TYPES = {"fp32": 0, "fp16": 1, "q8_0": 8, "bf16": 30}
FILE_TYPES = {"fp32": 0, "fp16": 1, "q8_0": 7, "bf16": 32}
SIZE_KEYS = {
    "block_size": "gpt2.context_length",
    "n_embd": "gpt2.embedding_length",
    "n_layer": "gpt2.block_count",
    "n_head": "gpt2.attention.head_count",
}
KIND, SPLIT = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, TOKEN_TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
PROVEN = ("gpt2", "bytes", OWN)  # tokenizers that the file holds whole: its own content is compared
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
MOST_TOKENS, A_WHOLE_TOKEN = 1 << 20, 64  # 64 is a letter or a sign in all our vocabularies

# Kinds of values: numbers by their code in `struct`, text, and arrays of either.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9

_NAMES = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers are: bytes from the start of the data, their type and shape."""

    offset: int
    kind: int
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        n = math.prod(self.shape)
        return n // BLOCK * BLOCK_BYTES if self.kind == TENSOR_TYPES["q8_0"] else n * (4 if self.kind == 0 else 2)


def matches(path: Path) -> bool:
    """Does the file begin with the magic number?"""
    return begins_with(path, MAGIC)


def read(path: Path) -> ModelFiles:
    """The model in the file, its weights as fp32."""
    with open(path, "rb") as file:
        cursor = Cursor(file.read(MOST_HEADER_BYTES), path)
        cursor.take(len(MAGIC))
        version, n_tensors, n_keys = cursor.value("I"), cursor.value("Q"), cursor.value("Q")
        if version not in (2, 3):
            raise CheckpointError(f"{path} has version {version} of GGUF, expected 2 or 3.")
        keys = _read_keys(cursor, n_keys)
        config = _config(path, keys)
        places = _read_places(cursor, n_tensors)
        alignment = keys.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            raise damaged(path, f"an alignment of {alignment!r:.40}")
        start = -(-cursor.at // alignment) * alignment
        _check_places(path, places, path.stat().st_size - start)
        tensors = {}
        for name, place in places.items():
            file.seek(start + place.offset)
            tensors[_our_name(path, name)] = _read_tensor(file, path, place)
    drop_equal_head(path, tensors)
    vocab_size = tensors["wte.weight"].shape[0] if tensors.get("wte.weight", torch.empty(0)).dim() == 2 else 0
    return ModelFiles(config_of(path, config | {"vocab_size": vocab_size}), tensors, _tokenizer(path, keys, vocab_size))


def write(model: GPT, path: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write the file; a UsageError if its type is Q8_0 and a row does not consist of whole blocks."""
    config = model.config
    if dtype == "q8_0" and config.n_embd % BLOCK:
        raise UsageError(
            f"q8_0 stores blocks of {BLOCK} weights, and n_embd = {config.n_embd} is not a multiple of {BLOCK}."
        )
    keys = _keys(model, vocabulary, dtype)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors_of(model)), len(keys)), *keys]
    places: list[tuple[Tensor, _Place]] = []
    at = 0
    for name, tensor in tensors_of(model).items():
        matrix = tensor.dim() == 2 and name != "wpe.weight"
        place = _Place(at, TENSOR_TYPES[dtype if matrix else "fp32"], tuple(tensor.shape))
        at = _aligned(at + place.n_bytes)
        places.append((tensor, place))
        shape = struct.pack(f"<I{tensor.dim()}Q", tensor.dim(), *reversed(place.shape))
        head.append(_text(_their_name(name)) + shape + struct.pack("<IQ", place.kind, place.offset))
    with atomic_file(path) as file:
        file.write(b"".join(head))
        start = _aligned(file.tell())
        for tensor, place in places:
            file.write(bytes(start + place.offset - file.tell()))
            file.write(_encoded(tensor.cpu(), place.kind))


def client_logits(path: Path, ids: Tensor) -> Tensor | None:
    """Log probabilities of the next token by llama.cpp, which cannot read a file without a tokenizer."""
    with open(path, "rb") as file:
        has_tokenizer = TOKENS.encode() in file.read(MOST_HEADER_BYTES)
    if not has_tokenizer or importlib.util.find_spec("xllamacpp") is None:
        return None
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(path), -1, False
    params.n_ctx, params.n_parallel, params.n_gpu_layers = ids.shape[1] + 1, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    rows = []
    for prompt in ids.tolist():
        # It reports no probabilities beside a token that is half a character, so it has to draw one that is whole.
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": MOST_TOKENS, "logit_bias": [[A_WHOLE_TOKEN, 1e4]]}
        (token,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        rows.append([found["logprob"] for found in sorted(token["top_logprobs"], key=lambda found: found["id"])])
    return torch.tensor(rows)


def _keys(model: GPT, vocabulary: Vocabulary | None, dtype: str) -> list[bytes]:
    """What llama.cpp needs to know of the model and its tokenizer, and our own name of the tokenizer."""
    config = model.config
    keys = [
        _key("general.architecture", _TEXT, "gpt2"),
        _key("general.name", _TEXT, "GPT-2"),
        _key("general.file_type", _U32, FILE_TYPES[dtype]),
        _key("general.alignment", _U32, ALIGNMENT),
        *(_key(SIZE_KEYS[size], _U32, getattr(config, size)) for size in ("block_size", "n_embd", "n_layer")),
        _key("gpt2.feed_forward_length", _U32, 4 * config.n_embd),
        _key(SIZE_KEYS["n_head"], _U32, config.n_head),
        _key("gpt2.attention.layer_norm_epsilon", _F32, 1e-5),
        _key("gpt2.vocab_size", _U32, config.vocab_size),
    ]
    if vocabulary is not None:
        note = {"name": vocabulary.name, "fingerprint": vocabulary.fingerprint}
        keys += [_key(f"regpt2.tokenizer.{name}", _TEXT, text) for name, text in note.items()]
    texts = token_texts(vocabulary)
    if vocabulary is None or texts is None or len(texts) + len(vocabulary.added) != config.vocab_size:
        return [*keys, _key(KIND, _TEXT, "none")]
    end = len(texts) - 1
    types = [NORMAL] * end + [CONTROL] + [UNUSED if text is None else CONTROL for text in vocabulary.added]
    # A row without a text needs a name too; this is what llama.cpp's own converter writes.
    texts += [f"[PAD{n}]" if text is None else text for n, text in enumerate(vocabulary.added, start=len(texts))]
    return [
        *keys,
        _key(KIND, _TEXT, "gpt2"),
        _key(SPLIT, _TEXT, "gpt-2"),
        _array(TOKENS, _TEXT, texts),
        _array(TOKEN_TYPES, _I32, types),
        _array(MERGES, _TEXT, merges_of(vocabulary)),
        *(_key(f"tokenizer.ggml.{role}_token_id", _U32, end) for role in ("bos", "eos", "unknown")),
        _key("tokenizer.ggml.add_bos_token", _BOOL, False),
        *_chat_keys(vocabulary),
    ]


def _chat_keys(vocabulary: Vocabulary) -> list[bytes]:
    """Of a chat model: how llama.cpp renders a conversation, and the token that ends an answer."""
    if vocabulary.chat_template is None or vocabulary.end_of_turn is None:
        return []
    end = _key("tokenizer.ggml.eot_token_id", _U32, vocabulary.end_of_turn)
    return [_key("tokenizer.chat_template", _TEXT, vocabulary.chat_template), end]


def _key(name: str, kind: int, value: Any) -> bytes:
    return _text(name) + struct.pack("<I", kind) + _value(kind, value)


def _array(name: str, kind: int, values: list[Any]) -> bytes:
    head = _text(name) + struct.pack("<IIQ", _ARRAY, kind, len(values))
    return head + b"".join(_value(kind, value) for value in values)


def _value(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _TEXT else struct.pack("<" + _NUMBERS[kind], value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _encoded(tensor: Tensor, kind: int) -> bytes:
    if kind == TENSOR_TYPES["q8_0"]:
        return _quantized(tensor)
    dtype = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[kind]
    return tensor.to(dtype).view(torch.uint8).numpy().tobytes()


def _quantized(tensor: Tensor) -> bytes:
    """Q8_0: of each 32 weights the largest becomes 127 steps, and each weight the nearest whole number of them."""
    blocks = tensor.reshape(-1, BLOCK).numpy()
    step = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(step == 0, np.float32(0), np.float32(1) / step)
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype("<i1")  # halves go away from zero
    return np.concatenate([step.astype("<f2").view("<i1"), whole], axis=1).tobytes()


def _read_tensor(file: IO[bytes], path: Path, place: _Place) -> Tensor:
    if place.kind == TENSOR_TYPES["q8_0"]:
        blocks = read_array(file, path, "|u1", (place.n_bytes // BLOCK_BYTES, BLOCK_BYTES))
        step = blocks[:, :2].contiguous().view(torch.float16).to(torch.float32)
        return (step * blocks[:, 2:].contiguous().view(torch.int8)).view(place.shape)
    if place.kind == TENSOR_TYPES["bf16"]:
        return read_array(file, path, "<i2", place.shape).view(torch.bfloat16).to(torch.float32)
    return read_array(file, path, "<f4" if place.kind == 0 else "<f2", place.shape).to(torch.float32)


def _read_keys(cursor: Cursor, n_keys: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for _ in range(n_keys):  # each takes bytes, so a huge number fails at the end of the header
        name = cursor.text(cursor.value("Q"))
        if name in keys:
            raise damaged(cursor.path, f"the key {name!r:.80} twice")
        kind = cursor.value("I")
        kept = name in (TOKENS, TOKEN_TYPES, MERGES)
        keys[name] = _read_list(cursor, kept) if kind == _ARRAY else _read_value(cursor, kind)
    return keys


def _read_list(cursor: Cursor, keep: bool) -> list[Any] | None:
    """A list of texts or numbers; None if it is not needed, and only its end had to be found."""
    kind, n = cursor.value("I"), cursor.value("Q")
    if kind in _NUMBERS:
        data = cursor.take(n * struct.calcsize("<" + _NUMBERS[kind]))
        return [value for (value,) in struct.iter_unpack("<" + _NUMBERS[kind], data)] if keep else None
    texts = []
    for _ in range(n):  # each takes bytes
        text = _read_value(cursor, kind)
        if keep:
            texts.append(text)
    return texts if keep else None


def _read_value(cursor: Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text(cursor.value("Q"))
    if kind not in _NUMBERS:
        raise damaged(cursor.path, f"a value of kind {kind} before byte {cursor.at:,}")
    return cursor.value(_NUMBERS[kind])


def _read_places(cursor: Cursor, n_tensors: int) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for _ in range(n_tensors):
        name = cursor.text(cursor.value("Q"))
        if name in places:
            raise damaged(cursor.path, f"the tensor {name!r:.80} twice")
        n_dims = cursor.value("I")
        if n_dims > 4:
            raise damaged(cursor.path, f"{n_dims} dimensions of {name!r:.80}")
        shape = tuple(reversed([cursor.value("Q") for _ in range(n_dims)]))
        kind, offset = cursor.value("I"), cursor.value("Q")
        if kind not in TENSOR_TYPES.values():
            raise CheckpointError(
                f"{cursor.path}: tensor {name:.80} is of type {kind}, expected F32 (0), F16 (1), Q8_0 (8) or BF16 (30)."
            )
        if 0 in shape:
            raise damaged(cursor.path, f"the tensor {name!r:.80} is empty")
        if kind == TENSOR_TYPES["q8_0"] and (not shape or shape[-1] % BLOCK):
            raise damaged(cursor.path, f"the Q8_0 tensor {name!r:.80} ends within a block")
        places[name] = _Place(offset, kind, shape)
    return places


def _check_places(path: Path, places: dict[str, _Place], n_bytes: int) -> None:
    """Refuse tensors beyond the file's end, and more of them than it has bytes."""
    for name, place in places.items():
        if (beyond := place.offset + place.n_bytes - n_bytes) > 0:
            raise damaged(path, f"the tensor {name!r:.80} ends {beyond:,} bytes after the end of the file")
    if sum(place.n_bytes for place in places.values()) > n_bytes:
        raise damaged(path, "its tensors overlap")


def _config(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the model, without its vocabulary's, if it is a GPT-2."""
    if keys.get("general.architecture") != "gpt2":
        raise CheckpointError(f"{path} holds a {keys.get('general.architecture')!r:.80}, expected a 'gpt2'.")
    epsilon = keys.get("gpt2.attention.layer_norm_epsilon")
    if not isinstance(epsilon, float) or not math.isclose(epsilon, 1e-5, rel_tol=1e-6):
        raise CheckpointError(f"{path}: layer_norm_epsilon = {epsilon!r:.40}, expected 1e-05.")
    return {size: keys.get(key) for size, key in SIZE_KEYS.items()}


def _tokenizer(path: Path, keys: dict[str, Any], rows: int) -> TokenizerRef | None:
    """From the tokenizer in the file, or else from our own note; None if there is neither."""
    kind, split, merges = keys.get(KIND), keys.get(SPLIT), _list(keys, MERGES)
    name, fingerprint = keys.get("regpt2.tokenizer.name"), keys.get("regpt2.tokenizer.fingerprint")
    has_tokenizer = kind not in (None, "none") or bool(merges)
    if isinstance(name, str) and isinstance(fingerprint, str) and not (has_tokenizer and name in PROVEN):
        return TokenizerRef(name, fingerprint)
    if not has_tokenizer:
        return None
    texts = [str(text) for text in _list(keys, TOKENS)]
    if kind != "gpt2" or split not in (None, "gpt-2"):
        why = f"of kind {kind!r:.80} and splits text by {split!r:.80}, expected 'gpt2' and 'gpt-2'"
    else:
        unused = {n for n, type_ in enumerate(_list(keys, TOKEN_TYPES)) if type_ == UNUSED}
        found = _vocabulary({n: text for n, text in enumerate(texts) if n not in unused}, [*map(str, merges)], rows)
        if not isinstance(found, str):
            return found
        why = f"of other tokens or merges, or has them in another order: it {found}"
    own = sha256_bytes("\n".join([*texts, *map(str, merges)]).encode("utf-8", "replace"))
    return TokenizerRef(str(kind)[:80], own, objection=f"The tokenizer in {path} is not GPT-2's: it is {why}.")


def _vocabulary(texts: dict[int, str], merges: list[str], rows: int) -> Vocabulary | str:
    """GPT-2's vocabulary, bytes or one's own, with the texts of added rows; or why it is none of them."""
    gpt2 = gpt2_tokenizer(merges)
    if gpt2 is not None and is_gpt2_order([texts.get(n, "") for n in range(GPT2_TOKENS)]):
        return replace(gpt2, added=added_texts(texts, rows))
    other = other_vocabulary({text: n for n, text in sorted(texts.items(), reverse=True)}, merges)
    if isinstance(other, str):
        return other
    return replace(other, added=added_texts(texts, rows, (other.eot or 0) + 1))


def _list(keys: dict[str, Any], name: str) -> list[Any]:
    return found if isinstance(found := keys.get(name), list) else []


def _our_name(path: Path, name: str) -> str:
    """`blk.3.attn_qkv.weight` -> `h.3.attn.c_attn.weight`."""
    *block, part, kind = name.split(".") if "." in name else ["", ""]
    names = _BLOCK_NAMES if len(block) == 2 and block[0] == "blk" else _NAMES
    if part not in names or kind not in ("weight", "bias") or (block and names is _NAMES):
        raise CheckpointError(f"{path}: tensor {name!r:.80} belongs to no GPT-2.")
    return ".".join([*(("h", block[1]) if block else ()), names[part], kind])


def _their_name(name: str) -> str:
    """`h.3.attn.c_attn.weight` -> `blk.3.attn_qkv.weight`."""
    theirs = {ours: part for part, ours in (_NAMES | _BLOCK_NAMES).items()}
    part, _, kind = name.rpartition(".")
    if not part.startswith("h."):
        return f"{theirs[part]}.{kind}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{theirs[part]}.{kind}"
