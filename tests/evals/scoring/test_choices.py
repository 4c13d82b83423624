"""Multiple choice: the wording of each set is the harness's, in each layout; the right choices are counted."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.base import shelves
from regpt2.base.errors import DataError
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.scoring import choices
from regpt2.evals.scoring.endings import Question, Scored
from regpt2.model.gpt import GPT, GPTConfig

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
BYTES = load_tokenizer("bytes")
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=256, vocab_size=257), seed=3)
SHARED = Path(__file__).parents[4] / "shared/data/eval"

AI2 = {"question": {"stem": "Why?", "choices": [{"text": "sun", "label": "A"}, {"text": "moon ", "label": "B"}]}}
TWO = {"choices": {"text": ["sun", "moon "], "label": ["1", "2"]}, "answerKey": "2"}
WHY = ("Question: Why?\nAnswer:", [" sun", " moon "], 1)
ETHANOL = "Ethanol -- It burns.\nQuestion: does it burn?\nAnswer:"
CASES: list[tuple[str, dict[str, Any], tuple[str, list[str], int]]] = [
    ("arc_easy", {**AI2, "answerKey": "B"}, WHY),
    ("arc_challenge", {"question": "Why?", **TWO}, WHY),
    ("arc_easy", {"query": "Question: Why?", "choices": ["sun", "moon"], "gold": 1}, (WHY[0], [" sun", " moon"], 1)),
    ("openbookqa", {**AI2, "answerKey": " B"}, ("Why?", [" sun", " moon "], 1)),
    ("openbookqa", {"question_stem": "Why?", **TWO}, ("Why?", [" sun", " moon "], 1)),
    ("piqa", {"goal": "Fly", "sol1": "a", "sol2": "b", "label": 1}, ("Question: Fly\nAnswer:", [" a", " b"], 1)),
    (
        "piqa",
        {"query": "Question: Fly\n", "choices": ["a", "b"], "gold": 0},
        ("Question: Fly\nAnswer:", [" a", " b"], 0),
    ),
    (
        "boolq",
        {"question": "does it burn", "title": "Ethanol", "passage": "It burns.", "answer": True},
        (ETHANOL, [" no", " yes"], 1),
    ),
    (
        "boolq",
        {"question": "does it burn", "passage": "Ethanol -- It burns.", "label": 0},
        (ETHANOL, [" no", " yes"], 0),
    ),
    (
        "copa",
        {"premise": "It rained.", "question": "effect", "choice1": "He left.", "choice2": "I sat.", "label": 0},
        ("It rained therefore", ["  he left.", "  i sat."], 0),
    ),
    (
        "copa",
        {"query": "It rained, therefore", "choices": ["he left.", "i sat."], "gold": 1},
        ("It rained, therefore", [" he left.", " i sat."], 1),
    ),
]


def context(name: str, path: Path, **changes: object) -> EvalContext:
    values = {"model": MODEL, "world": ALONE, "data": None, "seq_len": 256, "batch": 4, "val_tokens": 1}
    values |= {"tokenizer": BYTES, "files": {name: path}}
    return EvalContext(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """What is scored, in place of the scoring: the last ending is the likeliest by sum, the longest by length."""
    questions: list[Question] = []

    def score(_: EvalContext, __: str, these: list[Question]) -> Scored:
        questions.extend(these)
        nats = torch.tensor([[3.0, 2.0]] * len(these), dtype=torch.float64)
        return Scored(nats, torch.ones(len(these), 2, dtype=torch.int64), torch.zeros(len(these), 2, dtype=torch.bool))

    monkeypatch.setattr(choices, "score_endings", score)
    return questions


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_the_wording_is_the_harness_s(
    name: str, record: dict[str, Any], expected: tuple[str, list[str], int], tmp_path: Path, asked: list[Question]
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(record) + "\n")
    found = shelves.load("evals", name).evaluate(context(name, path))
    prompt, endings, gold = expected
    assert BYTES.decode(asked[0].context) == prompt
    assert [BYTES.decode(ending) for ending in asked[0].endings] == endings
    assert found["acc"] == (1.0 if gold == 1 else 0.0)
    assert found["count"] == 1
    assert ("acc_norm" in found) == (name not in ("boolq", "copa"))


def test_archives_are_read_as_their_publishers_serve_them(tmp_path: Path, asked: list[Question]) -> None:
    with zipfile.ZipFile(tmp_path / "physicaliqa-train-dev.zip", "w") as archive:
        rows = [json.dumps({"goal": f"g{i}", "sol1": "a", "sol2": "b"}) for i in range(3)]
        archive.writestr("physicaliqa-train-dev/dev.jsonl", "\n".join(rows) + "\n")
        archive.writestr("physicaliqa-train-dev/dev-labels.lst", "0\n1\n1\n")
    found = shelves.load("evals", "piqa").evaluate(context("piqa", tmp_path))
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["count"] == len(asked) == 3


def test_labels_beside_the_file_or_a_message(tmp_path: Path, asked: list[Question]) -> None:
    (tmp_path / "dev.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n')
    with pytest.raises(DataError, match=r"line 1: no label, here or in a file dev-labels\.lst"):
        shelves.load("evals", "piqa").evaluate(context("piqa", tmp_path))
    (tmp_path / "dev-labels.lst").write_text("1\n")
    assert shelves.load("evals", "piqa").evaluate(context("piqa", tmp_path))["acc"] == 1.0


@torch.no_grad()
def test_winogrande_scores_the_rest_after_each_name(tmp_path: Path) -> None:
    sentences = [
        ("Ann gave Bea a book because _ had two.", "Ann", "Bea"),
        ("The _ is too big for the box.", "ball", "cup"),
    ] * 3
    rows = [
        {"sentence": sentence, "option1": a, "option2": b, "answer": str(i % 2 + 1)}
        for i, (sentence, a, b) in enumerate(sentences)
    ]
    right = 0
    for i, (sentence, *names) in enumerate(sentences):
        rest = sentence.partition("_")[2]
        losses = []
        for name in names:
            ids = torch.tensor([BYTES.encode(sentence.partition("_")[0] + name + rest)])
            log_p = MODEL(ids[:, :-1])[0].double().log_softmax(dim=1)[-len(rest) :]
            losses.append(-float(log_p[range(len(rest)), ids[0, -len(rest) :]].sum()))
        right += losses.index(min(losses)) == i % 2
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shelves.load("evals", "winogrande").evaluate(context("winogrande", path))["acc"] == right / 6


def test_the_likeliest_by_sum_and_by_length() -> None:
    nats = torch.tensor([[3.0, 2.0, torch.inf], [4.0, 4.0, 5.0]], dtype=torch.float64)
    assert choices.predictions(nats) == [1, 0], "the first of equals"
    assert choices.predictions(nats, [[6, 2], [4, 4, 10]]) == [0, 2]
    assert choices.accuracy("acc", [1, 0, 2, 2], [1, 1, 2, 2]) == {"acc": 0.75, "acc_stderr": pytest.approx(0.25)}


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "boolq", "copa"])
def test_a_bad_line_is_named_with_what_is_expected(name: str, tmp_path: Path) -> None:
    for line in ("{", "[]", "3", '{"other": 1}', '{"query": "a", "choices": ["b"], "gold": 0}'):
        path = tmp_path / "bad.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=r"bad\.jsonl, line 1: .*; expected .*, got"):
            shelves.load("evals", name).evaluate(context(name, path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the evaluation sets beside the repository")
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "copa"])
def test_real_sets_are_read(name: str) -> None:
    found = shelves.load("evals", name).evaluate(context(name, SHARED, limit=40))
    assert found["count"] == 40
    assert 0 < found["acc"] < 1
