"""Updates that a run may not make, in real runs: overflows of a scaled loss and spikes; the scale itself, and a resume.

The loss scale is asked for on a CPU, in fp32 or in its fp16. An overflow is made as in fp16: where the gradient of the
loss, which is the scale, is above a limit, it becomes infinite.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import TINY_RECIPE, write_tokens
from regpt2.base.device import Compute
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.model.gpt import GPT
from regpt2.run.loop import train

RECIPE = (
    TINY_RECIPE.replace("eval_every = 6", "eval_every = 0\nkeep_checkpoints = 0")
    .replace("sample_every = 12", "sample_every = 0")
    .replace("save_every = 4", "save_every = 1")
    .replace("batch_tokens = 256", "batch_tokens = 64")  # one micro-batch in each update
    .replace("[schedule]", '[schedule]\nkind = "constant"')  # the same for any max_steps
)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in fp16."""
    monkeypatch.setattr(Compute, "needs_scaler", property(lambda _: True))


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The largest scale that does not overflow, to be set by a test."""
    limit, forward = [math.inf], GPT.forward

    def overflowing(self: GPT, *arguments: Any, **named: Any) -> Tensor:
        loss = forward(self, *arguments, **named)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: torch.where(gradient > limit[0], math.inf, gradient))
        return loss

    monkeypatch.setattr(GPT, "forward", overflowing)
    return limit


def run_to(step: int, data: Path, run: Path, recipe: str = RECIPE) -> None:
    path = run.with_suffix(".toml")
    path.write_text(recipe)
    train(dataclasses.replace(load_recipe(str(path)), data=str(data), run=str(run), max_steps=step))


def updates(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == "train"]


def skipped(run: Path) -> list[int]:
    return [event["step"] for event in updates(run) if event["skipped"]]


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def scale_at(run: Path, step: int) -> dict[str, Any]:
    scale: dict[str, Any] = json.loads((folder_of(run, step) / "state.json").read_text())["loss_scale"]
    return scale


def set_scale(run: Path, step: int, scale: dict[str, Any]) -> None:
    """Change a checkpoint, and what vouches for it."""
    folder = folder_of(run, step)
    state = json.loads((folder / "state.json").read_text())
    text = json.dumps({**state, "loss_scale": scale}).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def weights(run: Path, step: int) -> bytes:
    return (folder_of(run, step) / "model.safetensors").read_bytes()


def test_an_overflow_halves_the_scale_and_begins_the_count_anew_also_after_a_resume(
    scaled: None, overflow: list[float], tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overflow[0] = 20_000.0
    run_to(6, tiny_data, run)
    assert skipped(run) == [1, 2]  # at 65,536 and 32,768; more than guard.max_skipped would allow below
    assert [scale_at(run, step) for step in (1, 2, 3, 6)] == [
        {"factor": 32_768.0, "good_steps": 0},
        {"factor": 16_384.0, "good_steps": 0},
        {"factor": 16_384.0, "good_steps": 1},
        {"factor": 16_384.0, "good_steps": 4},
    ]
    assert weights(run, 1) == weights(run, 2) != weights(run, 3)
    run_to(8, tiny_data, run)  # as it was, and counted on
    assert scale_at(run, 8) == {"factor": 16_384.0, "good_steps": 6}
    overflow[0] = 1_000.0
    run_to(14, tiny_data, run)
    assert skipped(run) == [1, 2, 9, 10, 11, 12, 13]
    assert scale_at(run, 13) == {"factor": 512.0, "good_steps": 0}
    assert scale_at(run, 14) == {"factor": 512.0, "good_steps": 1}


def test_the_scale_doubles_after_2000_good_updates_counted_over_a_resume(
    scaled: None, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_to(2, tiny_data, run)
    set_scale(run, 2, {"factor": 512.0, "good_steps": 1997})
    run_to(6, tiny_data, run)
    assert [scale_at(run, step) for step in (4, 5, 6)] == [
        {"factor": 512.0, "good_steps": 1999},
        {"factor": 1024.0, "good_steps": 2000},
        {"factor": 1024.0, "good_steps": 2001},
    ]


def test_a_scale_changes_neither_losses_nor_norms_nor_weights(
    tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In fp32, which does not underflow here: a power of two scales without rounding."""
    run_to(4, tiny_data, tmp_path / "plain")
    request.getfixturevalue("scaled")
    run_to(4, tiny_data, tmp_path / "scaled")
    plain, scaled = updates(tmp_path / "plain"), updates(tmp_path / "scaled")
    for key in ("loss", "grad_norm", "lr"):
        assert [e[key] for e in scaled] == pytest.approx([e[key] for e in plain], rel=1e-6), key
    assert scale_at(tmp_path / "scaled", 4) == {"factor": 65_536.0, "good_steps": 4}
    assert scale_at(tmp_path / "plain", 4) is None


def test_a_run_in_fp16_follows_the_one_in_fp32(
    scaled: None, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to(12, tiny_data, tmp_path / "fp32")
    monkeypatch.setattr(Compute, "dtype", property(lambda _: torch.float16))
    run_to(12, tiny_data, tmp_path / "fp16")
    half, single = ([e["loss"] for e in updates(tmp_path / name)] for name in ("fp16", "fp32"))
    assert single[0] - single[-1] > 0.3
    # 11 bits of each number: 5e-4 of its size, and a mean over 64 tokens does not cancel all of it
    assert half == pytest.approx(single, abs=0.01)
    assert half != single
    assert not skipped(tmp_path / "fp16")


@pytest.fixture(scope="module")
def with_a_spike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of one letter, but for the windows of update 15, which hold anything."""
    ids = np.full(64 * 18 + 1, 97, dtype=np.uint16)
    ids[14 * 64 + 1 : 15 * 64 + 1] = np.random.default_rng(0).integers(0, 256, 64)
    return write_tokens(tmp_path_factory.mktemp("data") / "spike", [ids], ids[:100])


@pytest.mark.parametrize("choice", ["skip", "report", "off"])
def test_a_spike_in_the_data_is_skipped_or_reported_and_leaves_the_scale_alone(
    choice: str, scaled: None, with_a_spike: Path, tmp_path: Path
) -> None:
    recipe = RECIPE.replace("seq_len = 32", 'seq_len = 32\norder = "sequential"').replace("3e-3", "1e-2")
    run = tmp_path / "run"
    run_to(16, with_a_spike, run, f'{recipe}\n[guard]\nspikes = "{choice}"\nwindow = 4\n')
    losses = [event["loss"] for event in updates(run)]
    assert losses[14] > losses[13] + 2, "what is planted is a spike"
    assert skipped(run) == ([15] if choice == "skip" else [])
    notes = [event["text"] for event in read_events(run / "metrics.jsonl") if event["event"] == "note"]
    assert [text.split(":")[0] for text in notes if text.startswith("step")] == (["step 15"] * (choice != "off"))
    assert (weights(run, 15) == weights(run, 14)) == (choice == "skip")
    assert scale_at(run, 16) == {"factor": 65_536.0, "good_steps": 16}
