"""EleutherAI's lm-evaluation-harness as a client of `regpt2 serve`: the numbers of `regpt2 harness`."""

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.base import shelves
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.measuring.harness import harness_model
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from serving.tiny_server import server_of

pytestmark = pytest.mark.clients
pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
pytest.importorskip("tenacity", reason="the harness's client needs lm-eval[api]")

TOKENIZER = load_tokenizer("gpt2")
BLOCK_SIZE = 96
TASKS = {
    "choose_here": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "read_here": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "speak_here": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", " e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_the_harness_finds_the_same_over_http(tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=BLOCK_SIZE), seed=3).eval()
    with torch.no_grad():
        model.wte.weight *= 10  # logits that differ: predictions that do not hang on the last bit
    folder = tmp_path / "exported"
    folder.mkdir()
    vocabulary = Vocabulary(TOKENIZER.name, TOKENIZER.fingerprint, TOKENIZER.eot, find_vocab().read_bytes())
    shelves.load("model.weights", "huggingface").write(model, folder, vocabulary, "fp32")
    write_tasks(tmp_path)
    manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)

    def found_by(lm: Any, **options: Any) -> Any:
        return simple_evaluate(model=lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, **options)

    alone = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    context = EvalContext(
        model=model, world=alone, data=None, seq_len=BLOCK_SIZE, batch=8, val_tokens=0, tokenizer=TOKENIZER
    )
    ours = found_by(harness_model(context))
    with server_of(folder, slots=4) as server:
        for batch, concurrent in ((1, 4), (5, 1)):
            args = {
                "model": "exported",
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(folder),
                "tokenizer_backend": "huggingface",
                "max_length": BLOCK_SIZE,
                "num_concurrent": concurrent,
                "max_retries": 1,
            }
            same(ours, found_by("local-completions", model_args=args, batch_size=batch))


def write_tasks(folder: Path) -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7))) for _ in range(200)]
    lines = []
    for _ in range(30):
        choices = [f" {' '.join(rng.choices([*words, 'é', '日本'], k=rng.randint(1, 4)))}" for _ in range(4)]
        question = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        lines.append(json.dumps({"question": question, "choices": choices, "label": rng.randrange(4)}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tasks").mkdir()
    data = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def same(ours: Any, theirs: Any) -> None:
    """Example by example."""
    for name in TASKS:
        for metric, value in ours["results"][name].items():
            if isinstance(value, float):
                assert theirs["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
        a, b = (sorted(found["samples"][name], key=lambda one: one["doc_id"]) for found in (ours, theirs))
        assert len(a) == len(b) == 30
        for one, other in zip(a, b, strict=True):
            answers, others = one["filtered_resps"], other["filtered_resps"]
            if name == "choose_here":
                nats = [[float(answer[0]) for answer in found] for found in (answers, others)]
                assert nats[0] == pytest.approx(nats[1], abs=1e-3)
                assert [answer[1] for answer in answers] == [answer[1] for answer in others]
            elif name == "speak_here":
                assert answers == others
    assert 0 < ours["results"]["choose_here"]["acc,none"] < 1
