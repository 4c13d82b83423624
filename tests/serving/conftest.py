"""What the tests of the server share: two tiny models with random weights, served."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from regpt2.data.chat_template import SPECIAL
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running, server_of, write_tiny


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of text and one that chats; read only."""
    folder = tmp_path_factory.mktemp("served")
    text, chat = folder / TEXT_MODEL, folder / CHAT_MODEL
    write_tiny(text)
    write_tiny(chat, added=SPECIAL, ends_at=200)
    return text, chat


@pytest.fixture(scope="session")
def server(model_folders: tuple[Path, Path]) -> Iterator[Running]:
    """Both models, four slots each."""
    with server_of(*model_folders, slots=4, queue=64) as running:
        yield running
