"""How fast batches come from shards. In: a prepared data folder; out: tokens/s in both orders, and the slowest batch.

    python benchmarks/loader.py DIR [--steps 100]

Batches of 524,288 tokens in windows of 1,024, as gpt2_124m reads them, in one thread and without a model.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.shards import open_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    for order in ("sequential", "shuffled"):
        config = BatchConfig(order=order)
        with open_tokens(options.data, "train") as tokens:
            loader = Loader(tokens, config, seed=0)
            loader.batch(1)
            seconds = []
            for step in range(2, options.steps + 2):
                began_at = time.perf_counter()
                loader.batch(step)
                seconds.append(time.perf_counter() - began_at)
        median_s = statistics.median(seconds)
        result = {"order": order, "tokens_per_s": config.batch_tokens / median_s, "slowest_ms": 1e3 * max(seconds)}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
