"""docs/training.md's "Your own text" as a person follows it, small: prose, a model, fine-tuned, it answers, exported.

Every command runs in this process, one after the other. llama.cpp reads the last file where it is installed.
"""

import io
import json
import random
import sys
from pathlib import Path

import pytest

from conftest import Run
from regpt2.base.record.metrics import read_events

ANIMALS = {"fox": "red", "owl": "gray", "bee": "yellow", "frog": "green"}
PLACES = ("by the old tower", "in the quiet garden", "under the bridge", "near the river", "behind the mill")
SMALL = (
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--log-every",
    "5",
    "--sample.n",
    "1",
    "--sample.max-new-tokens",
    "8",
)


def write_prose(path: Path, n_bytes: int) -> None:
    """Write `n_bytes` of sentences about a few animals, in paragraphs."""
    draw, text = random.Random(7), ""
    while len(text) < n_bytes:
        animal = draw.choice(list(ANIMALS))
        text += f"The {animal} was {ANIMALS[animal]} and lived {draw.choice(PLACES)}. "
        text += "\n\n" if draw.random() < 0.2 else ""
    path.write_text(text)


def write_conversations(path: Path) -> None:
    draw, lines = random.Random(7), []
    for number in range(240):
        animal = draw.choice(list(ANIMALS))
        asked = [{"role": "user", "content": f"{number}. Which color has the {animal}?"}]
        lines.append(json.dumps({"messages": [*asked, {"role": "assistant", "content": ANIMALS[animal]}]}))
    path.write_text("\n".join(lines))


@pytest.mark.seconds
def test_100_kb_of_prose_become_a_model_that_answers_in_a_file_for_llamacpp(
    regpt2: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: object) -> str:
        done = regpt2(*command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout + done.stderr

    write_prose(tmp_path / "novel.txt", 100_000)
    run("tokenizer", "train", "--input", "novel.txt", "--vocab-size", 320, "--out", "own.json")
    said = run("prepare", "text_files", "--input", "novel.txt", "--tokenizer", "own.json", "--out", "data/mine")
    assert "Traceback" not in said

    shape = ("--model.vocab-size", 320, "--model.n-layer", 2, "--model.n-embd", 64, "--model.block-size", 64)
    said = run("train", "own_text", "--data", "data/mine", *shape, "--batch.seq-len", 64, "--max-steps", 20, *SMALL)
    assert "epochs are 20 updates" in said and "dropout 0.2" in said
    run("convert", "runs/own_text", "base", "--to", "huggingface")  # as a model of somebody else would come

    said = run(
        *("train", "finetune", "--init", "base", "--data", "data/mine", "--run", "runs/mine", "--optim.lr", "3e-3"),
        *(
            "--max-epochs",
            5,
            "--batch.batch-tokens",
            2048,
            "--batch.micro-batch",
            32,
            "--evals.val-tokens",
            2048,
            *SMALL,
        ),
    )
    assert "untrained model" not in said, "its first loss is that of the model that it began from"
    assert "reads the" in said and "times. Beyond 4 times repeated text" in said  # before the first update
    losses = [event["loss"] for event in read_events(tmp_path / "runs/mine/metrics.jsonl") if event["event"] == "eval"]
    assert losses[0] > min(losses) + 0.3, "step 0 is the model that it began from"
    assert "The" in run("sample", "runs/mine/checkpoints/best", "The fox", "--temperature", 0, "--max-new-tokens", 8)

    write_conversations(tmp_path / "conversations.jsonl")
    run("prepare", "chat", "--input", "conversations.jsonl", "--tokenizer", "own.json", "--out", "data/chat")
    refused = regpt2("chat", "runs/mine", "--device", "cpu")
    assert refused.returncode == 2 and "train chat" in refused.stderr
    run(
        *("train", "chat", "--init", "runs/mine/checkpoints/best", "--data", "data/chat", "--run", "runs/chat"),
        *("--max-epochs", 24, "--batch.batch-tokens", 1024, "--batch.micro-batch", 16, "--optim.lr", "3e-3", *SMALL),
        *("--evals.val-tokens", 1024, "--eval-every", 60),
    )
    run("convert", "runs/chat", "chat.gguf", "--to", "gguf")  # compared with llama.cpp where that is installed
    for model in ("runs/chat", "chat.gguf"):
        monkeypatch.setattr(
            sys, "stdin", io.StringIO("".join(f"999. Which color has the {one}?\n/new\n" for one in ANIMALS))
        )
        answers = regpt2("chat", model, "--temperature", 0, "--device", "cpu")
        assert answers.returncode == 0, answers.stderr
        assert answers.stdout.split() == list(ANIMALS.values())
    run("verify", "runs/chat")
    run("report", "runs/chat")
    assert "runs/mine/checkpoints/best" in (tmp_path / "runs/chat/report.html").read_text()
