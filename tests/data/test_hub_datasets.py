"""Published data sets: a hub on loopback in, plans and documents out; a local copy gives the same bytes."""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import FakeHub
from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.data.datasets import climbmix, fineweb, fineweb_edu, hub, openwebtext, wikitext
from regpt2.data.preparing.encode_part import local_copies
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.sources.plan import Document, Plan, Skipped, Source

WIKI_TEST = Path(__file__).parents[3] / "shared" / "data" / "eval" / "wiki.test.raw"
EDU = f"{fineweb_edu.FINEWEB_EDU.repo}@{fineweb_edu.FINEWEB_EDU.revision}"


def parquet(texts: list[str | None], **columns: list[object]) -> bytes:
    """A file like those of FineWeb: several row groups, several columns, zstd."""
    buffer = io.BytesIO()
    table = pa.table({"id": [str(n) for n in range(len(texts))], "text": pa.array(texts, pa.string()), **columns})
    pq.write_table(table, buffer, compression="zstd", row_group_size=7)
    return buffer.getvalue()


def rows(name: str, n: int = 20) -> list[str | None]:
    return [f"{name}, row {i}: " + "some text " * (i % 5) for i in range(n)]


FINEWEB_FILES = {
    "README.md": b"---\nlicense: odc-by\n---\n",
    "sample/10BT/001_00000.parquet": parquet(rows("second")),
    "sample/10BT/000_00000.parquet": parquet(rows("first")),
    "sample/10BT/010_00000.parquet": parquet(rows("third")),
    "sample/100BT/000_00000.parquet": parquet(rows("larger sample")),
    "data/CC-MAIN-2024-10/000_00000.parquet": parquet(rows("2024")),
    "data/CC-MAIN-2013-20/train-00000-of-00014.parquet": parquet(rows("2013")),
}


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def edu_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """FineWeb-Edu in small, at the pinned revision."""
    with FakeHub({EDU: FINEWEB_FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def read_all(entry: ModuleType, plan: Plan, folder: Path) -> tuple[list[Document], Skipped]:
    """Every document of every part, as a worker reads them."""
    found, skipped = list[Document](), Skipped()
    skipped.include(plan.skipped, plan.skipped.first)
    folder.mkdir(exist_ok=True)
    for index, part in enumerate(plan.parts):
        with local_copies(part, folder, index, lambda count: None) as local:
            found += entry.documents(local, skipped)
    assert not list(folder.iterdir()), "what was fetched is gone"
    return found, skipped


def names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(piece.file.name for part in plan.parts for piece in part.slices))


def write_copy(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_fineweb_edu_is_its_files_by_name_each_a_part_with_address_size_and_digest(
    edu_hub: FakeHub, tmp_path: Path
) -> None:
    plan = fineweb_edu.plan(Source())
    assert names(plan) == [f"sample/10BT/{n:03d}_00000.parquet" for n in (0, 1, 10)]
    assert [len(part.slices) for part in plan.parts] == [1, 1, 1]
    for part in plan.parts:
        file, content = part.slices[0].file, FINEWEB_FILES[part.slices[0].file.name]
        assert (file.path, file.n_bytes, file.digest) == ("", len(content), hashlib.sha256(content).hexdigest())
        assert file.url.startswith(edu_hub.endpoint)
        assert fineweb_edu.FINEWEB_EDU.revision in file.url
    assert plan.source == "HuggingFaceFW/fineweb-edu, sample-10BT"
    assert plan.revision == "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    assert (plan.n_tokens, plan.val_tokens) == (9_953_989_344, 100_000_000)
    assert not [request for request in edu_hub.requests if request.path.endswith(".parquet")], "planning reads no file"
    found, skipped = read_all(fineweb_edu, plan, tmp_path / "work")
    assert [document.text for document in found] == rows("first") + rows("second") + rows("third")
    assert not skipped


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("sample-100BT", ["sample/100BT/000_00000.parquet"]),
        ("default", ["data/CC-MAIN-2013-20/train-00000-of-00014.parquet", "data/CC-MAIN-2024-10/000_00000.parquet"]),
    ],
)
@pytest.mark.parametrize("entry", [fineweb, fineweb_edu])
def test_a_configuration_has_its_own_files(
    online: None, monkeypatch: pytest.MonkeyPatch, entry: ModuleType, config: str, expected: list[str]
) -> None:
    publication = fineweb.FINEWEB if entry is fineweb else fineweb_edu.FINEWEB_EDU
    with FakeHub({f"{publication.repo}@{publication.revision}": FINEWEB_FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        assert names(entry.plan(Source(config=config))) == expected


def test_the_first_files_are_a_preparation_of_their_own(edu_hub: FakeHub) -> None:
    plan = fineweb_edu.plan(Source(first=2))
    assert names(plan) == ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]
    assert plan.source == "HuggingFaceFW/fineweb-edu, sample-10BT, the first 2 files"
    assert plan.n_tokens == 9_953_989_344 * 2 // 3


def test_another_revision_is_resolved_and_recorded(edu_hub: FakeHub, tmp_path: Path) -> None:
    commit = edu_hub.put(fineweb_edu.FINEWEB_EDU.repo, {"sample/10BT/000_00000.parquet": parquet(["newer"])})
    plan = fineweb_edu.plan(Source(revision="main"))
    assert plan.revision == commit
    found, _ = read_all(fineweb_edu, plan, tmp_path / "work")
    assert found == [Document("newer")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Source(config="sample-10B"),
            r"no --config 'sample-10B'; did you mean 'sample-10BT'\? Available: sample-10BT, ",
        ),
        (Source(config="CC-MAIN-2024-10"), "choose hub --repo HuggingFaceFW/fineweb-edu --config CC-MAIN-2024-10"),
        (Source(repo="a/b"), "fineweb_edu takes no --repo"),
        (Source(split="test"), "fineweb_edu takes no --split"),
        (Source(Path("nowhere")), "--input nowhere: there is no such folder"),
        (Source(Path("nowhere"), revision="main"), "with --input takes no --revision"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_asked(edu_hub: FakeHub, source: Source, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fineweb_edu.plan(source)
    assert not edu_hub.requests


def test_no_files_of_the_pattern_is_said(edu_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no files sample/350BT/\*.parquet"):
        fineweb_edu.plan(Source(config="sample-350BT"))
    with pytest.raises(DataError, match=r"--input .* has no files sample/10BT/\*.parquet"):
        fineweb_edu.plan(Source(tmp_path))


def test_offline_is_one_message_and_a_local_copy_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        fineweb_edu.plan(Source())
    copy = write_copy(tmp_path / "copy", FINEWEB_FILES)
    assert names(fineweb_edu.plan(Source(copy))) == [f"sample/10BT/{n:03d}_00000.parquet" for n in (0, 1, 10)]


@pytest.mark.process
@pytest.mark.parametrize("layout", ["repository", "folder"])
def test_a_local_copy_gives_the_shards_of_the_download(
    edu_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    top = write_copy(tmp_path / "copy", FINEWEB_FILES)
    copy = top if layout == "repository" else top / "sample" / "10BT"
    (copy / "._000_00000.parquet").write_bytes(b"what macOS leaves on other disks")
    os.utime(top / "sample" / "10BT" / "000_00000.parquet", (1, 1))
    monkeypatch.setattr("regpt2.data.sources.plan.PART_BYTES", 100)
    downloaded, local = tmp_path / "downloaded", tmp_path / "local"
    options = {"tokenizer": "bytes", "val_tokens": 500, "shard_tokens": 700}
    first = prepare(PrepareOptions("fineweb_edu", downloaded, workers=2, **options))
    second = prepare(PrepareOptions("fineweb_edu", local, input=copy, workers=1, **options))
    shards = sorted(path.name for path in downloaded.glob("*.bin"))
    assert len(shards) > 3
    assert [path.name for path in sorted(local.glob("*.bin"))] == shards
    assert all((downloaded / name).read_bytes() == (local / name).read_bytes() for name in shards)
    assert first.fingerprint == second.fingerprint
    assert second.revision.startswith("a local copy: 3 files, names and sizes ")
    assert len(fineweb_edu.plan(Source(copy)).parts) > 3, "a local file is shared between workers"


def test_openwebtext_is_planned_without_a_validation_split(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"plain_text/train-{n:05d}-of-00080.parquet": parquet(rows(str(n))) for n in (1, 0)}
    publication = openwebtext.OPENWEBTEXT
    with FakeHub({f"{publication.repo}@{publication.revision}": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        plan = openwebtext.plan(Source())
    assert names(plan) == sorted(files)
    assert (plan.val_tokens, plan.n_tokens) == (0, 9_035_582_198 + 4_434_897)


# ClimbMix: shards in the repository's top folder, the last of which is the validation split.

CLIMBMIX_FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    **{f"shard_{n:05d}.parquet": parquet(rows(f"shard {n}")) for n in (2, 0, 1, 6542)},
}


@pytest.fixture
def climbmix_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Four of its shards, at the pinned revision."""
    with FakeHub({f"{climbmix.CLIMBMIX.repo}@{climbmix.CLIMBMIX.revision}": CLIMBMIX_FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_climbmix_is_its_first_shards_and_always_the_validation_shard(climbmix_hub: FakeHub, tmp_path: Path) -> None:
    plan = climbmix.plan(Source(first=2))
    assert names(plan) == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert plan.source == "karpathy/climbmix-400b-shuffle, default, the first 2 files"
    assert plan.revision == climbmix.CLIMBMIX.revision
    assert (plan.n_tokens, plan.val_tokens) == (300_000_000_000, 0)
    found, skipped = read_all(climbmix, plan, tmp_path / "work")
    expected = [Document(str(text), split="train") for n in (0, 1) for text in rows(f"shard {n}")]
    assert found == expected + [Document(str(text), split="val") for text in rows("shard 6542")]
    assert not skipped


def test_climbmix_takes_as_many_shards_as_nanochat_unless_told_otherwise(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"shard_{n:05d}.parquet": b"never read" for n in [*range(200), 6542]}
    with FakeHub({f"{climbmix.CLIMBMIX.repo}@{climbmix.CLIMBMIX.revision}": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        plan = climbmix.plan(Source())
        assert names(plan) == [f"shard_{n:05d}.parquet" for n in [*range(170), 6542]]
        assert len(names(climbmix.plan(Source(first=6542)))) == 201


def test_climbmix_without_its_validation_shard_is_refused(climbmix_hub: FakeHub, tmp_path: Path) -> None:
    copy = write_copy(tmp_path, {"shard_00000.parquet": CLIMBMIX_FILES["shard_00000.parquet"]})
    with pytest.raises(DataError, match=r"--input .* lacks shard_06542.parquet, the validation split"):
        climbmix.plan(Source(copy))


def test_a_local_copy_of_climbmix_gives_the_shards_of_the_download(climbmix_hub: FakeHub, tmp_path: Path) -> None:
    copy = write_copy(tmp_path / "copy", CLIMBMIX_FILES)
    options = {"tokenizer": "bytes", "shard_tokens": 700, "first": 2}
    first = prepare(PrepareOptions("climbmix", tmp_path / "downloaded", workers=1, **options))
    second = prepare(PrepareOptions("climbmix", tmp_path / "local", input=copy, workers=1, **options))
    assert first.fingerprint == second.fingerprint
    assert second.revision.startswith("a local copy: 3 files, names and sizes ")
    assert {name: split.documents for name, split in first.splits.items()} == {"train": 40, "val": 20}


# WikiText: a row is a line, an article goes on over rows and files.

ARTICLES = {
    "train": [
        " \n = One = \n \n Text of one . \n \n = = Section = = \n \n A table : \n = 1 henry and capacitance C = \n",
        " \n = Two = \n \n It begins in the first file \n and ends in the second . \n",
        " \n = Three = \n \n The end . \n",
    ],
    "validation": [" \n = Held out = \n \n Text . \n"],
    "test": [" \n = Left alone = \n \n Text . \n"],
}


def lines_as_rows(text: str) -> list[str | None]:
    """As the data set's publisher did it: a line with its end, and nothing for a blank one."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


def wikitext_files(config: str) -> dict[str, bytes]:
    train = lines_as_rows("".join(ARTICLES["train"]))
    cut = next(n for n, row in enumerate(train) if row and row.startswith(" and ends"))
    return {
        f"{config}/train-00000-of-00002.parquet": parquet(train[:cut]),
        f"{config}/train-00001-of-00002.parquet": parquet(train[cut:]),
        f"{config}/validation-00000-of-00001.parquet": parquet(lines_as_rows(ARTICLES["validation"][0])),
        f"{config}/test-00000-of-00001.parquet": parquet(lines_as_rows(ARTICLES["test"][0])),
    }


@pytest.fixture
def wiki_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = wikitext_files("wikitext-103-raw-v1") | wikitext_files("wikitext-2-v1")
    with FakeHub({f"{wikitext.WIKITEXT.repo}@{wikitext.WIKITEXT.revision}": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize("config", ["", "wikitext-2-v1"])
def test_wikitext_rows_become_articles_in_their_own_splits(wiki_hub: FakeHub, tmp_path: Path, config: str) -> None:
    plan = wikitext.plan(Source(config=config))
    assert {name.split("/")[0] for name in names(plan)} == {config or "wikitext-103-raw-v1"}
    found, _ = read_all(wikitext, plan, tmp_path / "work")
    assert found == [Document(text, split="train") for text in ARTICLES["train"]] + [
        Document(text, split="val") for text in ARTICLES["validation"]
    ]


def test_wikitext_takes_no_first_files_for_the_first_is_the_test_split(wiki_hub: FakeHub) -> None:
    with pytest.raises(UsageError, match="wikitext takes no --first"):
        wikitext.plan(Source(first=1))


def test_wikitext_is_prepared_with_its_own_split(wiki_hub: FakeHub, tmp_path: Path) -> None:
    manifest = prepare(PrepareOptions("wikitext", tmp_path / "out", tokenizer="bytes", workers=1))
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 3, "val": 1}
    assert manifest.splits["train"].text_bytes == len("".join(ARTICLES["train"]).encode())


@pytest.mark.skipif(not WIKI_TEST.exists(), reason="WikiText's test file is not here")
def test_the_real_file_has_its_sixty_articles_and_comes_back_whole(tmp_path: Path) -> None:
    text = WIKI_TEST.read_text(encoding="utf-8")
    folder = tmp_path / "copy" / "wikitext-2-raw-v1"
    write_copy(folder, {"train-00000-of-00001.parquet": parquet([*text_rows(text)])})
    plan = wikitext.plan(Source(folder, config="wikitext-2-raw-v1"))
    found, _ = read_all(wikitext, plan, tmp_path / "work")
    assert len(found) == 60  # the paper's count, arXiv:1609.07843, table 1
    assert "".join(document.text for document in found) == text


def text_rows(text: str) -> list[str | None]:
    return [line if line.strip() else "" for line in io.StringIO(text)]


# Any data set.


def test_hub_takes_any_data_set_by_its_id(online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"body": f"line {n}"}) + "\n" for n in range(5)).encode()
    files = {"data/train-0.jsonl.gz": gzip.compress(lines), "data/test.jsonl": b'{"body": "test"}\n'}
    with FakeHub({"me/texts": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        plan = hub.plan(Source(repo="me/texts", field="body"))
        found, _ = read_all(hub, plan, tmp_path / "work")
        assert [document.text for document in found] == [f"line {n}" for n in range(5)]
        assert plan.revision == server.commits["me/texts"]
        assert plan.source == "me/texts, train"
        test = hub.plan(Source(repo="me/texts", field="body", split="test"))
        assert read_all(hub, test, tmp_path / "work")[0] == [Document("test")]


def test_hub_reads_dclm_whose_files_are_records_in_zstd_two_folders_down(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of mlfoundations/dclm-baseline-1.0, as docs/data.md has the command."""
    repo, commit = "mlfoundations/dclm-baseline-1.0", "a3b142c183aebe5af344955ae20836eb34dcf69b"
    files = {"README.md": b"---\nlicense: cc-by-4.0\n---\n"}
    for n in (1, 0):
        lines = "".join(json.dumps({"url": "x", "text": f"file {n}, line {i}"}) + "\n" for i in range(3))
        name = f"global-shard_01_of_10/local-shard_0_of_10/shard_{n:08d}_processed.jsonl.zst"
        files[name] = pa.compress(lines.encode(), codec="zstd", asbytes=True)
    with FakeHub({f"{repo}@{commit}": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        plan = hub.plan(Source(repo=repo, revision=commit, first=1))
        found, skipped = read_all(hub, plan, tmp_path / "work")
    assert [document.text for document in found] == [f"file 0, line {i}" for i in range(3)]
    assert (plan.source, plan.revision) == (f"{repo}, train, the first 1 files", commit)
    assert not skipped


def test_hub_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hub needs --repo OWNER/NAME"):
        hub.plan(Source())
    with pytest.raises(UsageError, match="choose text_files"):
        hub.plan(Source(tmp_path, repo="me/texts"))
