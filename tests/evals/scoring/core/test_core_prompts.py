"""Order, shots and wording of CORE's tasks, against values written down here."""

import hashlib
import json
import lzma
from pathlib import Path

import pytest

from regpt2.base.errors import DataError
from regpt2.evals.scoring.core.prompts import item_of, order, prompts, read_items, shots_of
from regpt2.evals.scoring.core.tasks import TASKS
from regpt2.references.core import core_scores

SHARED = Path(__file__).parents[5] / "shared" / "data" / "core"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/core")
SCENE = {"ctx_a": "A man sits.", "ctx_b": "he", "label": 1, "endings": ["runs [title] home [step].", "sleeps  now."]}


def test_order_and_shots_are_these() -> None:
    """Python's generator from two seeds, on every machine; other values are another evaluation."""
    assert order(12) == [6, 0, 1, 4, 10, 7, 3, 11, 2, 5, 8, 9]
    assert shots_of(0, 100, 10) == [57, 15, 1, 12, 75, 5, 86, 89, 11, 13]
    assert shots_of(57, 100, 10) == [74, 49, 75, 19, 54, 21, 48, 96, 76, 59]
    assert shots_of(3, 4, 3) in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])
    for i in range(20):
        drawn = shots_of(i, 20, 10)
        assert i not in drawn
        assert len(set(drawn)) == 10
        assert set(drawn) <= set(range(20))


@needs_data
@pytest.mark.parametrize(
    ("name", "beginning", "end", "digest"),
    [
        (
            "piqa",
            "Question: Remove paper cover from a book.\n\nAnswer: Put palm ",
            "ur grass short,\n\nAnswer: mow your lawn at least once a week.",
            "bb071aaa6b89886a",
        ),
        (
            "winogrande",
            "It was easy for Matthew but not Logan to practice yoga becau",
            "ce yoga because Logan wanted to improve their mind and body.",
            "7f6983e66ad47081",
        ),
        (
            "jeopardy",
            "AMERICAN HISTORY: Gen. Charles Lee was relieved of command a",
            "ek for number, its the science of numbers\nAnswer: arithmetic",
            "83feeaa18ec93968",
        ),
        (
            "lambada_openai",
            "Filled to bursting with ravenous wolves, eyes shining eerily",
            "s of either proving or disproving the presence of werewolves",
            "a2d29ff0845c02b2",
        ),
    ],
)
def test_the_prompt_of_an_example_of_each_kind(name: str, beginning: str, end: str, digest: str) -> None:
    items = read_items(TASKS[name], next(SHARED.glob(f"{Path(TASKS[name].asset.name).stem}.jsonl.xz")))
    texts = prompts(TASKS[name], items, 5)
    assert texts[0].startswith(beginning)
    assert texts[-1].endswith(end)
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == digest


def test_the_wording_of_each_kind() -> None:
    piqa = [item_of(TASKS["piqa"], {"query": f"Q{i}", "choices": ["a", "b"], "gold": i % 2}) for i in range(11)]
    texts = prompts(TASKS["piqa"], piqa, 0)
    shown = "".join(f"Q{j}\nAnswer: {'ab'[j % 2]}\n\n" for j in shots_of(0, 11, 10))
    assert texts == [f"{shown}Q0\nAnswer: a", f"{shown}Q0\nAnswer: b"]
    schema = item_of(TASKS["winograd"], {"context_options": ["x", "y"], "continuation": "z.", "gold": 1})
    assert prompts(TASKS["winograd"], [schema], 0) == ["x z.", "y z."]
    plain = item_of(TASKS["lambada_openai"], {"context": " a b\n", "continuation": "c"})
    assert prompts(TASKS["lambada_openai"], [plain], 0) == ["a b", "a b c"]
    scene = item_of(TASKS["hellaswag"], {"activity_label": "Chairs", **SCENE})
    assert scene.wholes == ("Chairs: A man sits. He runs. home .", "Chairs: A man sits. He sleeps now.")
    assert scene.gold == 1


def test_a_bad_line_and_too_few_examples_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "piqa.jsonl"
    for line in ('{"query": "a", "choices": ["b", "c"]}', '{"query": "a", "choices": ["b"], "gold": 1}', "[]", "{"):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=r"piqa\.jsonl, line 1: .*; expected query, choices, gold, got"):
            read_items(TASKS["piqa"], path)
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}\n' * 10)
    with pytest.raises(DataError, match=r"has 10 examples; piqa needs 11 for its shots"):
        read_items(TASKS["piqa"], path)
    capsys.readouterr()
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}\n' * 11)
    assert len(read_items(TASKS["piqa"], path, is_main=False)) == 11
    assert capsys.readouterr().err == "", "only rank 0 warns"


@needs_data
def test_the_table_of_tasks_is_the_published_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads((SHARED / "core.json").read_text())["tasks"]
    assert list(TASKS) == [one["task"] for one in listed] == list(core_scores().tasks)
    for one in listed:
        task = TASKS[one["task"]]
        assert (task.kind, task.shots, task.delimiter) == (one["kind"], one["shots"], one["continuation_delimiter"])
        assert task.scores.baseline == pytest.approx(one["random_baseline_percent"] / 100)
        if one["file"]:
            assert one["file"] in task.asset.other_names
            assert task.asset.sha256 == one["sha256_unpacked"]
            assert task.asset.is_pinned(lzma.decompress((SHARED / one["file"]).read_bytes()))
    assert len(TASKS) == 22
