"""What `regpt2 serve` may be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.sampling.continue_text import SampleType


@dataclass(frozen=True)
class ServeOptions:
    """Serve models over HTTP: OpenAI's API, a page to write with at /, training runs at /runs."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Run folders, checkpoints, files or folders of any format, or hf:gpt2; the first is the default."""
    host: str = "127.0.0.1"
    """The address to listen at; any but this machine's own needs an API key."""
    port: int = 8000
    """The port to listen at; 0 takes a free one."""
    runs: Path = Path("runs")
    """The folder of runs that /runs shows, if it exists."""
    slots: int = 8
    """Continuations that are written at once, of each model."""
    queue: int = 32
    """Requests that may wait, of each model; more are refused with status 429."""
    context: int | None = None
    """Most tokens of context, prompt included. Default: as many as in training, at most block_size."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: SampleType = "fp32"
    """Data type of weights and activations; int8, on a CPU only, applies to the matrix products."""
