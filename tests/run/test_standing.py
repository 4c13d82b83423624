"""The verdict while a run goes on: real trainings beside a reference curve that was made of real trainings."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regpt2.base.record.metrics import read_events
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import read_toml
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.shards import write_shard
from regpt2.references import curves
from regpt2.run import intervals
from regpt2.run.loop import train

RECIPE = """
max_steps = 100
eval_every = 20
sample_every = 0
save_every = 0
device = "cpu"
precision = "fp32"
[model]
n_layer = 1
n_head = 2
n_embd = 64
block_size = 32
vocab_size = 257
[batch]
batch_tokens = 2048
micro_batch = 64
seq_len = 32
[optim]
lr = 1e-2
[schedule]
warmup_steps = 30
min_lr_fraction = 0.0
[evals]
val_tokens = 8192
"""
SEEDS_DIFFER = 0.05  # standard deviation over seeds of this recipe, roughly


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of real text: Python's own source."""
    folder = tmp_path_factory.mktemp("data")
    source = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[:1_000_000]
    ids = np.frombuffer(source, dtype=np.uint8).astype(np.uint16)
    parts = {"train": ids[:-20_000], "val": ids[-20_000:]}
    shards = {name: write_shard(folder / f"py_{name}_000000.bin", len(part), [part]) for name, part in parts.items()}
    tokenizer = load_tokenizer("bytes")
    Manifest(
        dataset="python",
        source="",
        revision="",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        options={},
        splits={name: Split(0, shard.tokens, shard.tokens, (shard,)) for name, shard in shards.items()},
        skipped={},
    ).write(folder)
    return folder


def run(folder: Path, text: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train, or go on; the record."""
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(RECIPE)
    config: RunConfig = read_toml(recipe)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        inner = dataclasses.replace(getattr(config, section), **{name: value}) if section else value
        config = dataclasses.replace(config, **{section or name: inner})
    train(dataclasses.replace(config, run=str(folder), data=str(text)))
    return list(read_events(folder / "metrics.jsonl"))


def verdicts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "verdict"]


@pytest.fixture
def own_curve(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reference curve like those that are shipped, made of two seeds."""
    losses = []
    for seed in (1, 2):
        events = run(tmp_path / f"right_{seed}", text, seed=seed, evals__verdict="off")
        assert not verdicts(events)
        losses.append([event["loss"] for event in events if event["event"] == "eval"])
    points = [[20 * n, float(loss), SEEDS_DIFFER] for n, loss in enumerate(np.mean(losses, 0))]
    of = {"name": "two seeds", "dataset": "python", "source": "this test", "batch_tokens": 2048}
    of |= {"val_loss": points, "lr": 1e-2, "warmup_steps": 30, "tokenizer": "bytes"}
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves" / "own.json").write_text(json.dumps(of))
    monkeypatch.setattr(curves, "_FOLDER", tmp_path / "curves")
    curves.load.cache_clear()
    monkeypatch.setattr(curves, "load", curves.load.__wrapped__)
    return "own"


@pytest.mark.seconds
def test_a_run_is_told_where_it_stands_and_why(
    own_curve: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    right = verdicts(run(tmp_path / "right", text, seed=3, evals__verdict=own_curve, save_every=50))
    assert [(event["step"], event["state"]) for event in right] == [(s, "on track") for s in (20, 40, 60, 80, 100)]
    assert right[0]["projected_end"] is None and right[-1]["finished"] and right[-1]["source"] == "this test"
    said = capsys.readouterr().out
    assert said.count("| verdict: on track: ") == 4, "the last one is said at the end"
    assert said.count("\nverdict: on track at the end: ") == 1

    shutil.rmtree(tmp_path / "right" / "checkpoints" / "step-00000100")
    again = verdicts(run(tmp_path / "right", text, seed=3, evals__verdict=own_curve, save_every=50))
    assert again == right, "a resumed run knows what came before"

    hot = verdicts(run(tmp_path / "hot", text, seed=3, evals__verdict=own_curve, optim__lr=0.3))
    assert hot[-1]["state"] == "above"
    assert hot[-1]["checks"][0] == "learning rate: 0.3, the reference has 0.01"


@pytest.mark.seconds
def test_without_a_reference_it_speaks_once_and_a_broken_verdict_costs_nothing(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (last,) = verdicts(run(tmp_path / "alone", tiny_data, max_steps=40))
    assert (last["step"], last["state"]) == (40, "no reference")
    assert capsys.readouterr().out.count("verdict: no reference") == 1

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(intervals, "of_record", broken)
    events = run(tmp_path / "broken", tiny_data, max_steps=40)
    assert events[-1]["reason"] == "finished"
    assert any(event["event"] == "note" and "no verdict at step 20" in event["text"] for event in events)
