"""CORE beside lm-evaluation-harness: its HFLM, on transformers' GPT-2 with our weights, chooses the same answers."""

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.base import shelves
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.scoring.assets import find
from regpt2.evals.scoring.core.prompts import Item, prompts, read_items
from regpt2.evals.scoring.core.tasks import TASKS, Kind
from regpt2.evals.scoring.endings import Scored
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
for package in ("lm_eval", "accelerate", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

judging = importlib.import_module("regpt2.evals.scoring.core.judge")
DATA = Path(__file__).parents[2].parent / "shared" / "data"
if not (DATA / "core").is_dir():
    pytest.skip("there is no ../shared/data/core with the tasks", allow_module_level=True)

NAMES = (
    "hellaswag_zeroshot", "arc_easy", "copa", "piqa", "openbook_qa", "bigbench_language_identification",
    "winograd", "winogrande",
    "lambada_openai", "jeopardy", "bigbench_qa_wikidata", "bigbench_operators",
)  # fmt: skip
N = 8  # examples of each
STEPS = 100
BLOCK_SIZE = 160  # so that most prompts with ten shots are cut on the left
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
TOKENIZER = load_tokenizer("gpt2")


@dataclass(frozen=True)
class Choice:
    """What was found for one sequence of an example."""

    nats: float
    n_tokens: int
    greedy: bool


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    files = {"core": DATA / "core", "hellaswag": DATA / "eval"}
    return {name: read_items(TASKS[name], find(TASKS[name].asset, "core", files), is_main=False) for name in NAMES}


@pytest.fixture(scope="module")
def model(items: dict[str, list[Item]]) -> GPT:
    """2 layers of 64, trained on some of the language modeling examples, so that it gets some right and others not."""
    shown = [items[name][i] for name in NAMES if TASKS[name].kind == "language_modeling" for i in range(0, N, 3)]
    texts = [TOKENIZER.encode(one.wholes[one.gold] + "\n\n") for one in shown]
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=BLOCK_SIZE), seed=3)
    with torch.no_grad():
        gpt.wte.weight *= 8  # it learns in a tenth of the steps
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(5)
    for step in range(STEPS):
        ids = [TOKENIZER.eot]
        while len(ids) <= BLOCK_SIZE:  # several texts a row, as in a prompt with shots
            ids += rng.choice(texts)
        row = torch.tensor([ids[: BLOCK_SIZE + 1]])
        loss = gpt(row[:, :-1], row[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
        optimizer.step()
    return gpt.eval()


@pytest.fixture(scope="module")
def harness(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's own model class, on our export, with transformers' tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    vocabulary = Vocabulary(TOKENIZER.name, TOKENIZER.fingerprint, TOKENIZER.eot, find_vocab().read_bytes())
    shelves.load("model.weights", "huggingface").write(model, folder, vocabulary, "fp32")
    found = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(found, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2)


def by_harness(harness: Any, kind: Kind, texts: Sequence[str]) -> list[Choice]:
    """Each sequence in whole, cut on the left; what counts is found by its tokens, one by one."""
    rows = [[TOKENIZER.eot, *harness.tok_encode(text)] for text in texts]
    if kind == "language_modeling":
        starts, rows = [len(rows[0])], rows[1:]
        assert rows[0][: starts[0]] == [TOKENIZER.eot, *harness.tok_encode(texts[0])]  # no token spans the border
    elif kind == "schema":
        n = 0
        while len({row[-1 - n] for row in rows}) == 1:
            n += 1
        starts = [len(row) - n for row in rows]
    else:
        n = 0
        while len({row[n] for row in rows}) == 1:
            n += 1
        starts = [n] * len(rows)
    requests = [
        (("", str(i)), row[-BLOCK_SIZE:][: start - len(row)], row[start:])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]
    sums = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    return [
        Choice(-float(log_p), len(answer), bool(greedy))
        for (log_p, greedy), (_, _, answer) in zip(sums, requests, strict=True)
    ]


def choice_of(found: Sequence[Choice]) -> int:
    means = [one.nats / one.n_tokens for one in found]
    return means.index(min(means))


@pytest.mark.parametrize("name", NAMES)
def test_core_chooses_what_the_harness_s_own_model_finds_likeliest(
    name: str, model: GPT, harness: Any, items: dict[str, list[Item]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, found = TASKS[name], []
    judged = judging._is_right

    def keeping(kind: Kind, item: Item, scored: Scored, places: Sequence[tuple[int, int]]) -> bool:
        here = ((float(scored.nats[p]), int(scored.n_tokens[p]), bool(scored.greedy[p])) for p in places)
        found.append([Choice(*one) for one in here])
        return bool(judged(kind, item, scored, places))

    monkeypatch.setattr(judging, "_is_right", keeping)
    context = EvalContext(model=model, world=ALONE, data=None, seq_len=BLOCK_SIZE, batch=8, val_tokens=0)
    right = judging.judge(context, task, items[name], N, BLOCK_SIZE, TOKENIZER)
    for i, ours in enumerate(found):
        theirs = by_harness(harness, task.kind, prompts(task, items[name], i))
        assert [one.n_tokens for one in ours] == [one.n_tokens for one in theirs]
        # fp32 sums of up to 60 tokens, in another order
        assert [one.nats for one in ours] == pytest.approx([one.nats for one in theirs], abs=1e-3)
        if task.kind == "language_modeling":
            assert right[i] == ours[0].greedy == theirs[0].greedy
        else:
            assert choice_of(ours) == choice_of(theirs)
            assert right[i] == (choice_of(theirs) == items[name][i].gold)


def test_the_trained_model_is_right_sometimes_and_prompts_are_cut(model: GPT, items: dict[str, list[Item]]) -> None:
    """Else equal choices would say little."""
    context = EvalContext(model=model, world=ALONE, data=None, seq_len=BLOCK_SIZE, batch=8, val_tokens=0)
    right = {
        kind: [
            one
            for name in NAMES
            if TASKS[name].kind == kind
            for one in judging.judge(context, TASKS[name], items[name], N, BLOCK_SIZE, TOKENIZER)
        ]
        for kind in ("multiple_choice", "schema", "language_modeling")
    }
    shares = {kind: sum(one) / len(one) for kind, one in right.items()}
    assert all(0.05 < share < 0.95 for share in shares.values()), shares
    n_tokens = [len(TOKENIZER.encode(prompts(TASKS[name], items[name], i)[-1])) for name in NAMES for i in range(N)]
    assert sum(n >= BLOCK_SIZE for n in n_tokens) > 20
