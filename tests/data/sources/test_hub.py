"""The hub: a listing that is checked and kept, and the files of a split as the `datasets` library chooses them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import FakeHub
from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.base.net import http_client
from regpt2.base.net.download import fetch
from regpt2.data.sources import hub, hub_splits
from regpt2.data.sources.hub import list_files, resolve
from regpt2.data.sources.hub_splits import files_of, matches
from regpt2.data.sources.plan import InputFile

pytestmark = pytest.mark.seconds  # all of them together

FILES = {
    "notes.txt": b"",
    "README.md": b"# Texts\n",
    "data/train-00000-of-00002.parquet": b"PAR1 a",
    "data/train-00001-of-00002.parquet": b"PAR1 b",
    "data/validation-00000-of-00001.parquet": b"PAR1 c",
    "more/a b#c?.jsonl": b"{}\n" * 99,
}


def be_the_hub(monkeypatch: pytest.MonkeyPatch, it: FakeHub, cache: Path) -> None:
    monkeypatch.setattr(http_client, "PAUSE_S", 0.01)
    for name, value in it.environment(cache).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with me/texts, listed two files a page."""
    with FakeHub({"me/texts": FILES}, page_size=2) as it:
        be_the_hub(monkeypatch, it, tmp_path / "cache")
        yield it


def paths(files: list[InputFile]) -> list[str]:
    return [file.name for file in files]


def test_the_hub_of_the_tests_is_one_to_the_hubs_own_client(
    texts: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that client sees the same files as we do."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = huggingface_hub.HfApi(endpoint=texts.endpoint)
    commit = api.dataset_info("me/texts", revision="main").sha
    assert commit == resolve("me/texts", "main") == texts.commits["me/texts"]
    tree = api.list_repo_tree("me/texts", repo_type="dataset", revision=commit, recursive=True)
    theirs = {f.path: f for f in tree if isinstance(f, huggingface_hub.RepoFile)}
    ours = {f.name: f for f in list_files("me/texts", commit)}
    assert set(theirs) == set(ours) == set(FILES)
    for path, content in FILES.items():
        file, lfs = theirs[path], theirs[path].lfs
        assert (ours[path].n_bytes, ours[path].digest) == (file.size, lfs.sha256 if lfs else file.blob_id)
        where = {"repo_type": "dataset", "revision": commit, "endpoint": texts.endpoint, "cache_dir": tmp_path / "hf"}
        got = huggingface_hub.hf_hub_download("me/texts", path, **where)  # type: ignore[call-overload]
        assert Path(got).read_bytes() == content
        assert huggingface_hub.hf_hub_url("me/texts", path, repo_type="dataset", revision=commit).endswith(
            hub.url_of("me/texts", commit, path).removeprefix(texts.endpoint)
        )


def test_what_is_planned_can_be_fetched(texts: FakeHub, tmp_path: Path) -> None:
    commit = resolve("me/texts", "main")
    for file in list_files("me/texts", commit):
        assert (file.path, file.mtime_ns) == ("", 0)
        fetch(file.url, tmp_path / "got" / file.name, n_bytes=file.n_bytes, digest=file.digest)
        assert (tmp_path / "got" / file.name).read_bytes() == FILES[file.name]


def test_a_commit_needs_no_answer_and_its_listing_is_kept(
    texts: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = texts.commits["me/texts"]
    assert resolve("me/texts", commit) == commit and not texts.requests
    files = list_files("me/texts", commit)
    assert len(texts.requests) == 3, "three pages"
    assert paths(files) == sorted(FILES)
    assert paths(list_files("me/texts", commit, "data")) == sorted(FILES)[1:4]
    assert list_files("me/texts", commit, "no such folder") == []
    card = hub.card_configs("me/texts", commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list_files("me/texts", commit) == files and hub.card_configs("me/texts", commit) == card
    kept = next((tmp_path / "cache").rglob("files-.json"))
    for damage in ("", "{", "[1]", kept.read_text().replace("README.md", "../README.md"), '[{"path": "a"}]'):
        kept.write_text(damage)
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
            list_files("me/texts", commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert list_files("me/texts", commit) == files


def test_a_passing_fault_is_not_noticed(texts: FakeHub) -> None:
    for kind, at in (("status", 503), ("dies", 10), ("short", 10)):
        texts.plant("api", kind, at=at)
    assert paths(list_files("me/texts", texts.commits["me/texts"])) == sorted(FILES)


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("texts", "main", "expected OWNER/NAME"),
        ("me/../texts", "main", "expected OWNER/NAME"),
        ("me/texts?x=1", "main", "expected OWNER/NAME"),
        ("https://huggingface.co/me/texts", "main", "expected OWNER/NAME"),
        ("me/texts", "../main", "expected a branch"),
        ("me/texts", "", "expected a branch"),
        ("me/texts", "a b", "expected a branch"),
    ],
)
def test_what_is_no_id_or_revision_is_refused_before_it_is_sent(
    texts: FakeHub, repo: str, revision: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(repo, revision)
    assert not texts.requests


def test_what_is_not_there_or_not_reached_is_told_with_what_to_do(
    texts: FakeHub, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    with pytest.raises(DownloadError, match=r"me/text/.* \(HTTP 404\); check the name and the revision\.$"):
        resolve("me/text", "main")
    with pytest.raises(DownloadError, match=r"v2.*404"):
        resolve("me/texts", "v2")
    texts.plant("api", "page")
    with pytest.raises(DownloadError, match=r"log in"):
        resolve("me/texts", "main")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port}")
    with pytest.raises(DownloadError, match=r"refused.*a mirror in HF_ENDPOINT.*--input FOLDER"):
        resolve("me/texts", "main")


ENTRY = {"type": "file", "path": "a.txt", "size": 1, "oid": "0" * 40}


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../a"},
        {"path": "/etc/passwd"},
        {"path": "a/./b"},
        {"path": "a//b"},
        {"path": "a\\b"},
        {"path": "a\x1b[2J"},
        {"path": "a\nb"},
        {"path": "\ud800"},
        {"path": "x" * 1001},
        {"path": 7},
        {"path": None},
        {"size": -1},
        {"size": 1.5},
        {"size": True},
        {"size": "1"},
        {"size": 1 << 60},
        {"oid": "xyz"},
        {"oid": None},
        {"lfs": {"oid": "0" * 64}},
        {"lfs": 7},
    ],
)
def test_an_impossible_listing_is_refused(
    texts: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(hub, "_ask", lambda url: (json.loads(json.dumps([ENTRY | change])), {}))
    with pytest.raises(DownloadError, match="lists impossible files of me/texts"):
        list_files("me/texts", "0" * 40)
    assert not list((tmp_path / "cache").rglob("files*"))


@pytest.mark.parametrize("answer", [7, None, "x", {"error": "no"}, [7], [{}], [None]])
def test_no_listing_at_all_is_refused(texts: FakeHub, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    monkeypatch.setattr(hub, "_ask", lambda url: (answer, {}))
    with pytest.raises(DownloadError, match="lists impossible files"):
        list_files("me/texts", "0" * 40)
    with pytest.raises(DownloadError, match="does not say which commit"):
        resolve("me/texts", "main")


def test_the_next_page_is_the_hubs_own_and_pages_end(texts: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(link: str) -> Any:
        return lambda url: (asked.append(url), ([ENTRY], {"Link": link}))[1]

    monkeypatch.setattr(hub, "_ask", answer('<http://evil.example/x>; rel="next"'))
    with pytest.raises(DownloadError, match="on another host"):
        list_files("me/texts", "0" * 40)
    assert asked == [f"{texts.endpoint}/api/datasets/me/texts/tree/{'0' * 40}?recursive=true"]
    monkeypatch.setattr(hub, "_ask", answer('</x>; rel="next"'))
    assert paths(list_files("me/texts", "0" * 40)) == ["a.txt"], "pages that lead to each other end"


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("data/*.parquet", "data/a.parquet", True),
        ("data/*.parquet", "data/x/a.parquet", False),
        ("./a.txt", "a.txt", True),
        ("data/**", "data/x/y/a.txt", True),
        ("data/**/a.txt", "data/a.txt", True),
        ("**/a.txt", "a.txt", True),
        ("**", "x/a.txt", True),
        ("**", "x/.git/a.txt", False),
        ("**", ".gitattributes", False),
        (".hidden/*", ".hidden/a.txt", True),
        ("**", "__pycache__/a.txt", False),
        ("**", "README.md", False),
        ("README.md", "README.md", True),
        ("train-[0-9][0-9].txt", "train-07.txt", True),
        ("data?.txt", "data1.txt", True),
        ("DATA.txt", "data.txt", False),
        ("data", "data/a.txt", False),
    ],
)
def test_patterns_mean_what_they_mean_to_a_card(pattern: str, path: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


def test_a_pattern_that_is_made_to_take_forever_does_not() -> None:
    assert not matches("/".join(["a"] * 500), "/".join(["**", "a"] * 200 + ["b"]))


# The choice of files -----------------------------------------------------------------------------------------------

TREES: dict[str, list[str]] = {
    "sharded": ["data/train-00000-of-00001.parquet", "data/dev-00000-of-00001.parquet", "extra/train.parquet"],
    "folders": ["train/b.jsonl", "train/a.jsonl", "dev/c.jsonl", "testing/x/d.jsonl"],
    "deep folders": ["x/train_v2/b.parquet", "x/my-valid/c.parquet", "x/other/d.parquet"],
    "names": ["train_0.txt", "train_1.txt", "my-test.txt", "constrain.txt", "x/validation.txt"],
    "nothing said": ["b.jsonl", "a.jsonl", "x/c.jsonl"],
    "hidden": ["a.jsonl", ".x/b.jsonl", "__pycache__/c.jsonl", ".d.jsonl", "dataset_infos.json"],
    "two kinds": ["a.jsonl", "b.jsonl", "c.parquet", "d.py", "LICENSE"],
    "compressed": ["train.jsonl.gz", "test.jsonl.zst"],
}
CARDS: dict[str, list[dict[str, Any]]] = {
    "one pattern": [{"config_name": "all", "data_files": "**/*.txt"}],
    "list of patterns": [{"config_name": "all", "data_files": ["x/*", "train_[0-9].txt"]}],
    "splits": [
        {"config_name": "a", "data_files": [{"split": "train", "path": "train_*.txt"}]},
        {
            "config_name": "b",
            "default": True,
            "data_files": [
                {"split": "train", "path": ["x/validation.txt", "train_1.txt"]},
                {"split": "test", "path": "my-test.txt"},
            ],
        },
    ],
    "data_dir": [{"config_name": "default", "data_dir": "x"}],
}


def chosen_by_datasets(folder: Path, files: list[str], card: list[dict[str, Any]], config: str) -> dict[str, list[str]]:
    """By the library itself, from a folder with the same files."""
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': card})}\n---\n" if card else "# x\n")
    builder = datasets.load_dataset_builder(str(folder), config or None, cache_dir=str(folder.parent / "cache"))
    found = {str(split): list(where) for split, where in builder.config.data_files.items()}
    return {split: [Path(p).relative_to(folder).as_posix() for p in where] for split, where in found.items()}


def compare(monkeypatch: pytest.MonkeyPatch, place: Path, files: list[str], card: list[Any], config: str = "") -> None:
    expected = chosen_by_datasets(place / "copy", files, card, config)
    content = dict.fromkeys([*files, "README.md"], b"x")
    with FakeHub({"me/data": content}, cards={"me/data": {"configs": card}} if card else {}) as it:
        be_the_hub(monkeypatch, it, place / "cache-of-hub")
        commit = resolve("me/data", "main")
        for split, where in expected.items():
            assert files_of("me/data", commit, config, split)[0] == commit
            assert paths(files_of("me/data", commit, config, split)[1]) == list(dict.fromkeys(where)), (files, split)
        with pytest.raises(UsageError, match=f"Available: {', '.join(sorted(expected))}"):
            files_of("me/data", commit, config, "none")


@pytest.mark.filterwarnings("ignore")  # of the library
@pytest.mark.parametrize("tree", TREES)
def test_without_a_card_names_decide_as_in_datasets(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, tmp_path, TREES[tree], [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("card", "config"), [*((name, "") for name in CARDS), ("splits", "a")])
def test_a_card_decides_as_in_datasets(card: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, tmp_path, TREES["names"], CARDS[card], config)


@pytest.mark.filterwarnings("ignore")
def test_random_trees_are_read_as_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    words = ["train", "valid", "val", "test", "dev", "eval", "x", "data", "text", "training", "en"]
    for trial in range(20):
        files = set()
        for _ in range(chance.randint(1, 6)):
            depth = chance.randint(1, 3)
            names = [
                "".join(chance.choices(words, k=1) + chance.choices(["", "-", "_1", "2", "s"])) for _ in range(depth)
            ]
            files.add("/".join(names) + ".jsonl")
        compare(monkeypatch, tmp_path / str(trial), sorted(files), [])


def converted(monkeypatch: pytest.MonkeyPatch, place: Path, parquet: list[str], own: list[str]) -> FakeHub:
    it = FakeHub(
        {
            "me/data": dict.fromkeys(own, b"x"),
            "me/data@refs/convert/parquet": dict.fromkeys(parquet, b"PAR1"),
        }
    )
    it.__enter__()
    be_the_hub(monkeypatch, it, place)
    return it


def test_files_that_we_cannot_read_are_taken_from_the_hubs_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = ["default/train/0000.parquet", "default/train/0001.parquet", "default/partial-test/0000.parquet"]
    it = converted(monkeypatch, tmp_path, parquet, ["train.csv", "test.csv"])
    try:
        commit, files = files_of("me/data", resolve("me/data", "main"), "", "train")
        assert commit == it.commits["me/data@refs/convert/parquet"] != it.commits["me/data"]
        assert paths(files) == parquet[:2]
        (file, _) = files
        fetch(file.url, tmp_path / "got", n_bytes=file.n_bytes, digest=file.digest)
        with pytest.raises(DataError, match="ends after 5 GB"):
            files_of("me/data", resolve("me/data", "main"), "", "test")
    finally:
        it.__exit__()


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        ("", "train", r"several configurations: a, b; choose one with --config"),
        ("aa", "train", r"no --config 'aa'; did you mean 'a'\? Available: a, b"),
        ("a", "trian", r"no --split 'trian'; did you mean 'train'\? Available: test, train"),
    ],
)
def test_what_a_data_set_does_not_have_is_told_with_what_it_has(
    texts: FakeHub, config: str, split: str, message: str
) -> None:
    splits = [{"split": "train", "path": "data/train*"}, {"split": "test", "path": "notes.txt"}]
    card = [{"config_name": name, "data_files": splits} for name in "ab"]
    texts.cards["me/texts"] = {"configs": card}
    with pytest.raises(UsageError, match=message):
        files_of("me/texts", resolve("me/texts", "main"), config, split)


def test_without_a_card_a_folder_is_a_configuration(texts: FakeHub) -> None:
    commit = resolve("me/texts", "main")
    assert paths(files_of("me/texts", commit, "more", "train")[1]) == ["more/a b#c?.jsonl"]
    with pytest.raises(UsageError, match=r"no --config 'mor'; did you mean 'more'\? Available: data, more"):
        files_of("me/texts", commit, "mor", "train")


@pytest.mark.parametrize(
    "configs",
    [7, {"a": 1}, [7], [{}], [{"config_name": "a", "data_files": 7}], [{"config_name": "a", "data_files": [{"x": 1}]}],
     [{"config_name": ["a"], "data_files": "x"}], [{"config_name": "a", "data_dir": 7}]],
)  # fmt: skip
def test_a_card_that_is_not_understood_is_refused(texts: FakeHub, configs: Any) -> None:
    texts.cards["me/texts"] = {"configs": configs}
    with pytest.raises(DataError, match="its card describes its configurations in a way that is not understood"):
        files_of("me/texts", resolve("me/texts", "main"), "", "train")


def test_gated_data_sets_say_how_to_get_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub({"me/texts": FILES}, token="hf_secret") as it:
        be_the_hub(monkeypatch, it, tmp_path)
        assert resolve("me/texts", "main")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(DownloadError, match=r"gated, private or missing.*HF_TOKEN"):
            resolve("me/texts", "main")


def test_the_readable_kinds_are_those_of_records() -> None:
    from regpt2.data.sources import records

    assert set(hub_splits.TEXT) < set(records.TEXT)
