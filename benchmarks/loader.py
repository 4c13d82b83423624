"""How fast batches come from shards. In: a prepared data folder; out: tokens/s in each order, and the slowest batches.

    python benchmarks/loader.py DIR [--steps 100]
    python benchmarks/loader.py --stalls [--steps 1000]

Batches of 524,288 tokens in windows of 1,024, as gpt2_124m reads them, in one thread and without a model. `--stalls`
needs no folder. It reads the same 200M tokens as one shard and as shards of 1 MB, more than the files kept open, batch
by batch in turn, to show the cost of a shard's end.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens, write_shard

STALL_TOKENS, SMALL_SHARD = 200_000_000, 500_000
END_OF_TEXT = 50_256  # among the random tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--stalls", action="store_true")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if not options.stalls and options.data is None:
        parser.error("give a prepared data folder, or --stalls")
    if options.data is not None:
        compare({"": options.data}, options.steps or 100)
    if options.stalls:
        with tempfile.TemporaryDirectory() as folder:
            one, many = Path(folder, "one"), Path(folder, "many")
            write(one, STALL_TOKENS)
            write(many, SMALL_SHARD)
            compare({"one shard": one, f"{STALL_TOKENS // SMALL_SHARD} shards": many}, options.steps or 1000)


def write(folder: Path, shard_tokens: int) -> None:
    """Random tokens in shards of this size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(STALL_TOKENS // shard_tokens):
        pieces = [rng.integers(0, 50_257, SMALL_SHARD, dtype=np.uint16) for _ in range(shard_tokens // SMALL_SHARD)]
        write_shard(folder / f"random_train_{index:06d}.bin", shard_tokens, pieces)


def compare(folders: dict[str, Path], steps: int) -> None:
    """A line for each order and folder; the folders take turns."""
    for order in ("sequential", "shuffled", "documents"):
        began_at = time.perf_counter()
        loaders = {
            name: Loader(
                open_tokens(folder, "train"),
                BatchConfig(order=order),  # type: ignore[arg-type]
                seed=0,
                end_of_text=END_OF_TEXT if name else open_tokens(folder, "train").tokenizer().eot,
            )
            for name, folder in folders.items()
        }
        opened_s = time.perf_counter() - began_at
        batch_ms: dict[str, list[float]] = {name: [] for name in loaders}
        for step in range(1, steps + 2):
            for name, loader in loaders.items():
                began_at = time.perf_counter()
                loader.batch(step)
                batch_ms[name].append(1e3 * (time.perf_counter() - began_at))
        for name, loader in loaders.items():
            loader.streams[0].close()  # type: ignore[attr-defined]
            p50, p99, slowest = np.quantile(batch_ms[name][1:], [0.5, 0.99, 1.0])  # the first warms up
            figures = {"tokens_per_s": round(1e3 * loader.config.batch_tokens / p50)}
            figures |= {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "slowest_ms": round(slowest, 2)}
            if loader.documents:
                figures |= {"documents": len(loader.documents[0].starts), "opened_s": round(opened_s, 2)}
            print(json.dumps({"order": order, **({"data": name} if name else {}), **figures}), flush=True)


if __name__ == "__main__":
    main()
