"""Training from existing weights: the same run from every format, exact resumes, all strategies, the right refusals."""

import dataclasses
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import Run, write_data
from rank_processes import spawn
from regpt2 import api
from regpt2.base.record.metrics import read_events
from regpt2.cli import main
from regpt2.config.recipe_files import configured
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.mixture import Mixture
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.shards import open_tokens
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.initial_weights import weights_sha256
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig, ModernGPT
from regpt2.model.weights import gguf, huggingface, llmc, nanogpt, native, safetensors
from regpt2.references.curves import names as curve_names
from regpt2.references.verdict import of_record
from regpt2.run.beginning import begin
from regpt2.run.setup import open_data
from regpt2.sampling.tokenizer import tokenizer_of

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)
RECIPE: dict[str, Any] = {
    "max_steps": 1, "eval_every": 0, "sample_every": 0, "save_every": 2, "device": "cpu", "precision": "fp32",
    "batch": {"batch_tokens": 64, "micro_batch": 2, "seq_len": 16, "order": "sequential"},
    "optim": {"lr": 1e-2}, "schedule": {"kind": "constant", "warmup_steps": 0}, "evals": {"val_tokens": 256},
}  # fmt: skip


def vocabulary(added: tuple[str | None, ...] = ()) -> Vocabulary:
    tokenizer = load_tokenizer("bytes")
    return Vocabulary(tokenizer.name, tokenizer.fingerprint, tokenizer.eot, added=added)


def written(folder: Path, model: LanguageModel, added: tuple[str | None, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    native.write(model, folder, vocabulary(added))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and no step of training."""
    return written(tmp_path_factory.mktemp("source"), GPT(SHAPE, seed=5))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny", n_train=4000, n_val=600)


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train by RECIPE with changes; returns the run folder."""

    def run(init: object, name: str = "run", **options: Any) -> Path:
        folder = tmp_path / name
        api.train(RECIPE, init=str(init), run=folder, data=data, **options)
        return folder

    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in every if event["event"] == kind]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(run) / "model.safetensors")


def bits(run: Path) -> dict[str, bytes]:
    """Weights, moments and description of the newest checkpoint."""
    names = ("model.safetensors", "optimizer.safetensors", "config.json")
    return {name: (newest(run) / name).read_bytes() for name in names}


def test_the_first_update_is_that_of_transformers_and_torch(
    data: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=257, **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    run = trained(tmp_path / "theirs", eval_every=1, **{"optim.eps": 1e-4})  # so that no gradient of zero counts

    def windows(split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        with open_tokens(data, split) as tokens:
            rows = np.stack([tokens.read(16 * at, 17) for at in range(n)]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def loss(split: str, n: int) -> torch.Tensor:
        x, y = windows(split, n)
        found: torch.Tensor = nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        return found

    with torch.no_grad():
        before = float(loss("val", 256 // 16))
    assert events(run, "eval")[0]["step"] == 0
    assert events(run, "eval")[0]["loss"] == pytest.approx(before, rel=1e-6)  # fp32, summed in another order
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    loss("train", 4).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    adamw.step()
    theirs.save_pretrained(tmp_path / "after")
    expected, got = load_model(tmp_path / "after").model, load_model(run).model
    for (name, p), q in zip(expected.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


FORMATS: dict[str, tuple[Any, str]] = {  # where each writes: into a folder, or one file
    "huggingface": (huggingface, ""),
    "llmc": (llmc, ""),
    "gguf": (gguf, "model.gguf"),
    "nanogpt": (nanogpt, "ckpt.pt"),
    "safetensors": (safetensors, "model.safetensors"),
}


@pytest.fixture(scope="module")
def from_source(source: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one update from the native folder."""
    run = tmp_path_factory.mktemp("native") / "run"
    api.train(RECIPE, init=source, run=run, data=data)
    return run


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_is_the_same_bits_from_every_format_of_the_same_weights(
    name: str, source: Path, from_source: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    (tmp_path / "source").mkdir()
    entry, file = FORMATS[name]
    place = tmp_path / "source" / file
    entry.write(GPT(SHAPE, seed=5), place, vocabulary())
    run = trained(place)
    (event,), (expected,) = events(run, "run"), events(from_source, "run")
    assert event["init_sha256"] == expected["init_sha256"] == weights_sha256(GPT(SHAPE, seed=5))
    assert "init_step" not in event
    assert bits(run) == bits(from_source)


def test_a_run_or_a_checkpoint_of_it_is_a_source_whose_step_is_recorded(
    source: Path, from_source: Path, trained: Callable[..., Path]
) -> None:
    for place in (from_source, newest(from_source)):
        run = trained(place, name=place.name)
        (event,) = events(run, "run")
        assert (event["init_source"], event["init_step"]) == (str(place), 1)
        assert event["init_sha256"] == weights_sha256(load_model(from_source).model)
        assert event["config"]["init"] == str(place)
        assert events(run, "train")[0]["step"] == 1  # a fresh schedule
    assert not torch.equal(weights(run)["wte.weight"], weights(from_source)["wte.weight"])


def test_an_interrupted_run_equals_an_uninterrupted_one_though_the_source_is_gone(
    source: Path, tmp_path: Path, trained: Callable[..., Path], regpt2: Run
) -> None:
    options: dict[str, Any] = {"model": {"block_size": 24, "dropout": 0.1}}
    whole = trained(source, max_steps=4, **options)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    half = trained(moved, name="half", max_steps=2, **options)
    shutil.rmtree(moved)
    half = trained(moved, name="half", max_steps=4, **options)
    assert bits(half) == bits(whole)
    first, second = events(half, "run")
    for key in ("init_source", "init_sha256"):
        assert first[key] == second[key]
    # Its own config.toml is a recipe that resumes it, and from which it starts anew.
    assert regpt2("train", half / "config.toml", "--max-steps", 5).returncode == 0
    assert regpt2("verify", half).returncode == 0
    page = api.report(half)[0].read_text()
    assert first["init_sha256"] in page and "Began from" in page
    api.train(whole / "config.toml", run=tmp_path / "again")
    assert bits(tmp_path / "again") == bits(whole)


def test_a_resume_with_another_source_is_refused(
    source: Path, from_source: Path, data: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    run = trained(source)
    said = r"init was '.+' in .*run and is '{}' now.*does not read that model again"
    with pytest.raises(api.ConfigError, match=said.format(from_source)):
        trained(from_source, max_steps=2)
    with pytest.raises(api.ConfigError, match=said.format("")):
        api.train(run / "config.toml", init="", max_steps=2)
    api.train(RECIPE, model=dataclasses.asdict(SHAPE), run=tmp_path / "plain", data=data)
    with pytest.raises(api.ConfigError, match=r"init was '' in .*plain and is '.+' now"):
        trained(source, name="plain", max_steps=2)


def test_data_with_more_tokens_gives_the_model_rows_that_are_the_mean_of_its_tokens(
    source: Path, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    added = ("<|im_start|>", "<|im_end|>")
    monkeypatch.setattr(Mixture, "tokenizer", lambda _: AddedTokens(load_tokenizer("bytes"), added))
    config = configured(RECIPE, {"init": str(source), "run": str(tmp_path / "run"), "data": str(data)})
    with open_data(config) as opened:
        start = begin(config, opened, is_main=True)
    old = GPT(SHAPE, seed=5).wte.weight[:257].detach()
    assert start.config.model.vocab_size == 259 and start.weights is not None
    rows = start.weights["wte.weight"]
    assert torch.equal(rows[:257], old)
    np.testing.assert_allclose(rows[257:], np.tile(old.numpy().mean(axis=0, dtype=np.float64), (2, 1)), rtol=1e-6)
    trained(source, max_steps=2, model={"vocab_size": 257})
    run = trained(source, max_steps=4, model={"vocab_size": 257})  # the same words resume it, with 259 tokens
    loaded = load_model(run)
    assert loaded.tokenizer is not None and loaded.tokenizer.added == added
    assert tokenizer_of(loaded).encode("a<|im_end|>") == [ord("a"), 258]
    with pytest.raises(api.ConfigError, match=r"model.vocab_size = 300, but .* has 257, and 259 with the tokens"):
        trained(source, name="other", model={"vocab_size": 300})


def test_rows_without_text_are_kept_and_data_may_lack_tokens_of_the_model(
    tmp_path: Path, trained: Callable[..., Path]
) -> None:
    added = ("<|user|>", None, None)
    padded = GPT(dataclasses.replace(SHAPE, vocab_size=260), seed=5)
    run = trained(written(tmp_path / "padded", padded, added), sample_every=1, sample={"prompt": "a", "n": 1})
    loaded = load_model(run)
    assert loaded.tokenizer is not None and loaded.tokenizer.added == added
    before, after = padded.wte.weight[257:260], loaded.model.get_parameter("wte.weight")[257:260]
    torch.testing.assert_close(after, before * (1 - 1e-2 * 0.1), atol=1.01e-2, rtol=0)  # one update of lr
    assert tokenizer_of(loaded).encode("<|user|>") == [257]
    assert events(run, "sample")


def test_fewer_positions_are_the_first_ones(source: Path, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(source, model={"block_size": 16}, optim={"lr": 1e-9})
    was = GPT(SHAPE, seed=5).wpe.weight.detach()
    torch.testing.assert_close(weights(run)["wpe.weight"], was[:16], atol=1e-8, rtol=0)
    assert load_model(run).model.context_size == 16
    assert load_model(trained(source, name="whole")).model.context_size == 32  # as the source was trained
    modern = ModernGPT(ModernConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257), seed=5)
    modern.trained_seq_len = 8
    place = written(tmp_path / "modern", modern)
    run = trained(place, name="of_modern", model={"block_size": 24})
    loaded = load_model(run).model
    assert (loaded.config.architecture, loaded.config.block_size, loaded.context_size) == ("modern", 24, 16)
    assert "positions 16 to 23" in events(run, "note")[0]["text"]


def test_no_curve_of_a_run_from_nothing_judges_it(source: Path, trained: Callable[..., Path]) -> None:
    run = trained(source, eval_every=1)
    assert len(events(run, "eval")) == 2 and not events(run, "verdict")
    assert of_record(read_events(run / "metrics.jsonl")) is None
    named = trained(source, name="named", eval_every=1, **{"evals.verdict": curve_names()[0]})
    assert of_record(read_events(named / "metrics.jsonl"), curve_names()[0]) is not None


def _on_two_ranks(number: int, ports: list[int], commands: list[list[str]]) -> None:
    """Processes 0 and 1 are the ranks of the first command, 2 and 3 those of the second."""
    at, rank = divmod(number, 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": ports[at]}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.exit(main(commands[at]))


def unused_ports(n: int) -> list[int]:
    with ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def test_two_ranks_begin_from_the_same_weights_with_every_strategy(
    source: Path, data: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    alone = trained(source, parallel={"strategy": "ordered"}, max_steps=2)
    recipe = alone / "config.toml"
    runs = {strategy: tmp_path / strategy for strategy in ("ordered", "ddp", "fsdp")}
    commands = [
        ["train", str(recipe), "--run", str(run), "--parallel.strategy", strategy] for strategy, run in runs.items()
    ]
    spawn(_on_two_ranks, (unused_ports(3), commands), 6)
    assert bits(runs["ordered"]) == bits(alone)
    for strategy in ("ddp", "fsdp"):
        for name, expected in weights(alone).items():
            torch.testing.assert_close(weights(runs[strategy])[name], expected, atol=1e-3, rtol=0)  # 2 updates of 1e-2
        assert events(runs[strategy], "run")[0]["init_sha256"] == events(alone, "run")[0]["init_sha256"]
