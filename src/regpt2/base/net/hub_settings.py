"""Settings of the Hugging Face hub. In: the environment, the files of its own tools; out: address, token."""

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
    """The token of huggingface_hub: $HF_TOKEN, else that of `hf auth login`, renewed; "" if there is none.

    Raises:
        UsageError: it cannot be read, or has a character that cannot be sent.
    """
    import huggingface_hub  # noqa: PLC0415  (slow to import, needed for the hub only)

    try:
        token = huggingface_hub.get_token() or ""
    except Exception as error:  # a file that is not text, or a login in CI that failed
        raise UsageError(f"cannot read the token of the Hugging Face hub ({error}); set HF_TOKEN.") from None
    if not (token.isascii() and token.isprintable()):
        raise UsageError("the token of the Hugging Face hub has characters that no token has; set HF_TOKEN again.")
    return token


def is_offline() -> bool:
    """True if $HF_HUB_OFFLINE forbids requests to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
