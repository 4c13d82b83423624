"""What `regpt2 serve` may be told. In: the command line; out: options that make sense together."""

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.errors import UsageError
from regpt2.sampling.continue_text import SampleType

_NAME = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[1-9][0-9]{0,4})?")
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[1-9][0-9]{0,4})?")
# The least and the most that each makes sense with.
RANGES = {
    "port": (0, 65535),
    "slots": (1, 1024),
    "queue": (1, 100_000),
    "context": (1, 1_000_000),
    "connections": (1, 100_000),
    "body_kb": (1, 65_536),
    "timeout_s": (0.1, 86_400),
    "drain_s": (0, 3600),
}


@dataclass(frozen=True)
class ServeOptions:
    """Serve models over HTTP: OpenAI's API, a page to write with at /, training runs at /runs."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [...]")]
    """Run folders, checkpoints, files or folders of any format, hf:gpt2, builtin:novels; the first is the default."""
    host: str = "127.0.0.1"
    """The address to listen at; any but this machine's own needs an API key."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    open: bool = False
    """Open the page in a browser, if this machine has a display."""
    runs: Path = Path("runs")
    """The folder of runs that /runs shows, if it exists."""
    slots: int = 8
    """Continuations that are written at once, of each model."""
    queue: int = 64
    """Requests that may wait, of each model; more are refused with status 429."""
    context: int | None = None
    """Most tokens of context, prompt included. Default: as many as in training, at most block_size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: SampleType = "fp32"
    """Data type of weights and activations; int8, on a CPU only, applies to the matrix products."""
    api_key_file: Path | None = None
    """A file with the key that clients must send. Default: the variable REGPT2_API_KEY; if it is empty, no key."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A NAME or NAME:PORT by which clients reach this server, as through a reverse proxy; may be repeated."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A site, as https://NAME, whose pages may ask this server; may be repeated."""
    connections: int = 128
    """Connections at a time; more are refused with status 503."""
    body_kb: int = 256
    """Largest body of a request, in KiB."""
    timeout_s: float = 300.0
    """Seconds in which a request must be answered in full."""
    drain_s: float = 10.0
    """Seconds that requests get to finish when the server is stopped."""
    log_requests: bool = False
    """Print a line for each request."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: the first such option.
        """
        if not self.models or not all(self.models):
            raise UsageError("serve needs a model: regpt2 serve runs/demo.")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise UsageError(f"{_option(name)} {value} must be between {least:,} and {most:,}.".replace(",", ""))
        if not re.fullmatch(r"[a-z0-9._-]+", self.host.lower()) and not _is_number(self.host):
            raise UsageError(f"--host {self.host!r} must be an address or a name, as 127.0.0.1, without a port.")
        for name in self.allow_host:
            if not _NAME.fullmatch(name):
                raise UsageError(
                    f"--allow-host {name!r} must be NAME or NAME:PORT in small letters, as gpt.example.org."
                )
        for origin in self.allow_origin:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"--allow-origin {origin!r} must be a site without a path, in small letters, as https://example.org."
                )

    @property
    def is_local(self) -> bool:
        """Can only programs on this machine connect?"""
        return self.host == "localhost" or (_is_number(self.host) and ipaddress.ip_address(self.host).is_loopback)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
