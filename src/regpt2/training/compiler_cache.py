"""The compiler's work, kept for the next start. In: what decides the code; out: a file in the user's cache folder.

Compiling a step of 124M takes 35 to 90 s on a GPU's machine; a restart that finds its file takes some seconds. Torch
unpickles such a file, so it lies in the user's own cache like the compiler's other files, never in a run folder that
may come from elsewhere. It begins with its SHA-256: a flipped bit in a kernel would be wrong arithmetic. Each rank has
a file of its own: the code names the device.
"""

import hashlib
import json
from collections.abc import Mapping

import torch

from regpt2.base.console import warn
from regpt2.base.files import cache_dir, write_atomic

_KEPT_FILES = 20  # some 5 to 40 MB each
_DIGEST_BYTES = 32


class CompilerCache:
    """What torch.compile makes in this process, to be loaded by another that compiles the same."""

    def __init__(self, decides: Mapping[str, object]) -> None:
        """`decides`: all that another code would follow from; torch and its version are added."""
        text = json.dumps({**decides, "torch": torch.__version__, "cuda": torch.version.cuda}, sort_keys=True)
        self.path = cache_dir() / "compiled" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.bin"
        self.loaded = False

    def load(self) -> bool:
        """Before anything is compiled. False: there is no file, or torch cannot use it (a warning)."""
        if not self.path.is_file():
            return False
        try:
            content = self.path.read_bytes()
            digest, made = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            is_whole = hashlib.sha256(made).digest() == digest
            self.loaded = is_whole and torch.compiler.load_cache_artifacts(made) is not None
            why = "torch cannot use it" if is_whole else "it is damaged"
            self.path.touch()  # the oldest are removed
        except Exception as error:  # of the disk; or whatever torch meets in it
            why = f"{type(error).__name__}: {error}"
        if not self.loaded:
            warn(f"{self.path} cannot be used: {why}; the step is compiled again.")
        return self.loaded

    def save(self) -> None:
        """After the first update: everything has been compiled by then. Warns if the file cannot be written."""
        if self.loaded and not torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]:
            return
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, hashlib.sha256(made[0]).digest() + made[0])
            others = sorted(self.path.parent.glob("*.bin"), key=lambda path: -path.stat().st_mtime)
            for path in others[_KEPT_FILES:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            warn(f"the compiled step is not kept for the next start: {error}")
