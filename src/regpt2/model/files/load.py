"""A model by name. In: a run, a checkpoint, a file or folder of a format, `hf:gpt2`, `builtin:novels`; out: a model."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from regpt2.base import shelves
from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, DownloadError, UsageError
from regpt2.base.files import builtin_folder, sha256_file
from regpt2.model.architecture import build_model
from regpt2.model.files import fill_model
from regpt2.model.files.contract import CONFIG, GPT2_ROWS, GPT2_TOKENS, SHELF, WEIGHTS, ModelFiles, TokenizerRef
from regpt2.model.files.safe_json import read_json
from regpt2.model.kernels.activation import Activation, choose_activation, split_activation
from regpt2.model.language_model import GPTConfig, LanguageModel

T = TypeVar("T")
KINDS = (
    "a run folder (with checkpoints/), a checkpoint, a Hugging Face folder, a file or folder of another known format, "
    "hf:NAME from the Hugging Face hub (hf:gpt2, hf:gpt2-xl, hf:owner/name), or builtin:novels, which comes with regpt2"
)
_STEP = re.compile(r"step-(\d{8,})")
_BEST = "best"
_HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
_PICKLE = "pytorch_model.bin"
_TEXT_FILES = [CONFIG, "merges.txt", "vocab.json", "vocab.txt", "*.model", "tokenizer*.json", "added_tokens.json"]
_TENSOR_FILES = [WEIGHTS, f"{WEIGHTS}.index.json", "model-*.safetensors"]
_PICKLE_FILES = [_PICKLE, f"{_PICKLE}.index.json", "pytorch_model-*.bin"]


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
        """Tokens that text encodes to, without rows that were added to the vocabulary as names or padding."""
        rows = self.model.config.vocab_size
        if self.tokenizer is None:
            return GPT2_TOKENS if rows == GPT2_ROWS else rows
        return rows - len(self.tokenizer.added)


@dataclass(frozen=True)
class PeekedModel:
    """What the files of a model say of it, without its weights."""

    config: GPTConfig
    tokenizer: TokenizerRef | None
    """None where the files do not say."""
    trained_seq_len: int | None
    """As `LanguageModel.trained_seq_len`."""
    source: str
    """Where it is, to show."""


def load_model(
    spec: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """The model that `spec` names, in eval mode, on `device`, its weights in `dtype`.

    Args:
        spec: a run folder (its newest whole checkpoint), a checkpoint, a file or folder of any format on the shelf
            model/weights/, "hf:gpt2" and the like from the Hugging Face hub, or "builtin:novels", a small model that
            comes with regpt2; ":gelu" or ":gelu_tanh" behind it is the form of GELU to use it with.

    Raises:
        UsageError: `spec` names nothing.
        CheckpointError: what it names is missing, damaged, or no GPT-2.
        DownloadError: the hub could not be reached, or has no such model.
    """
    return _find(str(spec), partial(_load_folder, device=device, dtype=dtype))


def peek_model(spec: str | Path) -> PeekedModel:
    """The shape and the tokenizer of the model that `spec` names, as `load_model` would find it.

    Formats that keep them in a file of their own are not read further, so damaged weights are not noticed here.

    Raises:
        UsageError, CheckpointError, DownloadError: as `load_model`.
    """
    return _find(str(spec), _peek_folder)


def _find(spec: str, load: Callable[..., T]) -> T:
    """What `load` makes of the folder or file that `spec` names."""
    spec, activation = split_activation(spec)
    load = partial(load, asked=activation)
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        return load(_fetch(name), source=f"hf:{_repo_id(name)}")
    if (of_package := builtin_folder(spec)) is not None:
        return load(of_package, source=spec)
    folder = Path(spec)
    if not folder.exists():
        hint = f" Did you mean hf:{spec}?" if re.fullmatch(r"gpt2(-medium|-large|-xl)?", spec) else ""
        raise UsageError(f"MODEL = {spec!r} does not exist; give {KINDS}.{hint}")
    if folder.name == "checkpoints" and not (folder / CONFIG).exists():
        folder = folder.parent
    if (folder / "checkpoints").is_dir():
        return _load_run(folder, load)
    return load(folder)


def _repo_id(name: str) -> str:
    """The repository of a model of the hub; GPT-2's own need no owner."""
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"MODEL = {'hf:' + name!r:.200} cannot be a model of the hub; give hf:gpt2, or hf:owner/name.")
    return name if "/" in name else f"openai-community/{name}"


def _fetch(name: str) -> Path:
    """The folder of a model of the hub, from the cache if it is there; pickled weights only if it has no others."""
    repo = _repo_id(name)
    import huggingface_hub  # noqa: PLC0415  (slow to import, needed for hf: only)

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=_TEXT_FILES + _TENSOR_FILES))
        if not any(any(folder.glob(pattern)) for pattern in _TENSOR_FILES):
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=_TEXT_FILES + _PICKLE_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DownloadError(
            f"hf:{name}: could not get {repo} from the Hugging Face hub ({reason}). Without a network here, run "
            f"`hf download {repo} {CONFIG} {WEIGHTS} --local-dir FOLDER` elsewhere ({_PICKLE} if it has no "
            f"{WEIGHTS}), copy FOLDER here, and give it as MODEL."
        ) from None
    return folder


def _load_run(run: Path, load: Callable[..., T]) -> T:
    """The newest checkpoint that is whole; a bad one causes a warning, and the one before it is tried."""
    folders = [path for path in (run / "checkpoints").iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        try:
            if not (folder / "manifest.json").exists():
                raise CheckpointError(f"{folder} has no manifest.json: it was not written completely.")
            return load(folder)
        except CheckpointError as error:
            warn(f"{error} Trying the checkpoint before it.")
    best = run / "checkpoints" / _BEST
    others = f"give {best}" if best.is_dir() else "give another MODEL"
    raise CheckpointError(
        f"{run} holds no whole checkpoint: {len(folders)} in {run / 'checkpoints'}, none usable; "
        f"train further, or {others}."
    )


def _load_folder(
    folder: Path, device: str | torch.device, dtype: torch.dtype, asked: Activation | None, source: str | None = None
) -> LoadedModel:
    verify_files(folder, (WEIGHTS, CONFIG))
    files = _read(folder)
    source = source or str(folder)
    activation = choose_activation(source, files.config.activation, files.doubt, asked)
    files = replace(files, config=replace(files.config, activation=activation))
    try:
        _check_sizes(files)
        with torch.device("meta"):  # costs no time and no random numbers for weights that are replaced
            model = build_model(files.config)
        fill_model.check_tensors(model, files.tensors)
        fill_model.give_memory(model.to(dtype), device)
        fill_model.load_into(model, files.tensors)
        model.trained_seq_len = files.trained_seq_len
        model.set_window(files.trained_window or model.window)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    source += f":{asked}" if asked else ""
    return LoadedModel(model.eval(), files.tokenizer, source, _updates_made(folder.resolve()))


def _updates_made(folder: Path) -> int | None:
    """By the name of a checkpoint; the best one has its step in a file."""
    if match := _STEP.fullmatch(folder.name):
        return int(match[1])
    if folder.name != _BEST or not (folder / "state.json").is_file():
        return None
    step = read_json(folder / "state.json").get("step")
    return step if isinstance(step, int) else None


def _peek_folder(folder: Path, asked: Activation | None, source: str | None = None) -> PeekedModel:
    verify_files(folder, (CONFIG,))
    files = _read(folder, only_peek=True)
    config = replace(files.config, activation=asked or files.config.activation)
    return PeekedModel(config, files.tokenizer, files.trained_seq_len, source or str(folder))


def _read(path: Path, *, only_peek: bool = False) -> ModelFiles:
    readers = {name: shelves.load(SHELF, name) for name in shelves.entries(SHELF)}
    readers = {name: entry for name, entry in readers.items() if hasattr(entry, "read")}
    for entry in readers.values():
        if entry.matches(path):
            read = getattr(entry, "peek", entry.read) if only_peek else entry.read
            files: ModelFiles = read(path)
            return files
    if path.is_dir():
        read_json(path / CONFIG)  # raises if this is what is wrong
    beside = f" Did you mean its folder, {path.parent}?" if (path.parent / CONFIG).is_file() else ""
    raise CheckpointError(f"{path} is in none of the known formats ({', '.join(readers)}); MODEL is {KINDS}.{beside}")


def verify_files(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files with `manifest.json`, if the folder has one; a CheckpointError if one is missing or differs."""
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
    """Refuse sizes that no model with these tensors can have, before they cost time and memory."""
    most = max((tensor.numel() for tensor in files.tensors.values()), default=0)
    limits = {"n_layer": len(files.tensors), "n_embd": most, "block_size": max(most, 1 << 20), "vocab_size": most}
    for name, limit in (limits | {"vocab_multiple": 65536}).items():
        if (got := getattr(files.config, name)) > limit:
            raise CheckpointError(
                f"{name} = {got} is impossible with {len(files.tensors)} tensors, which allow at most {limit:,}."
            )
