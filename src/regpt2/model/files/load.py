"""A model by name. In: a run folder, a checkpoint, a file or folder of a known format, or `hf:gpt2`; out: a model.

Also the contract of the shelf model/weights/. An entry that reads has

    matches(path) -> bool      is this file or folder in my format? By content; never raises
    read(path) -> ModelFiles   raises CheckpointError for what is damaged or is no GPT-2

and one that writes has

    write(model, place, vocabulary, dtype) -> None
                               into an existing folder, or the file `place`; each file atomically
    FILES                      names that `write` can leave in a folder; none: the format is one file
    DTYPES                     types of weights that it can write, the default first
    ANY_ARCHITECTURE           True if it holds every model of ours; left out: GPT-2 alone
    ACTIVATION                 the only form of GELU that its readers compute; left out: it says which
    CHARACTERS_NOTE            what to say where the model's ids are characters; left out: it does not hold them

and, where others read the format, may have

    CLIENT                     who they are
    client_logits(place, ids) -> Tensor | None
                               their logits (n, vocab_size) after ids (n, T), up to a constant; None: not installed
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regpt2.base import plugins
from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.base.files import read_small, sha256_file
from regpt2.model.architecture import build_model
from regpt2.model.files.hub import fetch, repo_id
from regpt2.model.kernels.activation import Activation, choose_activation, split_activation
from regpt2.model.language_model import GPTConfig, LanguageModel

SHELF = "model.weights"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
VOCABULARY = {"wte.weight", "lm_head.weight"}  # matrices with a row for each token, and rows of padding
GPT2_TOKENS, GPT2_ROWS = 50257, 50304  # many pad the matrix to the second, and give it as the vocabulary's size
TENSOR_NAME = re.compile(r"[A-Za-z0-9_./-]{1,256}")
MAX_HEADER_BYTES = 1 << 20  # GPT-2 XL's is 54 kB, its optimizer's 176 kB
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}  # as safetensors calls them
KINDS = (
    "a run folder (with checkpoints/), a checkpoint, a Hugging Face folder, a file or folder of another known format, "
    "or hf:NAME from the Hugging Face hub (hf:gpt2, hf:gpt2-xl, hf:owner/name)"
)
QUANTIZED = (
    "quantized weights, whose scales only the program that made them knows; get the model in fp32, fp16 or bf16."
)
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class TokenizerRef:
    """Which tokenizer a model was trained with: its name, and the fingerprint of its vocabulary."""

    name: str
    fingerprint: str
    added: tuple[str | None, ...] = field(default=(), kw_only=True)
    """The texts of the rows beyond that vocabulary, as fine-tuned and padded models have them; None: it has no text."""
    characters: str | None = field(default=None, kw_only=True)
    """Where each id is a character: all of them, in the order of ids."""
    objection: str | None = field(default=None, kw_only=True, compare=False)
    """A sentence: why it is none of ours, where files beside the weights show that."""


@dataclass(frozen=True)
class Vocabulary(TokenizerRef):
    """What is at hand of the tokenizer beyond its name: for an export, or beside the weights that were read."""

    eot: int | None = None
    """The id of <|endoftext|>."""
    merges: bytes | None = None
    """GPT-2's `vocab.bpe`, if the tokenizer is GPT-2's."""


@dataclass(frozen=True)
class ModelFiles:
    """What a weight format reads: a model in our own parameter names and (out, in) orientation, without padding."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: TokenizerRef | None = None
    trained_seq_len: int | None = None
    """As `LanguageModel.trained_seq_len`."""
    doubt: str | None = None
    """Where the file does not say which GELU its model has: a sentence behind its name, of what is taken and why."""


@dataclass(frozen=True)
class _Use:
    """How a model is wanted."""

    device: str | torch.device
    dtype: torch.dtype
    activation: Activation | None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use, in eval mode."""

    model: LanguageModel
    tokenizer: TokenizerRef | None
    """None where the files do not say."""
    source: str
    """Where it came from, to show."""
    step: int | None = None
    """Updates made, if it came from a run."""

    @property
    def n_text_tokens(self) -> int:
        """Tokens that text encodes to: without the rows that were added beyond the vocabulary, named or padding."""
        rows = self.model.config.vocab_size
        if self.tokenizer is None:
            return GPT2_TOKENS if rows == GPT2_ROWS else rows
        return rows - len(self.tokenizer.added)


def load_model(
    spec: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """The model that `spec` names, in eval mode, on `device`, its weights in `dtype`.

    Args:
        spec: a run folder (its newest whole checkpoint), a checkpoint, a file or folder of any format on the shelf
            model/weights/, or "hf:gpt2" and the like from the Hugging Face hub; ":gelu" or ":gelu_tanh" behind it is
            the form of GELU to use it with.

    Raises:
        UsageError: `spec` names nothing.
        CheckpointError: what it names is missing, damaged, or no GPT-2.
        DownloadError: the hub could not be reached, or has no such model.
    """
    spec, activation = split_activation(str(spec))
    use = _Use(device, dtype, activation)
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        return _load_folder(fetch(name), use, source=f"hf:{repo_id(name)}")
    folder = Path(spec)
    if not folder.exists():
        hint = f" Did you mean hf:{spec}?" if re.fullmatch(r"gpt2(-medium|-large|-xl)?", spec) else ""
        raise UsageError(f"MODEL = {spec!r} does not exist; give {KINDS}.{hint}")
    if folder.name == "checkpoints" and not (folder / CONFIG).exists():
        folder = folder.parent
    if (folder / "checkpoints").is_dir():
        return _load_run(folder, use)
    return _load_folder(folder, use)


def _load_run(run: Path, use: _Use) -> LoadedModel:
    """The newest checkpoint that is whole; a bad one is named aloud and the one before it tried."""
    folders = [path for path in (run / "checkpoints").iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        try:
            if not (folder / "manifest.json").exists():
                raise CheckpointError(f"{folder} has no manifest.json: it was not written to its end.")
            return _load_folder(folder, use)
        except CheckpointError as error:
            warn(f"{error} It is passed over, for the checkpoint before it.")
    raise CheckpointError(
        f"{run} holds no whole checkpoint: {len(folders)} in {run / 'checkpoints'}, none usable; "
        "train further, or name another MODEL."
    )


def _load_folder(folder: Path, use: _Use, source: str | None = None) -> LoadedModel:
    verify_files(folder, (WEIGHTS, CONFIG))
    files = _read(folder)
    source = source or str(folder)
    activation = choose_activation(source, files.config.activation, files.doubt, use.activation)
    files = replace(files, config=replace(files.config, activation=activation))
    try:
        _check_sizes(files)
        with torch.device("meta"):  # no time and no random numbers for weights that are about to be replaced
            model = build_model(files.config)
        check_tensors(model, files.tensors)
        model = model.to(use.dtype).to_empty(device=use.device)
        load_into(model, files.tensors)
        model.trained_seq_len = files.trained_seq_len
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    step = _STEP.fullmatch(folder.resolve().name)
    source += f":{use.activation}" if use.activation else ""
    return LoadedModel(model.eval(), files.tokenizer, source, int(step.group(1)) if step else None)


def _read(path: Path) -> ModelFiles:
    """Through the entry of the shelf that recognizes the folder."""
    readers = {name: plugins.load(SHELF, name) for name in plugins.entries(SHELF)}
    readers = {name: entry for name, entry in readers.items() if hasattr(entry, "read")}
    for entry in readers.values():
        if entry.matches(path):
            files: ModelFiles = entry.read(path)
            return files
    if path.is_dir():
        read_json(path / CONFIG)  # if that is what is wrong, it says so
    beside = f" Did you mean its folder, {path.parent}?" if (path.parent / CONFIG).is_file() else ""
    raise CheckpointError(
        f"{path} is in no format that is known here ({', '.join(readers)}); MODEL is {KINDS}.{beside}"
    )


def verify_files(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files with `manifest.json`, where the folder has one.

    Raises:
        CheckpointError: a file is missing, or differs in size or SHA-256.
    """
    if not (folder / "manifest.json").exists():
        return
    document = read_json(folder / "manifest.json")
    if "splits" in document:
        raise UsageError(f"{folder} is a data folder; MODEL is {KINDS}.")
    manifest = document.get("files")
    for name in names:
        path = folder / name
        expected = manifest.get(name) if isinstance(manifest, dict) else None
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(f"{folder / 'manifest.json'} does not list {name} with its bytes and sha256.")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {folder / 'manifest.json'} lists it.")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, expected {expected['bytes']!r:.40}.")
        if (got := sha256_file(path)) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is {got}, expected {expected['sha256']!s:.64}.")


def _check_sizes(files: ModelFiles) -> None:
    """Refuse sizes that no model with these tensors has, before time and memory go into one of such sizes."""
    most = max((tensor.numel() for tensor in files.tensors.values()), default=0)
    limits = {"n_layer": len(files.tensors), "n_embd": most, "block_size": max(most, 1 << 20), "vocab_size": most}
    for name, limit in (limits | {"vocab_multiple": 65536}).items():
        if (got := getattr(files.config, name)) > limit:
            raise CheckpointError(f"{name} = {got} cannot be: by its {len(files.tensors)} tensors at most {limit:,}.")


@torch.no_grad()
def load_into(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Copy weights into `model`, strictly; they are cast to its type, and the rows of padding set to zero.

    Args:
        tensors: as `ModelFiles.tensors`: every parameter by its name, `wte.weight` of (vocab_size, n_embd).

    Raises:
        CheckpointError: a tensor is missing, is none of the model's, or has another shape; nothing was copied.
    """
    check_tensors(model, tensors)
    for name, place in _unpadded(model):
        place.copy_(tensors[name])
    for name in VOCABULARY & dict(model.named_parameters()).keys():
        model.get_parameter(name)[model.config.vocab_size :] = 0.0


def check_tensors(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Compare names and shapes with the model's; it may be on the device "meta".

    Raises:
        CheckpointError: a tensor is missing, is none of the model's, or has another shape.
    """
    expected = dict(_unpadded(model))
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"tensor {name} is missing: got {len(tensors)} tensors, expected {len(expected)}.")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"tensor {name} {list(tensors[name].shape)} belongs to no GPT of this shape.")
    for name, place in expected.items():
        if tensors[name].shape != place.shape:
            sizes = ", ".join(f"{size} = {getattr(model.config, size)}" for size in _SIZES)
            got, wanted = list(tensors[name].shape), list(place.shape)
            raise CheckpointError(f"tensor {name} has shape {got}, expected {wanted} by the configuration: {sizes}.")
        if not tensors[name].is_floating_point() and tensors[name].dtype != torch.bool:
            raise CheckpointError(f"tensor {name} is of type {str(tensors[name].dtype)[6:]}: {QUANTIZED}")


def tensors_of(model: LanguageModel, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every parameter by name, without padding rows: contiguous fp32, a view of the model where it can be.

    `parameters`: a copy of the model's own by name, where those are not at hand whole.
    """
    return {name: p.detach().to(torch.float32).contiguous() for name, p in _unpadded(model, parameters)}


def _unpadded(model: LanguageModel, parameters: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    for name, p in (parameters or dict(model.named_parameters())).items():
        yield name, p[: model.config.vocab_size] if name in VOCABULARY else p


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, cut short, or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a model folder holds {WEIGHTS} beside {CONFIG}.")
    try:
        _check_header(path)
        return load_file(path)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or no safetensors file ({error}); copy it again."
        ) from None


def _check_header(path: Path) -> None:
    """Refuse what the library lets pass: a long header, odd names, types that no GPT has. It checks sizes and places.

    Raises:
        CheckpointError: a tensor is quantized.
        ValueError, RecursionError: the header is none.
    """
    header = _header(path)
    for name, value in header.items() if isinstance(header, dict) else ():
        dtype = str(value.get("dtype")) if isinstance(value, dict) else None
        if str(dtype).startswith(("F4", "F6_", "F8_")):
            raise CheckpointError(f"{path}: tensor {name!r:.80} is of type {dtype!r:.20}: {QUANTIZED}")
        if name != "__metadata__" and (not TENSOR_NAME.fullmatch(name) or dtype not in DTYPES):
            raise ValueError(f"a tensor {name!r:.80} of type {dtype!r:.20}")


def _header(path: Path) -> Any:
    with open(path, "rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {n_bytes:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        return json.loads(file.read(n_bytes).decode(), object_pairs_hook=_unique)


def peek_metadata(path: Path, key: str) -> str | None:
    """What a safetensors file says under `key` in its metadata; None if it says nothing, or is no such file."""
    try:
        metadata = _header(path)["__metadata__"] if path.is_file() else {}
        return metadata[key] if isinstance(metadata[key], str) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ: readers disagree on which one of two they take."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return found


def _whole(digits: str) -> int:
    """A whole number in JSON; one far beyond 64 bits is no size, and overflows where it is divided or shown."""
    if len(digits) > len(str(2**64)):
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, too large, or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a model folder holds {CONFIG} beside {WEIGHTS}.")
    try:
        return parse_json(path, read_small(path, CheckpointError))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again.") from None


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """The object in a JSON text that was read from `path`.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def peek_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, but an empty object for what cannot be read: for `matches`."""
    try:
        return read_json(path)
    except (CheckpointError, OSError):
        return {}
