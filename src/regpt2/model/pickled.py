"""A foreign PyTorch file (`.bin`, `.pt`). In: its path; out: its tensors, unpickled by a child process with limits.

A pickle can hold code, and little of it can fill memory or a disk. So a child does all that looks inside the file:
with `weights_only=True`, which builds tensors and nothing else, in bounded memory, time and space on disk. It hands
plain tensors over as safetensors. Of a training checkpoint it hands over the model and its settings, which may be an
object of a class that is not here: a stub takes its attributes, and no code of its own.
"""

import json
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
from regpt2.model.load import TENSOR_NAME, WEIGHTS, peek_metadata, read_tensors

MAX_MEMBERS = 10_000  # tensors, and files in the archive; GPT-2 XL has 580
SPARE_BYTES = 512 << 20  # beyond what torch itself takes and three times the file
SPARE_S = 60.0  # beyond the time at the slowest speed that a disk may have
SLOWEST_BYTES_PER_S = 20e6
MOST_SETTINGS = 100_000  # characters; nanoGPT has 200
STATE, CHECKPOINT, SETTINGS = "state", "checkpoint", "settings"
_CONFIG_CLASSES = ("__main__.GPTConfig", "model.GPTConfig", "train_gpt2.GPTConfig")  # of build-nanogpt and its forks
_CAUSE = "WeightsUnpickler error: "
_MEND = f"get the model as {WEIGHTS} instead."
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote. Nothing in the file is run.

    Raises:
        CheckpointError, Problem: as `read_training_checkpoint`.
    """
    return _read(path, STATE)[0]


def read_training_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a checkpoint that nanoGPT or a relative wrote. Nothing in the file is run.

    Raises:
        CheckpointError: it is damaged, of an old kind, holds more than tensors, or would take more than its size.
        Problem: there is no room for a copy in the temporary folder.
    """
    return _read(path, CHECKPOINT)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or no plain file.")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{path} is no zip archive: not from torch.save, or from one before torch 1.6; {_MEND}"
            )
    n_bytes = path.stat().st_size
    require_free_space(Path(tempfile.gettempdir()), n_bytes, f"a copy of {path.name}")
    with tempfile.TemporaryDirectory(prefix="regpt2-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / WEIGHTS
        if reason := _run_child(path.absolute(), copy, kind, SPARE_S + 2 * n_bytes / SLOWEST_BYTES_PER_S):
            raise CheckpointError(f"{path} is damaged, or holds more than tensors ({reason}); {_MEND}")
        return read_tensors(copy), json.loads(peek_metadata(copy, SETTINGS) or "{}")


def _run_child(path: Path, copy: Path, kind: str, timeout_s: float) -> str:
    """Unpickle in a process of its own, which has no input and none of our open files. Empty, or why it failed."""
    said = copy.with_name("said")
    command = [sys.executable, "-I", "-m", "regpt2.model.pickled", str(path), str(copy), kind]
    with open(said, "wb") as errors:
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
            return f"reading it took more than {timeout_s:.0f} s"
    if code == 0:
        return ""
    with open(said, "rb") as file:
        lines = file.read(10_000).decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return safe_text(last)[:500] if code == 1 and last else f"its reader ended with code {code}"


def main() -> int:
    """The child. In: the file, the place of the copy and the kind; out: the copy, or one line and code 1."""
    path, copy = map(Path, sys.argv[1:3])
    try:
        limit_this_process(path.stat().st_size)
        unpickle(path, copy, sys.argv[3])
    except CheckpointError as refusal:
        sys.stderr.write(f"\n{refusal}\n")
        return 1
    except Exception as error:  # whatever it is, the parent needs one line
        lines = str(error).strip().split("\n")
        told = next((line for line in lines if _CAUSE in line), lines[0]).rpartition(_CAUSE)[2]  # not torch's advice
        sys.stderr.write(f"\n{type(error).__name__}: {told.strip()}\n")
        return 1
    return 0


def limit_this_process(n_bytes: int) -> None:
    """Bound what reading a file of so many bytes may take. Windows has no such limits: the time remains bounded."""
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


class _Settings:
    """Stands in for the class of a configuration: it takes any attributes."""


def unpickle(path: Path, copy: Path, kind: str = STATE) -> None:
    """Write the tensors of `path` to `copy` as safetensors. For the child alone: what it raises is of every kind."""
    n_bytes = path.stat().st_size
    check_archive(path, n_bytes)
    with torch.serialization.safe_globals([(_Settings, name) for name in _CONFIG_CLASSES if kind == CHECKPOINT]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    settings = plain_settings(state) if kind == CHECKPOINT else {}
    tensors = plain_tensors(state["model"] if kind == CHECKPOINT else state, n_bytes)
    save_file(tensors, copy, metadata={SETTINGS: json.dumps(settings)})


def check_archive(path: Path, n_bytes: int) -> None:
    """Refuse an archive that is not as `torch.save` writes it: plain members, in all no larger than the file."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError("its zip archive has no end")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS or len({member.filename for member in members}) < len(members):
            raise CheckpointError(f"an archive with a name twice, or of {len(members):,} files")
        for member in members:
            name = member.filename
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise CheckpointError(f"{name} in the archive is compressed, torch.save does not compress")
            if not name.isprintable() or name.startswith("/") or {"..", "."} & set(name.split("/")) or "\\" in name:
                raise CheckpointError(f"{name!r} in the archive leaves its folder")
        if sum(member.file_size for member in members) > n_bytes:
            raise CheckpointError("the archive says that it holds more bytes than it has")
        if bad := archive.testzip():
            raise CheckpointError(f"{bad} in the archive is damaged: its CRC-32 differs")


def plain_settings(checkpoint: Any) -> dict[str, Any]:
    """The numbers and texts that a training checkpoint has beside its model: nanoGPT's `model_args`, or a `config`."""
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise CheckpointError("it is no training checkpoint: it has no 'model'")
    settings = checkpoint.get("model_args") or checkpoint.get("config")
    settings = vars(settings) if isinstance(settings, _Settings) else settings
    if not isinstance(settings, dict):
        raise CheckpointError("it does not say how large its model is: it has no 'model_args' and no 'config'")
    plain = {str(k): value for k, value in (checkpoint | settings).items() if type(value) in (int, float, bool, str)}
    if len(text := json.dumps(plain)) > MOST_SETTINGS:
        raise CheckpointError(f"{len(text):,} characters of settings, at most {MOST_SETTINGS:,} are read")
    return plain


def plain_tensors(state: Any, n_bytes: int) -> dict[str, Tensor]:
    """The state dict, if it holds dense tensors by name that are all there in a file of `n_bytes`."""
    if not isinstance(state, dict):
        raise CheckpointError(f"it is a {type(state).__name__}, no state dict")
    if len(state) > MAX_MEMBERS:
        raise CheckpointError(f"{len(state):,} tensors, at most {MAX_MEMBERS:,} are read")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    room = 2 * n_bytes  # tied weights are in the file once and here twice
    for name, value in state.items():
        if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"{name!r:.80} is no name of a tensor")
        if type(value) not in (Tensor, nn.Parameter):
            raise CheckpointError(f"{name} is a {type(value).__name__}, no state dict has that")
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES or value.is_neg():
            raise CheckpointError(f"{name} is no dense tensor of plain numbers: {value.dtype}, {value.layout}")
        storage, taken = value.untyped_storage(), value.numel() * value.element_size()
        room -= taken
        if taken > storage.nbytes() or room < 0:
            raise CheckpointError(f"{name} has {value.numel():,} elements, more than the file holds")
        own = value.detach().contiguous()
        tensors[name] = own.clone() if storage.data_ptr() in storages else own  # safetensors takes no shared memory
        storages.add(storage.data_ptr())
    return tensors


if __name__ == "__main__":
    raise SystemExit(main())
