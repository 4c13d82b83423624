"""Conversations all the way: a model learns to answer; what it is trained and scored on are the answers alone."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import write_data
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.config.toml_file import read_toml
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import SPECIAL, Message, prompt_ids, special_ids
from regpt2.data.loader import Loader
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.shards import open_tokens
from regpt2.model.architecture import build_model
from regpt2.model.files.load import load_model
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.sampling.generate import generate
from regpt2.sampling.tokenizer import tokenizer_of

pytestmark = pytest.mark.seconds  # all of them together

LETTERS = "abcd"
T = 64
TOKENIZER = AddedTokens(load_tokenizer("bytes"), SPECIAL)
RECIPE = f"""
max_steps = 100
log_every = 20
eval_every = 100
sample_every = 0
save_every = 100
device = "cpu"
precision = "fp32"

[model]
architecture = "modern"
n_layer = 1
n_head = 2
n_embd = 32
block_size = {T}
vocab_size = 259
document_mask = true
end_of_text = 256

[batch]
batch_tokens = 512
micro_batch = 8
seq_len = {T}

[optim]
lr = 1e-2

[schedule]
kind = "stable_linear"
warmup_steps = 10
decay_fraction = 0.5

[evals]
val_tokens = 600
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in which the answer is the letter after those of the question, their data, and a run on it."""
    folder, rng = tmp_path_factory.mktemp("chat"), random.Random(0)
    lines = []
    for _ in range(500):
        n = rng.randrange(3)
        turns = {"user": LETTERS[n] * rng.choice([6, 7, 8, 10, 11, 12]), "assistant": LETTERS[n + 1]}
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns.items()]}))
    (folder / "talk.jsonl").write_text("\n".join(lines))
    (folder / "chat.toml").write_text(RECIPE)
    prepared = ["prepare", "chat", "--input", str(folder / "talk.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
    assert main([*prepared, "--val-tokens", "1000", "--out", str(folder / "data")]) == 0
    assert main(train(folder, "run")) == 0
    return folder


def train(folder: Path, run: str, *options: str, data: str = "data") -> list[str]:
    given = ["--mix", *options] if data == "" else ["--data", str(folder / data), *options]
    return ["train", str(folder / "chat.toml"), "--run", str(folder / run), *given]


def answer(model: LanguageModel, question: str) -> str:
    """By greedy decoding, from the prompt that the template makes."""
    prompt, special = prompt_ids([Message("user", question)], TOKENIZER), special_ids(TOKENIZER)
    assert special is not None
    ids = generate(model, torch.tensor([prompt]), 4, temperature=0, stop_id=special[1])
    return TOKENIZER.decode(ids[0, len(prompt) :].tolist())


def test_a_model_learns_to_answer_what_it_cannot_before(place: Path) -> None:
    """Nine letters are in no conversation of its training."""
    model = load_model(str(place / "run"), device=torch.device("cpu"), dtype=torch.float32).model
    untrained = build_model(model.config, seed=1337)
    right = [f"{after}<|im_end|>" for after in LETTERS[1:]]
    assert [answer(model, 9 * letter) for letter in LETTERS[:-1]] == right
    assert not any(answer(untrained, 9 * letter) == one for letter, one in zip(LETTERS[:-1], right, strict=True))


def test_the_validation_loss_is_that_of_the_answers_alone(place: Path) -> None:
    """Against torch's cross entropy of the whole logits, tokens and mask from the files themselves."""
    events = list(read_events(place / "run" / "metrics.jsonl"))
    (final,) = [event for event in events if event["event"] == "eval" and event["step"] == 100]
    model = load_model(str(place / "run"), device=torch.device("cpu"), dtype=torch.float32).model
    ids = np.fromfile(place / "data" / "chat_val_000000.bin", dtype="<u2", offset=1024)
    mask = np.fromfile(place / "data" / "chat_val_000000.mask", dtype=np.uint8)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for start in range(0, 600 // T * T, T):
        window = torch.from_numpy(ids[start : start + T + 1].astype(np.int64))
        losses = F.cross_entropy(model(window[None, :-1])[0].float(), window[1:], reduction="none")
        counts = torch.from_numpy(mask[start + 1 : start + T + 1].astype(bool))
        nats, n_tokens = nats + float(losses[counts].sum().detach()), n_tokens + int(counts.sum())
        n_bytes += int((window[1:][counts] < 256).sum())
    assert 0 < n_tokens < 100 and final["tokens"] == n_tokens
    assert final["loss"] == pytest.approx(nats / n_tokens, rel=1e-4)
    assert final["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)
    assert final["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert next(event for event in events if event["event"] == "run")["baselines"] == {}


def test_a_checkpoint_names_the_added_tokens(place: Path) -> None:
    loaded = load_model(str(place / "run"), device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = tokenizer_of(loaded)
    assert special_ids(tokenizer) == (257, 258) and tokenizer.eot == 256
    assert tokenizer.encode("a<|im_end|>") == [97, 258]


def test_a_resumed_run_equals_an_uninterrupted_one(place: Path) -> None:
    options = ["--max-steps", "6", "--save-every", "3", "--eval-every", "0"]
    assert main(train(place, "whole", *options)) == 0
    shutil.copytree(place / "whole", place / "stopped")
    shutil.rmtree(place / "stopped" / "checkpoints" / "step-00000006")
    assert main(train(place, "stopped", *options)) == 0
    one, other = (place / run / "checkpoints" / "step-00000006" / "model.safetensors" for run in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def test_a_mixture_of_conversations_and_plain_text_trains(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_data(place / "plain")
    options = ["--max-steps", "2", "--save-every", "0", "--eval-every", "2"]
    for first in (0.8, 0.2):  # whichever of them comes first
        shares = [f"{place / 'data'}={first}", f"{plain}={1 - first}"]
        assert main(train(place, f"mix-{first}", *shares, *options, data="")) == 0
    events = list(read_events(place / "mix-0.2" / "metrics.jsonl"))
    (final,) = [event for event in events if event["event"] == "eval" and event["step"] == 2]
    assert final["tokens"] > 600 // T * T, "all tokens of the plain text, and the answers'"
    capsys.readouterr()
    assert main(train(place, "other", "--model.vocab-size", "257")) == 2
    assert "of 259 tokens; set --model.vocab-size 259" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(place, "x", "--model.end-of-text", "-1")) == 2
    error = capsys.readouterr().err
    assert "documents of" in error and "set --model.end-of-text 256" in error and error.count("\n") == 1
    assert main(train(place, "x", "--model.end-of-text", "300")) == 2
    assert "model.end_of_text = 300 must be an id below" in capsys.readouterr().err
    damaged = place / "damaged"
    shutil.copytree(place / "data", damaged)
    mask = damaged / "chat_train_000000.mask"
    mask.write_bytes(mask.read_bytes()[:-1] + b"\1")
    assert main(train(place, "x", data="damaged")) == 1
    error = capsys.readouterr().err
    assert "chat_train_000000.mask has SHA-256" in error and error.count("\n") == 1
    assert not (place / "x").exists() or not any((place / "x").glob("*.jsonl"))


@pytest.mark.parametrize(("end_of_text", "apart"), [(256, True), (-1, False)])
def test_a_packed_conversation_sees_only_itself(end_of_text: int, apart: bool) -> None:
    config = ModernConfig(
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=32,
        vocab_size=259,
        zero_init=False,
        document_mask=True,
        end_of_text=end_of_text,
    )
    model = ModernGPT(config, seed=1).eval()
    ids = torch.tensor([[256, 257, 97, 98, 99, 256, 257, 99, 100, 258]])
    other = ids.clone()
    other[0, 2:4] = 50
    with torch.no_grad():
        first, second = model(ids)[0, 5:], model(other)[0, 5:]
    assert torch.equal(first, second) is apart


def test_the_recorded_loss_is_the_mean_over_all_answers_of_an_update(place: Path) -> None:
    """Micro-batches of one window, with unequal numbers of answers; against torch's cross entropy over all of them."""
    options = ["--max-steps", "2", "--save-every", "0", "--eval-every", "0", "--log-every", "1"]
    assert main(train(place, "first", *options, "--batch.micro-batch", "1", "--model.no-zero-init")) == 0
    recorded = next(event for event in read_events(place / "first" / "metrics.jsonl") if event["event"] == "train")
    config = read_toml(place / "first" / "config.toml")
    with open_tokens(place / "data", "train") as tokens:
        batch = Loader(tokens, config.batch, seed=config.seed).batch(1)
    inputs, targets = (torch.from_numpy(np.concatenate(each)) for each in zip(*batch.micro_batches, strict=True))
    logits = build_model(config.model, seed=config.seed)(inputs).flatten(0, 1).float()
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    counts = (targets >= 0).sum(dim=1)
    assert len(set(counts.tolist())) > 1 and int(counts.sum()) < targets.numel() // 8
    assert recorded["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
