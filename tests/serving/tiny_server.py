"""A server for tests. In: model folders; out: the real application, on a real socket, in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import torch
import uvicorn

from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.serving.app import build_app
from regpt2.serving.models import Models, serving
from regpt2.serving.options import ServeOptions

TEXT_MODEL, CHAT_MODEL = "tiny", "tiny-chat"
START_S = 30


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    port: int
    models: Models
    folders: dict[str, Path]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: object) -> openai.OpenAI:
        """The official client. Close it, or use it as a context: an open socket is a warning, and that an error."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)  # type: ignore[arg-type]


@contextmanager
def server_of(*folders: Path, **options: object) -> Iterator[Running]:
    """Serve these models by the real application, with uvicorn's own loop in a thread."""
    specs = tuple(str(folder) for folder in folders)
    with serving(ServeOptions(models=specs, device="cpu", **options)) as models:  # type: ignore[arg-type]
        app = build_app(models, Path("no-runs"))
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="server", daemon=True)
        thread.start()
        end_at = time.monotonic() + START_S
        while not server.started and time.monotonic() < end_at:
            time.sleep(0.01)
        try:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(port, models, {folder.name: folder for folder in folders})
        finally:
            server.should_exit = server.force_exit = True
            thread.join(START_S)


@torch.no_grad()
def write_tiny(folder: Path, *, added: tuple[str, ...] = (), block_size: int = 256, ends_at: int | None = None) -> None:
    """Random weights, each tensor another, so that text depends on all of the prompt; from `ends_at` on its last id."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=257 + len(added)))
    generator = torch.Generator().manual_seed(2)
    for key, p in model.named_parameters():
        mean, std = 1.0 if "ln" in key and key.endswith("weight") else 0.0, 0.6 if key.startswith("h.") else 0.15
        p.normal_(mean=mean, std=std, generator=generator)
    ids = model.wte.weight
    ids[257 + len(added) :] = 0.0
    ids[:32] *= 0.3
    ids[127:256] *= 0.6  # mostly ASCII, and now and then bytes that are no character
    if ends_at is not None:
        direction = torch.randn(32, generator=generator).sign()
        ids[256 + len(added)] = 0.2 * direction
        model.wpe.weight[ends_at:] = 60.0 * direction
    folder.mkdir(exist_ok=True)
    native.write(model, folder, TokenizerRef("bytes", load_tokenizer("bytes").fingerprint, added=added))
