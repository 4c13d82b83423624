"""Data of evaluations: found by path, in the cache, or downloaded and checked; never another file than the pinned."""

import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from regpt2.base import shelves
from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.base.files import sha256_bytes
from regpt2.evals.scoring import assets as assets_module
from regpt2.evals.scoring.assets import Asset, files_by_name, find, find_parts

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
        ("lambada.piqa=.", "lambada has no part 'piqa'"),
    ],
)
def test_what_is_no_pair_is_refused(item: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        files_by_name([item], ["hellaswag", "lambada"])


def test_every_asset_of_the_shelf_is_pinned_or_given_by_hand() -> None:
    for name in shelves.entries("evals"):
        for asset in shelves.load("evals", name).ASSETS:
            assert bool(asset.url) == bool(asset.digest), f"{name}: {asset.name}"
            assert not asset.url or (asset.url.startswith("https://") and len(asset.digest) in (40, 64)), asset.url


def test_a_file_may_be_pinned_by_git_s_hash(served: str, tmp_path: Path) -> None:
    sha1 = "8e5e1f3b4f0b9f5a6d9d0d8a7d3a2f1b0c9d8e7f"  # of nothing here
    good = subprocess.run(["git", "hash-object", "--stdin"], input=CONTENT, capture_output=True, check=True)
    asset = Asset("a.jsonl", f"{served}/a.jsonl", "", git_sha1=good.stdout.decode().strip())
    assert find(asset, "core", {}).read_bytes() == CONTENT
    assert asset.is_pinned(CONTENT)
    assert not asset.is_pinned(CONTENT + b" ")
    assert find(asset, "core", {}).read_bytes() == CONTENT, "found again without a download"
    with pytest.raises(DownloadError, match=f"git blob SHA-1 {asset.git_sha1}, expected {sha1}"):
        find(Asset("b.jsonl", f"{served}/a.jsonl", "", git_sha1=sha1), "core", {})


def test_a_part_s_file_its_evaluation_s_folder_or_another_evaluation_s_file(tmp_path: Path) -> None:
    asset = Asset("a.jsonl", "", "", part="piqa", of="hellaswag")
    for name in ("a.jsonl", "part.jsonl", "other.jsonl"):
        (tmp_path / name).write_bytes(CONTENT)
    part, other = {"core.piqa": tmp_path / "part.jsonl"}, {"hellaswag": tmp_path / "other.jsonl"}
    assert find(asset, "core", {**part, **other, "core": tmp_path}) == tmp_path / "part.jsonl"
    assert find(asset, "core", {**other, "core": tmp_path}) == tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl").unlink()
    assert find(asset, "core", {**other, "core": tmp_path}) == tmp_path / "other.jsonl"


def test_parts_without_data_are_told_and_a_dead_network_is_asked_once(
    served: str, tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = assets_module.download

    def counted(url: str, path: Path, digest: str) -> None:
        asked.append(url)
        real(url, path, digest)

    monkeypatch.setattr(assets_module, "download", counted)
    digest, gone = sha256_bytes(CONTENT), f"http://127.0.0.1:{unused_port}/a.jsonl"
    parts = [
        Asset("a.jsonl", f"{served}/a.jsonl", digest, part="a"),
        Asset("b.jsonl", f"{served}/none.jsonl", digest, part="b"),
        Asset("c.jsonl", gone, digest, part="c"),
        Asset("d.jsonl", gone, digest, part="d"),
        Asset("a.jsonl", f"{served}/a.jsonl", digest, part="e"),
    ]
    paths, missing = find_parts(parts, "core", {})
    assert set(paths) == {"a", "e"}
    assert set(missing) == {"b", "c", "d"}
    assert asked == [f"{served}/a.jsonl", f"{served}/none.jsonl", gone], "d and e are only looked for here"
    asked.clear()
    assert set(find_parts(parts, "core", {}, ask=False)[0]) == {"a", "e"}
    assert asked == []
