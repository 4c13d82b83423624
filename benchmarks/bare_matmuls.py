"""The matmuls of a training step and nothing else: a side that shows the limit. In: a job as JSON; out: seconds.

Every linear layer of GPT-2 makes three products in a step: forward, the input's gradient, the weight's gradient. This
side makes them with the shapes and layouts of the step, in its precision, on operands that lie ready. No step can be
faster than that with the same library, so `seconds of this side / seconds of a side` is the share of the limit that the
side reaches. Attention, norms, loss and optimizer are not in it.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regpt2.base.device import choose_compute, synchronize
from regpt2.model.gpt import GPTConfig
from regpt2.model.matmul_rate import model_shapes
from sides import serve
from works import TrainingWork


def shapes(work: TrainingWork) -> list[tuple[int, int, int, int]]:
    """Rows, inputs, outputs and number of the linear layers of a micro-step."""
    return model_shapes(GPTConfig(**work.model.sizes()), work.micro_batch * work.seq_len)


def flops(work: TrainingWork) -> float:
    """Of all products of a step, three for each layer."""
    return 6.0 * work.grad_accum_steps * sum(rows * k * n * count for rows, k, n, count in shapes(work))


def step(work: TrainingWork, precision: str) -> Callable[[], None]:
    """What makes all of them once."""
    device = torch.device(work.device)
    dtype = choose_compute(precision, device).dtype

    def made(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    layers = [(made(rows, k), made(n, k), made(rows, n), count) for rows, k, n, count in shapes(work)]

    def products() -> None:
        for _ in range(work.grad_accum_steps):
            for x, weight, gradient, count in layers:
                for _ in range(count):
                    x @ weight.T, gradient @ weight, gradient.T @ x

    return products


def main() -> None:
    job = json.loads(sys.argv[1])
    work = TrainingWork.from_json(job["work"])
    products, device = step(work, job["side"]["precision"]), torch.device(work.device)

    def once() -> dict[str, Any]:
        products()
        synchronize(device)
        return {}

    serve(once)


if __name__ == "__main__":
    main()
