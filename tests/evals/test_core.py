"""CORE against a scorer that knows only the protocol: one sequence at a time, whole logits, plain log-softmax."""

import json
import lzma
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conftest import Run
from rank_processes import spawn
from regpt2 import api
from regpt2.base import shelves
from regpt2.base.errors import ConfigError, DataError, UsageError
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import BytePairTokenizer, BytesTokenizer, Gpt2Tokenizer, Tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.scoring.core import judge
from regpt2.evals.scoring.core.prompts import read_items
from regpt2.evals.scoring.core.tasks import TASKS
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig, ModernGPT

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (SHARED / "core").is_dir(), reason="no ../shared/data/core")
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
CORE = shelves.load("evals", "core")
N_MERGES = 1000


def merges(n: int) -> bytes:
    """The first of GPT-2's merges: ids of a small vocabulary, so that whole logits cost little."""
    return b"".join((SHARED / "gpt2_bpe/vocab.bpe").read_bytes().splitlines(keepends=True)[: 1 + n])


def context(model: torch.nn.Module, tokenizer: Tokenizer, **changes: object) -> EvalContext:
    values = {"model": model, "world": ALONE, "data": None, "seq_len": 1024, "batch": 8, "val_tokens": 1}
    values |= {"tokenizer": tokenizer, "files": {"core": SHARED / "core", "hellaswag": SHARED / "eval"}}
    return EvalContext(**{**values, **changes})  # type: ignore[arg-type]


def listed() -> dict[str, dict[str, Any]]:
    """The published list of the tasks whose data is here."""
    tasks = json.loads((SHARED / "core/core.json").read_text())["tasks"]
    return {task["task"]: task for task in tasks if task["file"] or "hellaswag" in task["task"]}


class Slow:
    """The protocol, spelled out: data in its order, shots, wording, tokens, loss; nothing is shared or packed."""

    def __init__(self, task: dict[str, Any], tokenizer: Tokenizer, context_size: int) -> None:
        path = SHARED / "core" / task["file"] if task["file"] else SHARED / "eval/hellaswag_val.processed.jsonl.xz"
        text = lzma.decompress(path.read_bytes()).decode()
        self.data = [json.loads(line) for line in text.rstrip("\n").split("\n")]
        if not task["file"]:
            self.data = [{"query": x["query"], "choices": x["endings"], "gold": x["label"]} for x in self.data]
        random.Random(1337).shuffle(self.data)
        self.name, self.kind, self.shots = task["task"], task["kind"], task["shots"]
        self.delimiter, self.tokenizer, self.context_size = task["continuation_delimiter"], tokenizer, context_size

    def before(self, i: int) -> str:
        others = [j for j in range(len(self.data)) if j != i]
        text = ""
        for j in random.Random(1234 + i).sample(others, self.shots):
            one = self.data[j]
            if self.kind == "multiple_choice":
                text += one["query"] + self.delimiter + one["choices"][one["gold"]]
            elif self.kind == "schema":
                text += one["context_options"][one["gold"]] + self.delimiter + one["continuation"]
            else:
                text += one["context"].strip() + self.delimiter + one["continuation"]
            text += "\n\n"
        return text

    def rows(self, i: int) -> tuple[list[list[int]], list[int]]:
        """The sequences of example `i`, and the place in each of its first token that counts."""
        one, before = self.data[i], self.before(i)
        if self.kind == "multiple_choice":
            texts = [before + one["query"] + self.delimiter + choice for choice in one["choices"]]
        elif self.kind == "schema":
            texts = [before + option + self.delimiter + one["continuation"] for option in one["context_options"]]
        else:
            asked = before + one["context"].strip() + self.delimiter
            texts = [asked.rstrip(), asked + one["continuation"]]
        rows = [[self.tokenizer.start_id, *self.tokenizer.encode(text)] for text in texts]
        shortest = min(map(len, rows))
        if self.kind == "schema":
            n = 0
            while n < shortest and len({row[len(row) - 1 - n] for row in rows}) == 1:
                n += 1
            return rows, [len(row) - n for row in rows]
        n = 0
        while n < shortest and len({row[n] for row in rows}) == 1:
            n += 1
        return (rows[1:], [n]) if self.kind == "language_modeling" else (rows, [n] * len(rows))

    @torch.no_grad()
    def losses(self, model: LanguageModel, row: Sequence[int], first: int) -> tuple[list[float], bool]:
        """The loss of each token that counts, and whether all of them are the likeliest."""
        cut = max(0, len(row) - self.context_size)
        ids = torch.tensor([row[cut:]])
        p = model(ids)[0].double().log_softmax(dim=-1)
        places = range(max(first - cut, 1), ids.shape[1])
        return [-float(p[j - 1, ids[0, j]]) for j in places], all(int(p[j - 1].argmax()) == ids[0, j] for j in places)

    def means(self, model: LanguageModel, i: int) -> list[float]:
        rows, firsts = self.rows(i)
        found = [self.losses(model, row, first)[0] for row, first in zip(rows, firsts, strict=True)]
        return [sum(one) / len(one) if one else float("nan") for one in found]

    def is_right(self, model: LanguageModel, i: int) -> bool:
        if self.kind == "language_modeling":
            rows, firsts = self.rows(i)
            return self.losses(model, rows[0], firsts[0])[1]
        means = self.means(model, i)
        return means.index(min(means)) == self.data[i]["gold"]


def tiny(kind: str, vocab_size: int, block_size: int = 1024) -> LanguageModel:
    """Weights larger than at the start of a training, so that the tokens before matter."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": block_size, "vocab_size": vocab_size}
    model: LanguageModel
    if kind == "gpt2":
        model = GPT(GPTConfig(**shape), seed=1)  # type: ignore[arg-type]
    else:
        model = ModernGPT(ModernConfig(**shape, end_of_text=vocab_size - 1, zero_init=False), seed=1)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
    return model


def taught(model: LanguageModel, slow: list[Slow], n: int, steps: int) -> LanguageModel:
    """Trained on the answers of every second example, of `n` of each task: some are then right, others are not."""
    rows = [one.rows(i) for one in slow if one.kind == "language_modeling" for i in range(0, n, 2)]
    rows = [row for row in rows if len(row[0][0]) < 500]  # the cheaper ones
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        (row, *_), (first,) = rows[step % len(rows)]
        last = len(row) - first
        logits = model(torch.tensor([row]))[0, -1 - last : -1]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(row[-last:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def compare(model: LanguageModel, tokenizer: Tokenizer, slow: Sequence[Slow], n: int) -> dict[str, int]:
    """Check example by example; how many are right of each task."""
    right = {}
    for one in slow:
        task, file = TASKS[one.name], listed()[one.name]["file"]
        path = SHARED / "core" / file if file else SHARED / "eval/hellaswag_val.processed.jsonl.xz"
        items = read_items(task, path)
        found = judge.judge(context(model, tokenizer), task, items, n, one.context_size, tokenizer)
        assert found == [one.is_right(model, i) for i in range(n)], one.name
        right[one.name] = sum(found)
    return right


@needs_data
def test_every_task_is_answered_as_the_slow_scorer_answers_it() -> None:
    tokenizer = BytePairTokenizer(merges(N_MERGES))
    slow = [Slow(task, tokenizer, 1024) for task in listed().values()]
    model = taught(tiny("gpt2", tokenizer.vocab_size), slow, 6, 60)
    right = compare(model, tokenizer, slow, 6)
    assert len(right) == 20
    answered = [right[one.name] for one in slow if one.kind == "language_modeling"]
    assert 0 < sum(answered) < 6 * len(answered), answered  # else the rule for them would not show


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("kind", ["gpt2", "modern"])
def test_so_it_is_with_gpt_2_s_own_tokens(kind: str) -> None:
    tokenizer = Gpt2Tokenizer((SHARED / "gpt2_bpe/vocab.bpe").read_bytes())
    slow = [Slow(task, tokenizer, 1024) for task in listed().values()]
    model = taught(tiny(kind, tokenizer.vocab_size), slow, 10, 100)
    right = compare(model, tokenizer, slow, 10)
    assert sum(right[one.name] for one in slow if one.kind == "language_modeling") > 0


@needs_data
@pytest.mark.parametrize("kind", ["gpt2", "modern"])
def test_mean_losses_are_the_slow_scorer_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kind each, and one (boolq) whose prompts are longer than the context. Sums of fp32 losses: 1e-4 nats."""
    tokenizer = BytePairTokenizer(merges(N_MERGES))
    model = tiny(kind, tokenizer.vocab_size, 256)
    seen: list[float] = []

    def mean(nats: float, n_tokens: int) -> float:
        seen.append(nats / n_tokens)
        return seen[-1]

    monkeypatch.setattr(judge, "_mean", mean)
    for name in ("copa", "winograd", "boolq", "piqa"):
        slow = Slow(listed()[name], tokenizer, 256)
        items = read_items(TASKS[name], SHARED / "core" / listed()[name]["file"])
        seen.clear()
        judge.judge(context(model, tokenizer), TASKS[name], items, 3, 256, tokenizer)
        expected = [mean for i in range(3) for mean in slow.means(model, i)]
        assert seen == pytest.approx(expected, abs=1e-4), name


def small_set(folder: Path) -> Path:
    """A folder with a few tasks, short enough for a small context."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["sun", "moon", "red", "blue", "cat", "dog"]
    rows = [{"query": f"Q{i} {rng.choice(words)}", "choices": rng.sample(words, 2), "gold": i % 2} for i in range(30)]
    schema = [
        {"context_options": [f"{a} of {i}", f"{b} of {i}"], "continuation": "is here", "gold": i % 2}
        for i, (a, b) in enumerate(rng.sample(words, 2) for _ in range(20))
    ]
    plain = [{"context": f"{i} {rng.choice(words)}", "continuation": rng.choice(words)} for i in range(25)]
    for name, records in (("piqa", rows), ("copa", rows[:12]), ("winogrande", schema), ("bigbench_operators", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


BYTES = BytesTokenizer()


def on_small_set(folder: Path, **changes: object) -> EvalContext:
    values = {"seq_len": 128, "files": {"core": folder}}
    return context(tiny("gpt2", 257, 128), BYTES, **{**values, **changes})


def test_what_has_no_data_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = CORE.evaluate(on_small_set(small_set(tmp_path / "core")))
    said = capsys.readouterr().err
    assert "without the data of hellaswag_zeroshot, jeopardy, " in said
    assert "is not the pinned file of piqa: its figures are not comparable" in said
    assert "core" not in found
    assert found["tasks"] == 4
    assert found["count"] == 30 + 12 + 20 + 25
    names = ("copa", "piqa", "winogrande", "bigbench_operators")
    centered = {name: (found[name] - b) / (1 - b) for name, b in zip(names, (0.5, 0.5, 0.5, 0.0), strict=True)}
    assert {name: found[f"{name}_centered"] for name in names} == pytest.approx(centered)
    assert found["centered_mean"] == pytest.approx(sum(centered.values()) / 4)
    spreads = [found[f"{name}_stderr"] / (1 - b) for name, b in zip(names, (0.5, 0.5, 0.5, 0.0), strict=True)]
    assert found["centered_mean_stderr"] == pytest.approx(sum(one**2 for one in spreads) ** 0.5 / 4)


def test_without_any_data_it_is_an_error_that_says_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        CORE.evaluate(on_small_set(tmp_path))
    with pytest.raises(DataError, match=r"nor squad\.jsonl"):
        CORE.evaluate(on_small_set(small_set(tmp_path / "core"), part="squad"))
    file = tmp_path / "core" / "piqa.jsonl"
    with pytest.raises(UsageError, match=r"CORE has a file for each task; .* core\.TASK=FILE"):
        CORE.evaluate(on_small_set(file))


def test_a_part_is_measured_alone_from_a_folder_or_a_file(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "core")
    whole = CORE.evaluate(on_small_set(folder))
    expected = {key: whole[key] for key in ("piqa", "piqa_stderr", "piqa_centered")} | {"count": 30}
    for files in ({"core": folder}, {"core": folder / "piqa.jsonl"}, {"core.piqa": folder / "piqa.jsonl"}):
        assert CORE.evaluate(on_small_set(folder, part="piqa", files=files)) == expected


def test_while_training_it_is_short_and_over_few_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_set(tmp_path / "core")
    options = CORE.Options(examples=5)
    brief = CORE.evaluate(on_small_set(folder, brief=True, options=options))
    whole = CORE.evaluate(on_small_set(folder, limit=5))
    assert list(brief) == ["centered_mean", "centered_mean_stderr", "tasks", "count"]
    assert brief == {key: whole[key] for key in brief}
    assert brief["count"] == 20
    assert CORE.evaluate(on_small_set(folder, brief=True))["count"] == 30 + 12 + 20 + 25, "100 of each at most"
    with pytest.raises(UsageError, match=r"core\.examples = -1 must be at least 0"):
        CORE.Options(examples=-1)


def test_with_all_22_tasks_the_mean_is_called_core(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "core")
    layouts = {"multiple_choice": "piqa", "schema": "winogrande", "language_modeling": "bigbench_operators"}
    for task in TASKS.values():
        name = "hellaswag.jsonl" if task.asset.of else task.asset.name
        records = (folder / f"{layouts[task.kind]}.jsonl").read_text()
        (folder / name).write_text(records)
    found = CORE.evaluate(on_small_set(folder, limit=3))
    assert found["tasks"] == 22
    assert found["core"] == found["centered_mean"]
    brief = CORE.evaluate(on_small_set(folder, limit=3, brief=True))
    assert {"core", "core_stderr", "tasks", "count"} <= brief.keys()


def test_a_subset_is_the_beginning_of_the_whole(tmp_path: Path) -> None:
    """Its shots are drawn from all examples, so that each of its answers is that of the full run."""
    folder = small_set(tmp_path / "core")
    model, items = tiny("gpt2", 257, 128), read_items(TASKS["piqa"], folder / "piqa.jsonl")
    some, every = (
        judge.judge(context(model, BYTES, seq_len=128), TASKS["piqa"], items, n, 128, BYTES) for n in (7, 30)
    )
    assert some == every[:7]


def test_a_name_that_is_no_part_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="core has no part 'piqaa'; did you mean 'piqa'"):
        shelves.with_part("evals", "core.piqaa")
    with pytest.raises(ConfigError, match="hellaswag has no part 'piqa', nor has it any other"):
        shelves.with_part("evals", "hellaswag.piqa")
    with pytest.raises(ConfigError, match=r"there is no 'cores\.piqa'; did you mean"):
        shelves.with_part("evals", "cores.piqa")
    assert shelves.with_part("evals", "core.piqa") == (CORE, "piqa")
    assert shelves.with_part("evals", "core") == (CORE, "")


def a_rank(rank: int, size: int, port: int, folder: str, lacks: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
    if rank and lacks:
        files = {name: Path(folder, f"{name}.jsonl") for name in ("piqa", "copa", "winogrande") if name != lacks}
        files = {f"core.{name}": path for name, path in files.items()} | {"core": Path(folder, "none")}
    else:
        files = {"core": Path(folder)}
    found = CORE.evaluate(on_small_set(Path(folder), world=world, files=files))
    Path(folder, f"{size}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_two_ranks_have_the_figures_of_one(tmp_path: Path, unused_port: int) -> None:
    folder = small_set(tmp_path / "core")
    alone = CORE.evaluate(on_small_set(folder))
    spawn(a_rank, args=(2, unused_port, str(folder), ""), nprocs=2)
    for rank in range(2):
        assert json.loads((folder / f"2-{rank}.json").read_text()) == alone


def test_a_task_that_one_rank_lacks_is_left_out_on_all(tmp_path: Path, unused_port: int) -> None:
    folder = small_set(tmp_path / "core")
    spawn(a_rank, args=(2, unused_port, str(folder), "copa"), nprocs=2)
    first, second = (json.loads((folder / f"2-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["tasks"] == 2
    assert "copa" not in first


def test_in_training_it_is_recorded_short_and_a_part_by_its_name(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, regpt2: Run
) -> None:
    folder = small_set(tmp_path / "core")
    own = ("--evals.names", "val_loss", "core", "core.piqa", "--evals.core.examples", 4)
    done = regpt2("train", tiny_recipe, "--run", "run", "--data", tiny_data, *own, "--evals.files", f"core={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("core: without the data of hellaswag_zeroshot") == 1, "not at each evaluation"
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    figures = ("centered_mean", "centered_mean_stderr", "tasks", "count")
    for name, expected in (("core", figures), ("core.piqa", ("piqa", "piqa_stderr", "piqa_centered", "count"))):
        found = [event for event in events if event.get("eval") == name]
        assert [event["step"] for event in found] == [0, 6, 12]
        assert tuple(key for key in found[0] if key in figures or "piqa" in key) == expected
        assert found[0]["count"] == (16 if name == "core" else 4)
    wrong = regpt2("train", tiny_recipe, "--run", "other", "--data", tiny_data, "--evals.names", "core.piqaa")
    assert wrong.returncode == 2
    assert "core has no part 'piqaa'; did you mean 'piqa'?" in wrong.stderr

    done = regpt2("evaluate", "run", "--evals", "core", "core.copa", "--files", f"core={folder}", "--core.examples", 5)
    assert done.returncode == 0, done.stderr
    assert "mean of these 4 tasks" in done.stdout
    assert "core.copa, 5 examples" in done.stdout
    found = api.evaluate(tmp_path / "run", "core.copa", files=[f"core={folder}"], core={"examples": 5})
    assert found["core.copa"]["count"] == 5
    assert found["core.copa"]["options"] == {"examples": 5, "context": 0}
    assert [one["value"] for one in found["core.copa"]["references"]["copa"]] == [0.6, 0.66, 0.67, 0.67]


def test_parts_are_told_as_they_are_done(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    found = CORE.evaluate(
        on_small_set(small_set(tmp_path / "core"), on_part=lambda name, value: told.append((name, value)))
    )
    names = ("copa", "piqa", "winogrande", "bigbench_operators")
    assert told == [(f"core.{name}", found[name]) for name in names]
