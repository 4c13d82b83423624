"""JSON of strangers: lines and arrays, with the text in a field of any name and depth, whole and damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from regpt2.base.errors import DataError
from regpt2.data.datasets import text_files
from regpt2.data.sources import json_records, text_encoding
from regpt2.data.sources.plan import Skipped, Source

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.fixed_dictionaries({}, optional={"text": VALUES, "meta": VALUES}) | VALUES, max_size=6)


def read(path: Path, field: str = "text") -> tuple[list[str], Skipped]:
    plan, skipped = text_files.plan(Source(path, field)), Skipped()
    return [document.text for part in plan.parts for document in text_files.documents(part, skipped)], skipped


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@given(records=RECORDS, indent=st.sampled_from([None, 0, 2]), block_bytes=st.integers(1, 70), escaped=st.booleans())
@example(records=[12345, -0.5e-7, False, {"text": "after numbers"}], indent=None, block_bytes=1, escaped=True)
def test_an_array_gives_the_documents_of_its_elements(
    folder: Path, records: list[Any], indent: int | None, block_bytes: int, escaped: bool
) -> None:
    records = [{"text": "the first"}, *records]
    path = folder / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=escaped), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoding, "BLOCK_BYTES", block_bytes)
        found, skipped = read(path)
    texts = [record["text"] for record in records if isinstance(record, dict) and isinstance(record.get("text"), str)]
    assert found == texts
    assert sum(skipped.values()) == len(records) - len(texts)


def test_a_long_array_is_read_element_by_element_and_every_part_of_it_once(tmp_path: Path) -> None:
    texts = [f"{n} " + "é—x " * (n % 50) for n in range(40_000)] + ["long " * 500_000]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([{"id": n, "text": text} for n, text in enumerate(texts)], indent=1))
    assert path.stat().st_size > 10_000_000, "more than a part"
    assert read(path) == (texts, {})


def test_an_array_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    whole = json.dumps([{"text": "one"}, {"text": 'tw"o}]'}, {"n": 12}], indent=1)
    path = tmp_path / "a.json"
    for length in range(len("[\n {"), len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(DataError, match=r"a\.json: its JSON array cannot be read at character .*jq -c '\.\[\]'"):
            read(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"text": "a"}] and more', "has ended, but 'a' follows"),
        ('[{"text": "a"} {"text": "b"}]', "expected a comma or the end of the array, got '{'"),
        ('[{"text": "a"}, {"text": b"}]', "Expecting value"),
        ('[{"text": "a"}, ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_an_array_that_is_none_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json: its JSON array .*{told}"):
        read(tmp_path / "a.json")


def test_an_element_too_long_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "ELEMENT_CHARACTERS", 100_000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b" * 500_000}]))
    with pytest.raises(DataError, match=r"an element of [0-9,]+ characters or more: Unterminated string"):
        read(tmp_path / "a.json")


def test_lines_that_are_lists_stay_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [1, 2], {"text": "one"}, [["x"]], {"text": "two"})
    assert read(path) == (["one", "two"], {"lines without a field 'text'": 2})


def test_a_field_within_a_field_is_named_with_a_dot_and_a_name_with_a_dot_goes_first(tmp_path: Path) -> None:
    records = [{"meta": {"text": "deep"}}, {"meta.text": "flat", "meta": {"text": "deep"}}, {"meta": "text"}, {"a": 1}]
    path = write(tmp_path / "a.jsonl", *records)
    assert read(path, "meta.text") == (["deep", "flat"], {"lines without a field 'meta.text'": 2})


def test_where_the_field_is_missing_the_fields_of_text_are_listed(tmp_path: Path) -> None:
    for n in range(2):
        record = {"meta": {"text": "x", "n": 1, "more": {"title": "y"}}, "id": "z", "list": ["a"]}
        write(tmp_path / f"{n}.jsonl", {"text": "fine"}, record, {"body": "x"}, {"text": {"en": "x"}})
    found, skipped = read(tmp_path)
    assert found == ["fine"] * 2
    assert skipped.first == {
        "lines without a field 'text'": "0.jsonl, where --field can be meta.text, meta.more.title, id",
        "lines whose field 'text' is not text": "0.jsonl, where --field can be text.en",
    }


def test_names_that_would_flood_or_drive_a_terminal_are_cut_and_shown_as_escapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {f"{n}\x1b]0;\ud800" + "x" * 10_000: "text" for n in range(1000)})
    _, skipped = read(path)
    [place] = skipped.first.values()
    assert len(place) <= 300
    assert place.isprintable()
    assert place.encode()


def test_an_object_over_many_lines_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "n": 1}, indent=1))
    found, skipped = read(tmp_path)
    assert (found, skipped) == ([], {"lines that are not JSON": 4})
    assert skipped.first == {"lines that are not JSON": "a.json, an object over several lines: `jq -c .` makes it one"}
