"""Where the Hugging Face hub is, and who asks. In: the environment and its own tools' files; out: address, token."""

import os

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
    """What huggingface_hub sends: $HF_TOKEN, else what `hf auth login` keeps, renewed; empty if there is none.

    Raises:
        UsageError: it cannot be read, or holds a character that cannot be sent.
    """
    import huggingface_hub  # noqa: PLC0415  (slow to import, needed for the hub only)

    try:
        token = huggingface_hub.get_token() or ""
    except Exception as error:  # a file that is not text, or a login in CI that failed
        raise UsageError(f"cannot read the token of the Hugging Face hub ({error}); set HF_TOKEN.") from None
    if not (token.isascii() and token.isprintable()):
        raise UsageError("the token of the Hugging Face hub holds characters that none can have; set HF_TOKEN anew.")
    return token


def is_offline() -> bool:
    """The user wants nothing from the hub: $HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
