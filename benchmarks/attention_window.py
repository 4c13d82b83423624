"""What attention costs within a window. In: lengths T, a window; out: CPU seconds and memory of one head.

    python benchmarks/attention_window.py --window 512 --lengths 4096 16384 65536
    python benchmarks/attention_window.py --window 1792 --lengths 65536 --documents 1000

On a CPU, fp32, batch 1, one head of 64. Memory is what the process takes beyond its peak before the first pass: the
output and three gradients are in it, 67 MB at T = 65,536.
"""

import argparse
import resource
import statistics
import time

import torch

from regpt2.model.kernels.attention import causal_attention
from regpt2.model.kernels.masks import visible_keys


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes on Linux


def measure(T: int, window: int, document: int, turns: int) -> tuple[float, float, float]:
    """CPU seconds of the forward pass and of both, medians over the turns; MB beyond the peak before."""
    q, k, v = (torch.randn(1, 1, T, 64, requires_grad=True) for _ in range(3))
    numbers = (torch.arange(T, dtype=torch.int32) // document)[None] if document else None
    before, forward, both = peak_mb(), [], []
    for _ in range(turns):
        start = time.process_time()
        mask = visible_keys(T, T, device=q.device, documents=numbers, window=window)
        y = causal_attention(q, k, v, mask=mask)
        forward.append(time.process_time() - start)
        torch.autograd.grad(y, (q, k, v), y)
        both.append(time.process_time() - start)
    return statistics.median(forward), statistics.median(both), peak_mb() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens")
    parser.add_argument("--window", type=int, default=512, help="tokens that a query sees; 0: all before")
    parser.add_argument("--documents", type=int, default=0, help="tokens of each document; 0: all are one")
    parser.add_argument("--turns", type=int, default=5, help="medians are over these")
    options = parser.parse_args()
    print("      T   forward      both   both, us a token   memory")
    for T in options.lengths:
        forward, both, mb = measure(T, options.window, options.documents, options.turns)
        print(f"{T:7,} {forward:8.3f}s {both:8.3f}s {both / T * 1e6:18.1f} {mb:6.0f}MB")


if __name__ == "__main__":
    main()
