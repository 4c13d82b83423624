"""Models of the Hugging Face hub. In: a name, `gpt2` or `owner/name`; out: its folder in huggingface_hub's cache."""

import re
from pathlib import Path

from regpt2.base.errors import DownloadError, UsageError

_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
_CONFIG, _WEIGHTS, _PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
_TOKENIZER_FILES = ["merges.txt", "vocab.json", "vocab.txt", "*.model", "tokenizer*.json", "added_tokens.json"]
_TENSOR_FILES = [_WEIGHTS, f"{_WEIGHTS}.index.json", "model-*.safetensors"]
_PICKLE_FILES = [_PICKLE, f"{_PICKLE}.index.json", "pytorch_model-*.bin"]


def repo_id(name: str) -> str:
    """The repository of a model; GPT-2's own need no owner.

    Raises:
        UsageError: no model of the hub can have this name.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"MODEL = {'hf:' + name!r:.200} names no model of the hub; give hf:gpt2, or hf:owner/name.")
    return name if "/" in name else f"openai-community/{name}"


def fetch(name: str) -> Path:
    """The folder of a model, fetched if it is not there yet; pickled weights only where it has no others.

    Raises:
        UsageError: no model of the hub can have this name.
        DownloadError: the hub could not be reached, or has no such model.
    """
    repo = repo_id(name)
    import huggingface_hub  # noqa: PLC0415  (slow to import, needed for hf: only)

    texts = [_CONFIG, *_TOKENIZER_FILES]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=texts + _TENSOR_FILES))
        if not any(any(folder.glob(pattern)) for pattern in _TENSOR_FILES):
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=texts + _PICKLE_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DownloadError(
            f"hf:{name}: could not get {repo} from the Hugging Face hub ({reason}). Without network here: run "
            f"`hf download {repo} {_CONFIG} {_WEIGHTS} --local-dir FOLDER` elsewhere ({_PICKLE} if it has no "
            f"{_WEIGHTS}), copy FOLDER, give it as MODEL."
        ) from None
    return folder
