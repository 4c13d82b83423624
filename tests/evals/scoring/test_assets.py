"""Data of evaluations: found by path, in the cache, or downloaded and checked; never another file than the pinned."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from regpt2.base import shelves
from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.base.files import sha256_bytes
from regpt2.evals.scoring.assets import Asset, files_by_name, find

CONTENT = b'{"text": "a b"}\n'


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real server that has `a.jsonl`; the cache is empty."""
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_it_is_downloaded_once_and_then_found_in_the_cache(served: str, tmp_path: Path) -> None:
    asset = Asset("a.jsonl", f"{served}/a.jsonl", sha256_bytes(CONTENT))
    path = find(asset, "lambada", {})
    assert path == tmp_path / "cache" / "evals" / "lambada" / "a.jsonl"
    assert path.read_bytes() == CONTENT
    (tmp_path / "served" / "a.jsonl").unlink()
    assert find(asset, "lambada", {}) == path


def test_other_content_than_the_pinned_is_refused_and_not_kept(served: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"expected 0{64}.*--files lambada=PATH"):
        find(Asset("a.jsonl", f"{served}/a.jsonl", "0" * 64), "lambada", {})
    assert not list((tmp_path / "cache").rglob("a.jsonl"))


def test_without_network_it_says_how_to_give_a_copy(served: str, unused_port: int) -> None:
    gone = Asset("a.jsonl", f"http://127.0.0.1:{unused_port}/a.jsonl", "0" * 64)
    with pytest.raises(DownloadError, match="--files lambada=PATH"):
        find(gone, "lambada", {})
    with pytest.raises(DownloadError, match=r"not served as one file.*--files copa=PATH"):
        find(Asset("copa.jsonl", "", ""), "copa", {})


def test_a_path_given_by_hand_is_a_file_or_a_folder_that_holds_it(tmp_path: Path) -> None:
    asset = Asset("a.jsonl", "", "", other_names=("b.jsonl",))
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    for given in (tmp_path, tmp_path / "b.jsonl"):
        assert find(asset, "copa", {"copa": given}) == tmp_path / "b.jsonl"
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"nor a\.jsonl or b\.jsonl in it"):
        find(asset, "copa", {"copa": tmp_path})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("hellaswag", "expected NAME=PATH"),
        ("=x", "expected NAME=PATH"),
        ("hellaswagg=.", r"no evaluation 'hellaswagg'.*hellaswag"),
        ("hellaswag=nowhere", "does not exist"),
    ],
)
def test_what_is_no_pair_is_refused(item: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        files_by_name([item], ["hellaswag", "lambada"])


def test_every_asset_of_the_shelf_is_pinned_or_given_by_hand() -> None:
    for name in shelves.entries("evals"):
        for asset in shelves.load("evals", name).ASSETS:
            assert bool(asset.url) == bool(asset.sha256), f"{name}: {asset.name}"
            assert not asset.url or (asset.url.startswith("https://") and len(asset.sha256) == 64), asset.url
