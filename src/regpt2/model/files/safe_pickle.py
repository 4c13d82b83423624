"""A foreign PyTorch file (`.bin`, `.pt`). In: its path; out: its tensors, unpickled by a child process with limits.

A pickle can hold code, and a short one can fill memory or a disk. So only a child looks inside the file: with
`weights_only=True`, which builds tensors and nothing else, in bounded memory, time and disk space. It returns plain
tensors as safetensors. From a training checkpoint it returns the model and its settings. These may be an object of an
unknown class: a stub takes its attributes, and runs none of its code.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regpt2.base.console import safe_text
from regpt2.base.errors import CheckpointError
from regpt2.base.files import require_free_space
from regpt2.model.files.contract import QUANTIZED, WEIGHTS
from regpt2.model.files.tensors import TENSOR_NAME, peek_metadata, read_tensors

MAX_MEMBERS = 10_000  # tensors, and files in the archive; GPT-2 XL has 580
SPARE_BYTES = 512 << 20  # beyond what torch itself takes and three times the file
SPARE_S = 60.0  # beyond the time at the slowest speed that a disk may have
SLOWEST_BYTES_PER_S = 20e6
MOST_SETTINGS = 1_000_000  # characters; nanoGPT has 200, and a vocabulary of 65,536 characters 786,432
STATE, CHECKPOINT, SETTINGS = "state", "checkpoint", "settings"
FROM_OBJECT = "settings from an object"  # whether they were, as in build-nanogpt
_CONFIG_CLASSES = ("__main__.GPTConfig", "model.GPTConfig", "train_gpt2.GPTConfig")  # of build-nanogpt and its forks
_ARRAYS = [  # of losses that were counted with NumPy, and of its generators' states
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
]
_CAUSE, _WARNING, _ADVICE = "WeightsUnpickler error: ", "from a trusted source.", "Check the documentation"  # of torch
_OBJECT = re.compile(r"(?:GLOBAL|unsupported class) ([\w.]{1,200})")
_MEND = f"get the model as {WEIGHTS} instead."
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote; raises as `read_training_checkpoint` does."""
    return _read(path, STATE)[0]


def read_training_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a checkpoint that nanoGPT or a relative wrote. Nothing in the file is run.

    Raises:
        CheckpointError: it is damaged, of an old kind, holds more than tensors, or would take more than its size.
        Problem: a copy does not fit in the temporary folder.
    """
    return _read(path, CHECKPOINT)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or no plain file.")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(f"{path} is no zip archive: not from torch.save, or from torch before 1.6; {_MEND}")
    n_bytes = path.stat().st_size
    require_free_space(Path(tempfile.gettempdir()), n_bytes, f"a copy of {path.name}")
    with tempfile.TemporaryDirectory(prefix="regpt2-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / WEIGHTS
        if reason := _run_child(path.absolute(), copy, kind, SPARE_S + 2 * n_bytes / SLOWEST_BYTES_PER_S):
            raise CheckpointError(f"{path} {reason}")
        return read_tensors(copy), json.loads(peek_metadata(copy, SETTINGS) or "{}")


def _run_child(path: Path, copy: Path, kind: str, timeout_s: float) -> str:
    """Unpickle in a process of its own, without input and without our open files. Returns an error, or ""."""
    log = copy.with_name("log")
    command = [sys.executable, "-I", "-m", "regpt2.model.files.safe_pickle", str(path), str(copy), kind]
    with open(log, "wb") as errors:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=copy.parent,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return _unreadable(f"reading it took more than {timeout_s:.0f} s")
    if code == 0:
        return ""
    with open(log, "rb") as file:
        lines = file.read(10_000).decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return safe_text(last)[:1000] if code == 1 and last else _unreadable(f"its reader ended with code {code}")


def main() -> int:
    """The child. In: the file, the place of the copy and the kind; out: the copy, or one line and code 1."""
    path, copy = map(Path, sys.argv[1:3])
    try:
        limit_this_process(path.stat().st_size)
        unpickle(path, copy, sys.argv[3])
    except Exception as error:  # of any kind: the parent needs one line
        sys.stderr.write(f"\n{refusal(error)}\n")
        return 1
    return 0


def refusal(error: Exception) -> str:
    """An error in one line, to be put after the name of the file."""
    if isinstance(error, CheckpointError):
        return str(error)
    reason = str(error).partition(_ADVICE)[0].rpartition(_CAUSE)[2].rpartition(_WARNING)[2].split()
    if found := _OBJECT.search(" ".join(reason)):
        return f"refers to {found[1]}, which may run code: of objects nothing but tensors is read; {_MEND}"
    return _unreadable(f"{type(error).__name__}: {' '.join(reason)[:300]}")


def _unreadable(why: str) -> str:
    return f"is damaged, or holds more than tensors ({why}); {_MEND}"


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"is damaged: {why}; copy it again, or {_MEND}")


def _altered(why: str) -> CheckpointError:
    return CheckpointError(f"is not as torch.save writes it: {why}; {_MEND}")


def limit_this_process(n_bytes: int) -> None:
    """Limit what reading a file of `n_bytes` may take. Windows has no such limits: there only the time is bounded."""
    torch.set_num_threads(1)
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415  (exists on Unix only)

    limits = {
        resource.RLIMIT_CPU: int(SPARE_S + n_bytes / SLOWEST_BYTES_PER_S),
        resource.RLIMIT_FSIZE: 2 * n_bytes + (1 << 20),
        resource.RLIMIT_CORE: 0,
    }
    taken = Path("/proc/self/statm")
    if taken.exists():  # Linux; macOS does not enforce this limit
        pages = int(taken.read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + 3 * n_bytes + SPARE_BYTES
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


class _AnyConfig:
    """Stands in for the class of a configuration: it takes any attributes."""


class _LeftOut:
    """Stands in for an array or a number of NumPy's, and keeps nothing of it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def unpickle(path: Path, copy: Path, kind: str = STATE) -> None:
    """Write the tensors of `path` to `copy` as safetensors. For the child alone: it raises errors of any kind."""
    n_bytes = path.stat().st_size
    check_archive(path, n_bytes)
    stubs: list[Any] = [(_AnyConfig, name) for name in _CONFIG_CLASSES] + [(_LeftOut, name) for name in _ARRAYS]
    with torch.serialization.safe_globals(stubs if kind == CHECKPOINT else []):
        state = torch.load(path, map_location="cpu", weights_only=True)
    settings = plain_settings(state) if kind == CHECKPOINT else {}
    tensors = plain_tensors(state["model"] if kind == CHECKPOINT else state, n_bytes)
    save_file(tensors, copy, metadata={SETTINGS: json.dumps(settings)})


def check_archive(path: Path, n_bytes: int) -> None:
    """Refuse what `torch.save` would not write: compressed members, odd names, more bytes than the file has."""
    if not zipfile.is_zipfile(path):
        raise _damaged("its zip archive has no end")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS or len({member.filename for member in members}) < len(members):
            raise _altered(f"an archive with a name twice, or of {len(members):,} files")
        for member in members:
            name = member.filename
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise _altered(f"{name!r:.80} in the archive is compressed")
            if not name.isprintable() or name.startswith("/") or {"..", "."} & set(name.split("/")) or "\\" in name:
                raise _altered(f"{name!r:.80} in the archive leaves its folder")
        if sum(member.file_size for member in members) > n_bytes:
            raise _altered("the archive claims more bytes than it has")
        if bad := archive.testzip():
            raise _damaged(f"the CRC-32 of {bad!r:.80} in the archive differs")


def plain_settings(checkpoint: Any) -> dict[str, Any]:
    """Numbers and texts beside the model of a training checkpoint: nanoGPT's `model_args`, or a `config`."""
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise CheckpointError(_without_settings(checkpoint))
    arguments, config = checkpoint.get("model_args"), checkpoint.get("config")
    from_object = not arguments and isinstance(config, _AnyConfig)
    settings = vars(config) if from_object else arguments or config
    if not isinstance(settings, dict):
        raise CheckpointError("does not state the sizes of its model: it has no 'model_args' and no 'config'.")
    plain = {str(k): value for k, value in (checkpoint | settings).items() if type(value) in (int, float, bool, str)}
    if len(text := json.dumps(plain)) > MOST_SETTINGS:
        raise CheckpointError(f"has {len(text):,} characters of settings, at most {MOST_SETTINGS:,} are read.")
    return plain | {FROM_OBJECT: from_object}


def _without_settings(state: Any) -> str:
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(repr(key)[:40] for key in list(state)[:8]) if isinstance(state, dict) else ""
        kind = f"a {type(state).__name__} with {keys or 'no keys'}"
        return f"is no training checkpoint: {kind}, expected a dict with 'model' and 'model_args'."
    return (
        f"holds {len(state):,} tensors and no settings: their shapes do not tell n_head. Save {{'model': tensors, "
        "'model_args': {'n_layer': ..., 'n_head': ...}} as nanoGPT does, or, with the names and the orientation of "
        "Hugging Face, call it pytorch_model.bin and write a config.json beside it."
    )


def plain_tensors(state: Any, n_bytes: int) -> dict[str, Tensor]:
    """The state dict, if it holds dense tensors by name, none larger than a file of `n_bytes` can hold."""
    if not isinstance(state, dict):
        raise CheckpointError(f"holds more than tensors: a {type(state).__name__} instead of a dict; {_MEND}")
    if len(state) > MAX_MEMBERS:
        raise CheckpointError(f"holds {len(state):,} tensors, at most {MAX_MEMBERS:,} are read.")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    room = 2 * n_bytes  # tied weights are in the file once and here twice
    for name, value in state.items():
        if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"holds {name!r:.80}, which is not a name of a tensor; {_MEND}")
        if type(value) not in (Tensor, nn.Parameter):
            kind = "an array of NumPy" if isinstance(value, _LeftOut) else f"of type {type(value).__name__}"
            raise CheckpointError(f"holds more than tensors: {name} is {kind}; {_MEND}")
        if value.dtype.is_floating_point and value.element_size() < 2:
            raise CheckpointError(f"holds {name} of type {str(value.dtype)[6:]}: {QUANTIZED}")
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES or value.is_neg():
            kind = f"{str(value.dtype)[6:]}, {str(value.layout)[6:]}, on {value.device.type}"
            raise CheckpointError(f"holds {name}, which is not a dense tensor of plain numbers: {kind}; {_MEND}")
        storage, taken = value.untyped_storage(), value.numel() * value.element_size()
        room -= taken
        if taken > storage.nbytes() or room < 0:
            raise _altered(f"{name} has {value.numel():,} elements, more than the file holds")
        own = value.detach().contiguous()
        tensors[name] = own.clone() if storage.data_ptr() in storages else own  # safetensors takes no shared memory
        storages.add(storage.data_ptr())
    return tensors


if __name__ == "__main__":
    raise SystemExit(main())
