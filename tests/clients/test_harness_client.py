"""EleutherAI's lm-evaluation-harness, offline: it finds the same through our adapter, its own model, and our evals.

Its own task files are used, of which only the place of the data is changed; its own `HFLM` runs our exported folder.
"""

import importlib.util
import json
import lzma
import math
import random
import string
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import found_by_harness, nats, write_tasks

from regpt2.base import shelves
from regpt2.base.errors import Problem, UsageError
from regpt2.base.ranks.world import World
from regpt2.commands.harness import main
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.measuring.harness import harness_model
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig

pytestmark = pytest.mark.clients
pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
pytest.importorskip("accelerate", reason="the harness's own model needs it")

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "eval"
N_MADE_UP, N_REAL = 60, 30
BLOCK_SIZE = 64  # short, so that many contexts have to be cut
PREDICTIONS = (("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "acc"))
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
TOKENIZER = load_tokenizer("gpt2")
ODD = [
    "[title]",
    "[step]",
    "[substeps]",
    *["é", "naïve", "日本", "🙂", "don't", "3.14", "--", "(sic)", "A.M."],
    '"So?"',
    "a  b",
    "c    d",
]


def made_up_words(rng: random.Random, n: int) -> list[str]:
    """Words of random letters, so of one to five tokens, and what the harness's preprocessing must get right."""
    letters = string.ascii_lowercase
    return [
        rng.choice(ODD) if rng.random() < 0.2 else "".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(n)
    ]


def hellaswag_like(rng: random.Random) -> dict[str, Any]:
    """Endings have at least one word that is no tag: the harness divides by the length of what is left."""
    before, after = (" ".join(made_up_words(rng, rng.randint(*n))) for n in ((1, 40), (0, 6)))
    endings = [
        " ".join(
            [rng.choice(["it", "he"]), *made_up_words(rng, rng.randint(0, 11)), rng.choice(["", ".", "[x].", " "])]
        )
        for _ in range(4)
    ]
    return row_of_hellaswag(" ".join(made_up_words(rng, 2)), before, after, endings, rng.randrange(4))


def row_of_hellaswag(activity: str, before: str, after: str, endings: list[str], label: int) -> dict[str, Any]:
    """As rowanz/hellaswag lays it out."""
    return {
        "ind": 0,
        "activity_label": activity,
        "ctx_a": before,
        "ctx_b": after,
        "ctx": f"{before} {after.capitalize()}".strip(),
        "split": "val",
        "endings": endings,
        "label": label,
    }


def real_hellaswag() -> Iterator[dict[str, Any]]:
    """Real examples; the file has lost where the context is divided, which was before its last sentence."""
    path = REAL / "hellaswag_val.processed.jsonl.xz"
    if path.exists():
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for _, line in zip(range(N_REAL), file, strict=False):
                row = json.loads(line)
                before, _, after = row["ctx"].rpartition(". ")
                yield row_of_hellaswag(row["activity_label"], before + ".", after, row["endings"], row["label"])


def lambada_like(rng: random.Random) -> dict[str, Any]:
    """Every second one ends with a word said twice, which this model foretells: its head is tied to a large `wte`."""
    text = rng.choice([" ", "\n\n"]).join(made_up_words(rng, rng.randint(1, 50)))
    word = rng.choice(["house", "river", "night", "city"])  # one token each
    return {"text": f"{text} {word} {word}" if rng.random() < 0.5 else f"{text} {rng.choice(ODD[3:12])}"}


def real_lambada() -> list[dict[str, Any]]:
    path = REAL / "lambada_test.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()[:N_REAL]] if path.exists() else []


@dataclass(frozen=True)
class Setup:
    """A model in memory and exported, and the same examples for the harness's tasks and for our evaluations."""

    folder: Path
    context: EvalContext
    examples: dict[str, list[dict[str, Any]]]

    def found_by_harness(self, model: Any) -> dict[str, list[dict[str, Any]]]:
        """What the harness logs for each example of each task."""
        return found_by_harness(self.folder, list(self.examples), model)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder, rng = tmp_path_factory.mktemp("harness"), random.Random(4)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=BLOCK_SIZE), seed=3).eval()
    with torch.no_grad():
        model.wte.weight *= 10  # logits that differ: predictions that do not hang on the last bit
    (folder / "model").mkdir()
    vocabulary = Vocabulary(TOKENIZER.name, TOKENIZER.fingerprint, TOKENIZER.eot, find_vocab().read_bytes())
    shelves.load("model.weights", "huggingface").write(model, folder / "model", vocabulary, "fp32")
    examples = {
        "hellaswag": [hellaswag_like(rng) for _ in range(N_MADE_UP)] + list(real_hellaswag()),
        "lambada_openai": [lambada_like(rng) for _ in range(N_MADE_UP)] + real_lambada(),
    }
    write_tasks(folder, examples)
    write_spoken_task(folder)
    context = EvalContext(
        model=model, world=ALONE, data=None, seq_len=BLOCK_SIZE, batch=8, val_tokens=0, tokenizer=TOKENIZER
    )
    return Setup(folder, context, examples)


def write_spoken_task(folder: Path) -> None:
    """The last word of LAMBADA, but generated: a task of our own."""
    spoken = {
        "include": "lambada_openai.yaml",
        "task": "spoken_here",
        "output_type": "generate_until",
        "generation_kwargs": {"max_gen_toks": 1},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks" / "spoken.yaml").write_text(json.dumps(spoken))


@pytest.fixture(scope="module")
def ours(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    return setup.found_by_harness(harness_model(setup.context))


@pytest.fixture(scope="module")
def their_model(setup: Setup) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(setup.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)


def test_harness_finds_the_same_as_through_its_own_model(
    setup: Setup, ours: dict[str, list[dict[str, Any]]], their_model: Any
) -> None:
    theirs = setup.found_by_harness(their_model)
    for name, examples in setup.examples.items():
        assert len(ours[name]) == len(theirs[name]) == len(examples)
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a["arguments"] == b["arguments"]
            assert nats(a) == pytest.approx(nats(b), abs=1e-3)  # fp32 sums of up to 60 tokens, in another order
            assert [answer[1] for answer in a["filtered_resps"]] == [answer[1] for answer in b["filtered_resps"]]
            assert {m: a[m] for m in ("acc", "acc_norm") if m in a} == {m: b[m] for m in ("acc", "acc_norm") if m in b}
    for name, metric in PREDICTIONS:
        assert 0.1 < sum(example[metric] for example in ours[name]) / len(ours[name]) < 0.9  # there is something to see
    assert any(len(TOKENIZER.encode("".join(one["arguments"][0]))) > BLOCK_SIZE + 1 for one in ours["hellaswag"])


def test_hellaswag_equals_the_harness_to_the_last_example(
    setup: Setup, ours: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """One example a file, so that a figure is the outcome of one example."""
    for row, example in zip(setup.examples["hellaswag"], ours["hellaswag"], strict=True):
        found = figures_of("hellaswag", setup, [row], tmp_path)
        assert (found["harness_acc"], found["harness_acc_norm"]) == (example["acc"], example["acc_norm"]), row


def test_lambada_equals_the_harness_to_the_last_example(
    setup: Setup, ours: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for row, example in zip(setup.examples["lambada_openai"], ours["lambada_openai"], strict=True):
        found = figures_of("lambada", setup, [row], tmp_path)
        assert found["accuracy"] == example["acc"], row
        assert math.log(found["perplexity"]) == pytest.approx(nats(example)[0], abs=1e-4), row


def test_whole_sets_have_the_harness_s_means(
    setup: Setup, ours: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for name, task, metrics in (
        ("hellaswag", "hellaswag", {"harness_acc": "acc", "harness_acc_norm": "acc_norm"}),
        ("lambada", "lambada_openai", {"accuracy": "acc"}),
    ):
        found = figures_of(name, setup, setup.examples[task], tmp_path)
        for metric, theirs in metrics.items():
            mean = sum(example[theirs] for example in ours[task]) / len(ours[task])
            assert found[metric] == pytest.approx(mean, abs=1e-12)


def figures_of(name: str, setup: Setup, rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures: dict[str, Any] = shelves.load("evals", name).evaluate(replace(setup.context, files={name: path}))
    return figures


def test_end_of_text_in_a_text_is_one_token_as_for_the_harness_s_own_model(setup: Setup, their_model: Any) -> None:
    from lm_eval.api.instance import Instance

    our_model, end = harness_model(setup.context), "<|endoftext|>"
    texts = [end, f"One{end}two", f"{end}{end} three\n", f"a {end} b{end}", "<|endof", f"é {end}\n\n日本"]
    for text in texts:
        assert our_model.tok_encode(text) == their_model.tok_encode(text)
        assert our_model.tok_encode(text).count(TOKENIZER.eot) == text.count(end)
    pairs = [Instance("loglikelihood", {}, (text, f" and{end} more"), 0) for text in texts]
    ours, theirs = our_model.loglikelihood(pairs), their_model.loglikelihood(pairs)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)


TEXTS = ["a", "One two three.", " ".join(made_up_words(random.Random(5), 100)), "", "日本 🙂\n\n" * 16]


def test_rolling_and_generation_equal_the_harness_s_own_model(setup: Setup, their_model: Any) -> None:
    """Texts of less than a window, of many, and of exactly one; greedy, up to a string or so many tokens."""
    from lm_eval.api.instance import Instance

    exact = TOKENIZER.decode(TOKENIZER.encode(TEXTS[2])[:BLOCK_SIZE])
    assert len(TOKENIZER.encode(exact)) == BLOCK_SIZE
    our_model = harness_model(setup.context)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in [*TEXTS, exact]]
    assert our_model.loglikelihood_rolling(rolling) == pytest.approx(
        their_model.loglikelihood_rolling(rolling), abs=1e-3
    )
    prompts = [text for text in TEXTS if text]
    asked = [{"until": ends, "max_gen_toks": 12} for ends in (["\n\n"], [" a", "e"], [])]
    until = [Instance("generate_until", {}, (prompt, how), 0) for prompt in prompts for how in asked]
    texts = our_model.generate_until(until)
    assert texts == their_model.generate_until(until)
    assert len({len(TOKENIZER.encode(text)) for text in texts}) > 1  # some ended early
    nothing = Instance("generate_until", {}, ("", asked[2]), 0)  # <|endoftext|> stands before it, and is foretold
    assert our_model.generate_until([nothing]) == [""]


def test_what_is_missing_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    def run(*arguments: str) -> int:
        return main([str(setup.folder / "model"), "--include-path", str(setup.folder / "tasks"), *arguments])

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # its own 14,000 take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    with pytest.raises(UsageError, match="the harness has no 'helaswag'; did you mean 'hellaswag_here'"):
        run("--tasks", "lambada_openai_here,helaswag")
    (setup.folder / "tasks" / "nothing.yaml").write_text(
        json.dumps(
            {"include": "lambada_openai.yaml", "task": "nothing", "dataset_kwargs": {"data_files": "gone.jsonl"}}
        )
    )
    with pytest.raises(Problem, match=r"the harness could not run nothing: FileNotFoundError: .*gone.jsonl"):
        run("--tasks", "nothing")
    with pytest.raises(UsageError, match="--batch 0 must be at least 1"):
        run("--tasks", "nothing", "--batch", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Problem, match=r"pip install 'regpt2\[harness\]'"):
        run("--tasks", "nothing")


def test_verb_on_two_ranks_finds_the_same(setup: Setup, ours: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The real command, as torchrun starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--tasks", "hellaswag_here,lambada_openai_here,spoken_here", "--include-path", setup.folder / "tasks"]
    arguments += ["--device", "cpu", "--limit", "40", "--out", tmp_path / "found.json"]
    command = [*launcher, "-m", "regpt2", "--", "harness", setup.folder / "model", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    for task, metric in PREDICTIONS:
        expected = sum(example[metric] for example in ours[task][:40]) / 40
        assert found[f"{task}_here"][f"{metric},none"] == pytest.approx(expected, abs=1e-12)
    one_token = [one["acc"] * (len(TOKENIZER.encode(one["target"])) == 1) for one in ours["lambada_openai"][:40]]
    assert found["spoken_here"]["exact_match,none"] == pytest.approx(sum(one_token) / 40, abs=1e-12)
    assert done.stdout.count("hellaswag_here") == 1  # one rank speaks
