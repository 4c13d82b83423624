"""Where the Hugging Face hub is, and who asks. In: the environment, as its own tools read it; out: address, token."""

import os
from pathlib import Path

from regpt2.base.errors import UsageError


def hub_endpoint() -> str:
    """The hub's address, or a mirror's: $HF_ENDPOINT.

    Raises:
        UsageError: $HF_ENDPOINT is no address.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise UsageError(f"HF_ENDPOINT = {endpoint!r}, expected an address such as https://huggingface.co.")
    return endpoint


def hub_token() -> str:
    """$HF_TOKEN, else what `hf auth login` has kept; empty if there is none.

    Raises:
        UsageError: it holds a character that cannot be sent.
    """
    home = Path(os.environ.get("HF_HOME") or _cache() / "huggingface")
    kept = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token and kept.is_file():
        token = kept.read_text(encoding="utf-8", errors="replace").strip()
    if not (token.isascii() and token.isprintable()):
        raise UsageError("the token of the Hugging Face hub holds characters that none can have; set HF_TOKEN anew.")
    return token


def is_offline() -> bool:
    """The user wants nothing from the hub: $HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
