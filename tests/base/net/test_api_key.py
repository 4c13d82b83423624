"""The API key of a server: from a file or the environment, never quoted in a message."""

from pathlib import Path

import pytest

from regpt2.base.errors import UsageError
from regpt2.base.net.api_key import VARIABLE, read_api_key

KEY = "sk-0123456789-abcdef"


def test_the_file_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv(VARIABLE, "e" * 16)
    assert read_api_key(None) == "e" * 16
    (tmp_path / "key").write_text(f"  {KEY}\r\n")
    assert read_api_key(tmp_path / "key") == KEY


@pytest.mark.parametrize(
    "content", ["", "\n", "short-secret", "two words of a secret", "k\xfcrz-secret-secret", "s" * 513]
)
def test_what_is_no_key_is_refused_without_being_shown(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(UsageError, match="must hold one API key of 16 to 512 ASCII") as refused:
        read_api_key(tmp_path / "key")
    assert "secret" not in str(refused.value).replace("secrets.token_urlsafe", "").replace("import secrets", "")
    if content.strip():
        monkeypatch.setenv(VARIABLE, content)
        with pytest.raises(UsageError, match=VARIABLE):
            read_api_key(None)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="--api-key-file") as refused:
            read_api_key(path)
        assert str(path) in str(refused.value)
