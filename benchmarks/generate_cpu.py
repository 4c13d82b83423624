"""Our generation beside transformers' `generate`, on a CPU: GPT-2 (124M), random weights, the same in both.

    python benchmarks/generate_cpu.py [--batch 1|8] [--precision fp32|bf16|int8]

A prompt of 32 ids, 128 new ones, greedy, with a KV cache, turn by turn. Random weights: the speed does not depend on
what the model knows, and nothing has to be fetched. int8 is ours, beside theirs in bf16.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from sides import compare, keep, serve

PROMPT_TOKENS, NEW_TOKENS = 32, 128


def prompt(batch: int) -> Tensor:
    return torch.randint(0, 50257, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def ours(batch: int, precision: str) -> None:
    from regpt2.base.device import choose_compute
    from regpt2.model.generate import generate
    from regpt2.model.gpt import GPT, GPTConfig
    from regpt2.model.packed import in_int8, packed_if_faster

    compute = choose_compute("fp32" if precision == "int8" else precision, torch.device("cpu"))
    model = GPT(GPTConfig()).to(compute.dtype).eval()
    model = in_int8(model) if precision == "int8" else packed_if_faster(model, 1000)  # once, as when loading

    def work() -> dict[str, float]:
        return {"tokens": float(generate(model, prompt(batch), NEW_TOKENS, temperature=0).shape[1])}

    serve(work)


def transformers(batch: int, precision: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    model = model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    model.generation_config.pad_token_id = 50256

    @torch.no_grad()
    def work() -> dict[str, float]:
        ids = prompt(batch)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        return {"tokens": float(out.shape[1])}

    serve(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=["bf16", "fp32", "int8"], default="bf16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    parser.add_argument("--side", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return {"ours": ours, "transformers": transformers}[options.side](options.batch, options.precision)
    result = compare(__file__, ["ours", "transformers"], sys.argv[1:], pairs=options.pairs, times=1)
    command = "python benchmarks/generate_cpu.py " + " ".join(sys.argv[1:])
    what = f"generation of {NEW_TOKENS} tokens, batch {options.batch}, {options.precision}: ours against transformers"
    keep(result, what, command, options.out)


if __name__ == "__main__":
    main()
