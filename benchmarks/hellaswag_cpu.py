"""Our HellaSwag scoring beside one example at a time, on a CPU: GPT-2 (124M), random weights, the same in both.

    python benchmarks/hellaswag_cpu.py FILE [--precision fp32|bf16] [--examples 160]

FILE holds the validation set. The lecture takes one example at a time: its four rows, padded, through the whole
model, all logits, their cross entropy. Both sides use the same model in the same compute type, turn by turn, and must
choose the same endings. Where a few differ in bf16, the two losses are within its rounding.
"""

import argparse
import json
import lzma
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from regpt2.base.device import choose_compute
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.scoring.choices import predictions
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.strategy import in_compute_type
from sides import compare, keep, serve


def sample(path: Path, n: int) -> list[Question]:
    """A quarter each of four context lengths, the quartiles' middles, so batches are as full as with the whole set."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = load_tokenizer("gpt2")
    contexts = [tokenizer.encode(row["ctx"]) for row in rows]
    lengths = sorted(map(len, contexts))
    chosen = []
    for length in (lengths[len(rows) * eighth // 8] for eighth in (1, 3, 5, 7)):
        alike = [i for i, ids in enumerate(contexts) if len(ids) == length]
        chosen += random.Random(0).sample(alike, min(n // 4, len(alike)))
    return [
        Question(contexts[i], tuple(tokenizer.encode(f" {ending}") for ending in rows[i]["endings"])) for i in chosen
    ]


@torch.no_grad()
def one_at_a_time(context: EvalContext, questions: list[Question]) -> list[int]:
    chosen = []
    for question in questions:
        rows = [[*question.context, *ending] for ending in question.endings]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=context.world.device)  # (4, T)
        logits = context.model(ids)[:, :-1].float()  # (4, T - 1, V)
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1)
        start = len(question.context) - 1
        means = [nats[i, start : len(row) - 1].mean() for i, row in enumerate(rows)]
        chosen.append(int(torch.stack(means).argmin()))
    return chosen


def ours(context: EvalContext, questions: list[Question]) -> list[int]:
    scored = score_endings(context, "hellaswag", questions)
    return predictions(scored.nats, scored.n_tokens.tolist())


def side(name: str, precision: str, questions: list[Question], chosen_at: Path) -> None:
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    compute = choose_compute(precision, world.device)
    model = in_compute_type(GPT(GPTConfig()).eval(), compute.dtype)
    context = EvalContext(model=model, world=world, data=None, seq_len=1024, batch=8, val_tokens=1)

    def work() -> dict[str, float]:
        chosen = {"ours": ours, "one_at_a_time": one_at_a_time}[name](context, questions)
        (chosen_at / name).write_text(json.dumps(chosen))
        return {}

    serve(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    parser.add_argument("--chosen-at", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "one_at_a_time"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options.side, options.precision, sample(options.file, options.examples), options.chosen_at)
    with tempfile.TemporaryDirectory() as folder:
        sides, arguments = ["ours", "one_at_a_time"], [*sys.argv[1:], "--chosen-at", folder]
        result = compare(__file__, sides, arguments, pairs=options.pairs, times=1)
        mine, theirs = (json.loads(Path(folder, name).read_text()) for name in sides)
    result["same_choice"] = sum(a == b for a, b in zip(mine, theirs, strict=True))
    result["examples"] = len(mine)
    command = "python benchmarks/hellaswag_cpu.py FILE " + " ".join(sys.argv[2:])
    what = f"HellaSwag, {len(mine)} examples, {options.precision}: ours against one example at a time"
    return keep(result, what, command, options.out)


if __name__ == "__main__":
    main()
