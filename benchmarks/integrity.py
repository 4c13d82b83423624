"""The cost of integrity checks. In: a prepared data folder of bytes; out: a table and a JSON file.

    python benchmarks/integrity.py DATA [--rounds 5]

It times the same training with and without hashes, read-back, fsync, digests of the data, watchdog and check of the
shards, in turns; the result is the median of the ratios of neighbors. It also times each piece for GPT-2 (124M).
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from regpt2.base.device import device_name
from regpt2.base.ranks.world import World
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.run.loop import train
from regpt2.training import checkpoint
from regpt2.training.ranks.ordered_sums import PairwiseSum
from regpt2.training.ranks.replicas import weight_sums

STEPS, SAVE_EVERY = 90, 30


def recipe(data: Path, run: Path) -> RunConfig:
    """The demo's recipe with a model of 6M weights: 76 MB a checkpoint."""
    demo = load_recipe("demo")
    return dataclasses.replace(
        demo,
        data=str(data),
        run=str(run),
        max_steps=STEPS,
        save_every=SAVE_EVERY,
        eval_every=0,
        sample_every=0,
        model=dataclasses.replace(demo.model, n_layer=8, n_embd=256),
        batch=dataclasses.replace(demo.batch, batch_tokens=2 * 1536),
    )


def write_without(held: ExitStack) -> None:
    """Checkpoints without hash, read-back and fsync."""

    def write_only(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, path)
        return ""

    def write_text(path: Path, text: str) -> str:
        path.write_text(text)
        return ""

    held.enter_context(mock.patch.object(checkpoint, "_write_tensors", write_only))
    held.enter_context(mock.patch.object(checkpoint, "_write_text", write_text))
    held.enter_context(mock.patch.object(checkpoint, "fsync_dir"))


def without(config: RunConfig, held: ExitStack) -> RunConfig:
    """Remove all of these."""
    write_without(held)
    held.enter_context(mock.patch("regpt2.data.loader._window_digest", return_value=0))
    return dataclasses.replace(
        config, verify_data=False, parallel=dataclasses.replace(config.parallel, timeout_s=0.0, check_every=0)
    )


def seconds_of_training(data: Path, *, sure: bool) -> float:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        config = recipe(data, Path(folder) / "run")
        if not sure:
            config = without(config, held)
        held.enter_context(mock.patch("regpt2.run.ending.write_report", lambda run: run))
        began_at = time.perf_counter()
        train(config)
        return time.perf_counter() - began_at


def median_ms(work: Callable[[], object], n: int = 7) -> float:
    times = []
    for _ in range(n):
        began_at = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began_at))
    return statistics.median(times)


def save_s(snap: checkpoint.Snapshot, *, sure: bool) -> float:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        if not sure:
            write_without(held)
        began_at = time.perf_counter()
        checkpoint.write(Path(folder), snap)
        return time.perf_counter() - began_at


def saves(model: GPT, rounds: int) -> dict[str, list[float]]:
    """Seconds of the thread that writes a checkpoint of the model and its two moments, 1.5 GB."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {f"{name}/{kind}": p for name, p in weights.items() for kind in ("exp_avg", "exp_avg_sq")}
    snap = checkpoint.snapshot(1, "{}", weights, moments, {"step": 1})
    times = [(save_s(snap, sure=True), save_s(snap, sure=False)) for _ in range(rounds)]
    return {"save_124m_s": [round(a, 2) for a, _ in times], "save_124m_without_s": [round(b, 2) for _, b in times]}


def pieces() -> dict[str, object]:
    """Milliseconds for the 124M model."""
    model = GPT(GPTConfig())
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    gradients = [[torch.ones_like(p) for p in model.parameters()] for _ in range(2)]

    def sum_two() -> None:
        tree = PairwiseSum()
        for one in gradients:
            tree.add(one)
        tree.total()

    return {
        **saves(model, rounds=5),
        "weight_sums_ms": round(median_ms(lambda: world.stack(weight_sums(model)).cpu()), 1),
        "ordered_sum_of_two_gradients_ms": round(median_ms(sum_two), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pairs = []
    seconds_of_training(options.data, sure=True)  # warms up
    for n in range(options.rounds):
        order = (True, False) if n % 2 else (False, True)
        times = {sure: seconds_of_training(options.data, sure=sure) for sure in order}
        pairs.append((times[True], times[False]))
    result = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "with_s": [round(a, 2) for a, _ in pairs],
        "without_s": [round(b, 2) for _, b in pairs],
        "median_ratio": round(statistics.median(a / b for a, b in pairs), 4),
        **pieces(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
