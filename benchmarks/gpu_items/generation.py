"""Generation: GPT-2 (124M) in bf16, random weights, a prompt of 32 ids, 128 new ones, greedy; then a long prompt."""

import torch

from gpu_items import Check
from gpu_timing import TINY, call_times, spread
from regpt2.base.device import choose_compute, pick_device
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.sampling.generate import generate


def run(check: Check) -> None:
    device = pick_device(check.device)
    dtype = choose_compute("auto", device).dtype
    model = GPT(TINY if check.smoke else GPTConfig()).to(device, dtype).eval()
    n_prompt, n_new, n_long = (8, 4, 32) if check.smoke else (32, 128, 512)
    few = {"calls": 1, "warmup": 1} if check.smoke else {"calls": 3, "warmup": 1}

    def prompt(batch: int, n_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (batch, n_tokens), generator=generator).to(device)

    for batch in (1, 2) if check.smoke else (1, 8, 64, 256):
        ids = prompt(batch, n_prompt)
        ms = spread(call_times(lambda ids=ids: generate(model, ids, n_new, temperature=0), device, **few))
        check.keep(f"B={batch}", **ms, ms_per_token=ms["ms"] / n_new, tokens_per_s=1000 * batch * n_new / ms["ms"])
    for batch in (1,) if check.smoke else (1, 16):
        ids = prompt(batch, n_long)
        ms = spread(call_times(lambda ids=ids: generate(model, ids, 1, temperature=0), device, **few))
        check.keep(f"prompt of {n_long} tokens, B={batch}", **ms, tokens_per_s=1000 * batch * n_long / ms["ms"])
