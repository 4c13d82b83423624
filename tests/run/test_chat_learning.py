"""A model of 3.3M parameters learns a made-up task from conversations: write four letters as capitals, in reverse."""

import json
import random
from pathlib import Path

import pytest
import torch

from conftest import Run
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import Message, prompt_ids, special_ids
from regpt2.model.architecture import build_model
from regpt2.model.files.load import load_model
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.generate import generate
from regpt2.sampling.tokenizer import tokenizer_of

STEPS = 400
SETTINGS = (
    *("--max-steps", STEPS, "--eval-every", 100, "--sample-every", 0, "--save-every", STEPS, "--log-every", 10),
    *("--model.block-size", 128, "--batch.seq-len", 128, "--batch.batch-tokens", 1024, "--batch.micro-batch", 8),
    *("--model.vocab-size", 259, "--model.document-mask", "--model.end-of-text", 256, "--evals.val-tokens", 2500),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_millions_answers_what_it_has_not_seen(regpt2: Run, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(3100)]
    unseen = sorted(set(words[3000:]) - set(words[:3000]))
    lines = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1].upper()}]}
        for word in words[:3000]
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    how = ("--tokenizer", "bytes", "--workers", 1, "--val-tokens", 3000)
    assert regpt2("prepare", "chat", "--input", "talks.jsonl", *how, "--out", "data").returncode == 0
    done = regpt2("train", "modern_small", "--data", "data", "--run", "run", "--device", "cpu", *SETTINGS)
    assert done.returncode == 0, done.stderr
    loaded = load_model(str(tmp_path / "run"))
    tokenizer = tokenizer_of(loaded)
    special = special_ids(tokenizer)
    assert special is not None and isinstance(tokenizer, AddedTokens) and loaded.model.n_params() > 3_000_000

    def right(model: LanguageModel) -> float:
        prompts = torch.tensor([prompt_ids([Message("user", word)], tokenizer) for word in unseen])
        rows = generate(model, prompts, 6, temperature=0, stop_id=special[1]).tolist()
        answers = [tokenizer.decode(row[prompts.shape[1] :]) for row in rows]
        wanted = [f"{word[::-1].upper()}<|im_end|>" for word in unseen]
        return sum(a.startswith(b) for a, b in zip(answers, wanted, strict=True)) / len(unseen)

    assert len(unseen) > 50
    before, after = right(build_model(loaded.model.config, seed=1337)), right(loaded.model)
    print(f"{len(unseen)} unseen questions: {before:.0%} before, {after:.0%} after")
    assert before == 0 and after > 0.9
