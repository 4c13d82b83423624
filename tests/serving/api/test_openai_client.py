"""The official client of OpenAI against a real server: whole answers and streams, of one shape and one text."""

import pytest
from serving.tiny_server import CHAT_MODEL, TEXT_MODEL, Running, server_of


def test_x(server: Running) -> None:
    with server.client() as client:
        print(client.completions.create(model=TEXT_MODEL, prompt="a", max_tokens=200, temperature=0))
        print(client.completions.create(model=TEXT_MODEL, prompt="ab", max_tokens=40, temperature=0))
        print(client.completions.create(model=CHAT_MODEL, prompt="ab", max_tokens=40, temperature=0))
