"""CORE by our scoring beside an obvious one, on a CPU: GPT-2 (124M), random weights, fp32, the same in both.

    python benchmarks/core_cpu.py DATA [--examples 4] [--pairs 3] [--out JSON]
    python benchmarks/core_cpu.py DATA --examples 24 --tokens

DATA holds `core/` with the tasks, and in `eval/` HellaSwag. The obvious scoring takes one example at a time: its
sequences, padded, as one batch through the whole model, with torch's own attention, all logits in fp32, their cross
entropy. Turn by turn, each side in a process of its own; both must choose the same answers. A task's ratio is that of
the same examples. The whole is weighted to the full sets: each task's seconds per example times its examples. With so
few examples ours cannot batch much, so its full sets are a little faster than that. --tokens counts, and times
nothing: how many tokens each side takes through the model.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import Tokenizer, load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.scoring.assets import find_parts
from regpt2.evals.scoring.core.prompts import Item, prompts, read_items
from regpt2.evals.scoring.core.tasks import TASKS, Kind, Task
from regpt2.evals.scoring.endings import Scored
from regpt2.model.gpt import GPT, GPTConfig
from sides import keep, serve, take_turns

judging: Any = importlib.import_module("regpt2.evals.scoring.core.judge")

SIDES = ("ours", "one_at_a_time")
CONTEXT = 1024
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=64)

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size


def read_tasks(data: Path, only: Sequence[str]) -> dict[str, list[Item]]:
    """The examples of each task that DATA has, in CORE's order."""
    assets = [task.asset for task in TASKS.values() if not only or task.name in only]
    paths, _ = find_parts(assets, "core", {"core": data / "core", "hellaswag": data / "eval"})
    return {name: read_items(TASKS[name], path, is_main=False) for name, path in paths.items()}


@torch.no_grad()
def all_logits(gpt: GPT, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
    """GPT-2 as it is written first: every position through every layer and the head."""
    B, T = ids.shape
    x = gpt.wte(ids) + gpt.wpe(torch.arange(T))  # (B, T, C)
    for block in gpt.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)  # three of (B, T, C)
        q, k, v = (z.view(B, T, gpt.config.n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + block.attn.c_proj(y)
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return F.linear(gpt.ln_f(x), gpt.wte.weight[: gpt.config.vocab_size])


def one_at_a_time(context: EvalContext, task: Task, items: Sequence[Item], n: int, tokenizer: Tokenizer) -> list[int]:
    """The number of each example's choice; of language modeling 1 where the answer is the likeliest."""
    gpt = context.gpt
    assert isinstance(gpt, GPT)
    chosen = []
    for i in range(n):
        rows = [[tokenizer.eot, *tokenizer.encode(text)] for text in prompts(task, items, i)]
        shortest = min(map(len, rows))
        if task.kind == "schema":
            same = next(j for j in range(1, shortest) if len({row[-j] for row in rows}) > 1) - 1
            starts = [len(row) - same for row in rows]
        else:
            same = next((j for j in range(shortest) if len({row[j] for row in rows}) > 1), shortest)
            starts = [same] * len(rows)
        if task.kind == "language_modeling":
            rows, starts = rows[1:], starts[1:]
        cuts = [max(0, len(row) - CONTEXT) for row in rows]
        rows, starts = [row[-CONTEXT:] for row in rows], [start - cut for start, cut in zip(starts, cuts, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[tokenizer.eot] * (longest - len(row))] for row in rows])  # (B, T)
        logits = all_logits(gpt, ids)  # (B, T, V)
        targets = ids[:, 1:]  # (B, T - 1)
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        likeliest = logits.argmax(dim=2)[:, :-1] == targets
        spans = [slice(max(start, 1) - 1, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
        if task.kind == "language_modeling":
            chosen.append(int(likeliest[0, spans[0]].all()))
        else:
            chosen.append(int(torch.stack([nats[j, span].mean() for j, span in enumerate(spans)]).argmin()))
    return chosen


def ours(context: EvalContext, task: Task, items: Sequence[Item], n: int, tokenizer: Tokenizer) -> list[int]:
    """The same by evals/core."""
    chosen: list[int] = []
    judged = judging._is_right

    def keeping(kind: Kind, item: Item, scored: Scored, places: Sequence[tuple[int, int]]) -> bool:
        if kind == "language_modeling":
            chosen.append(int(scored.greedy[places[0]]))
        else:
            means = [float(scored.nats[place] / scored.n_tokens[place]) for place in places]
            chosen.append(means.index(min(means)))
        return bool(judged(kind, item, scored, places))

    judging._is_right = keeping
    try:
        judging.judge(context, task, items, n, CONTEXT, tokenizer)
    finally:
        judging._is_right = judged
    return chosen


def tokens(task: Task, items: Sequence[Item], n: int, tokenizer: Tokenizer) -> list[int]:
    """Tokens that pass the model for the first `n` examples, padding included: ours, one example at a time."""
    mine = theirs = 0
    for i in range(n):
        found = judging.windows(task.kind, judging.encoded(tokenizer, prompts(task, items, i)), CONTEXT)
        theirs += len(found) * max(len(window.ids) for window in found)
        questions, _ = judging.shared(found)
        mine += sum(len(one.context) + sum(max(0, len(e) - 1) for e in one.endings) for one in questions)
    return [mine, theirs]


def count(options: argparse.Namespace) -> None:
    """The tokens of both sides, per task and weighted to the full sets."""
    tokenizer, whole = load_tokenizer("gpt2"), [0.0, 0.0]
    for name, items in read_tasks(options.data, options.only).items():
        n = min(options.examples, len(items))
        mine, theirs = tokens(TASKS[name], items, n, tokenizer)
        whole = [former + len(items) / n * new for former, new in zip(whole, (mine, theirs), strict=True)]
        print(f"{name:<34} ours {mine / n:7.0f} an example, one at a time {theirs / n:7.0f}, {theirs / mine:.2f}x")
    print(f"full sets: ours {whole[0] / 1e6:.1f}M, one at a time {whole[1] / 1e6:.1f}M, {whole[1] / whole[0]:.2f}x")


def side(name: str, options: argparse.Namespace) -> None:
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    model = GPT(TINY if options.tiny else GPTConfig()).eval()
    context = EvalContext(model=model, world=world, data=None, seq_len=CONTEXT, batch=8, val_tokens=1)
    tasks, tokenizer = read_tasks(options.data, options.only), load_tokenizer("gpt2")
    score = {"ours": ours, "one_at_a_time": one_at_a_time}[name]

    def work() -> dict[str, Any]:
        seconds, chosen = {}, {}
        for task, items in tasks.items():
            began_at = time.perf_counter()
            chosen[task] = score(context, TASKS[task], items, min(options.examples, len(items)), tokenizer)
            seconds[task] = time.perf_counter() - began_at
        (options.chosen_at / name).write_text(json.dumps(chosen))
        return {"tasks": seconds}

    serve(work)


def summary(rows: list[dict[str, dict[str, Any]]], counts: dict[str, int], n: int) -> dict[str, Any]:
    """Per task: seconds an example on both sides and the median ratio; the same for full sets, CORE as a whole."""

    def whole(row: dict[str, Any]) -> float:
        return sum(seconds / min(n, counts[task]) * counts[task] for task, seconds in row["tasks"].items())

    tasks = {}
    for task, count in counts.items():
        pairs = [(row["ours"]["tasks"][task], row["one_at_a_time"]["tasks"][task]) for row in rows]
        scored = min(n, count)
        tasks[task] = {
            "full_set": count,
            "seconds_an_example": [statistics.median(side) / scored for side in zip(*pairs, strict=True)],
            "ratio": statistics.median(theirs / mine for mine, theirs in pairs),
        }
    ratios = [whole(row["one_at_a_time"]) / whole(row["ours"]) for row in rows]
    return {
        "wall_ratio_of_full_sets": statistics.median(ratios),
        "wall_ratio_spread": [min(ratios), max(ratios)],
        "hours_of_full_sets": {name: statistics.median(whole(row[name]) for row in rows) / 3600 for name in SIDES},
        "peak_bytes": {name: rows[-1][name]["peak_bytes"] for name in SIDES},
        "tasks": tasks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--pairs", type=int, default=3, help="turns of both sides, after one to warm up")
    parser.add_argument("--only", nargs="*", default=[], help="some tasks")
    parser.add_argument("--tokens", action="store_true", help="count tokens instead of timing")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    parser.add_argument("--chosen-at", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options.side, options)
    if options.tokens:
        return count(options)
    counts = {name: len(items) for name, items in read_tasks(options.data, options.only).items()}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--chosen-at", folder, "--side"]
        commands = {name: [*command, name] for name in SIDES}
        _, rows = take_turns(commands, least=options.pairs, most=options.pairs, seconds=0, times=1)
        mine, theirs = (json.loads(Path(folder, name).read_text()) for name in SIDES)
    differ = {task: (mine[task], theirs[task]) for task in mine if mine[task] != theirs[task]}
    if differ:
        sys.exit(f"the two sides choose other answers: {differ}")
    result = {"examples": options.examples, "same_choices": True, **summary(rows, counts, options.examples)}
    what = f"CORE, {len(counts)} tasks, {options.examples} examples each, fp32: ours against one example at a time"
    if options.tiny:
        what += ", a tiny model"
    return keep(result, what, "python benchmarks/core_cpu.py DATA " + " ".join(sys.argv[2:]), options.out)


if __name__ == "__main__":
    main()
