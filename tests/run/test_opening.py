"""The start of a run: what is refused before its first update, and nothing of an earlier start that gets into it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RECIPE, write_data
from regpt2.base.errors import ConfigError, DataError
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.run import intervals as observe_module
from regpt2.run.loop import train

MIXED = 'mix = ["{0}=0.5", "{1}=0.5"]\n'


def configured(folder: Path, recipe: str, **changes: Any) -> RunConfig:
    (folder / "tiny.toml").write_text(recipe)
    return dataclasses.replace(load_recipe(str(folder / "tiny.toml")), run=str(folder / "run"), **changes)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.seconds
@pytest.mark.parametrize("what", ["seed", "data"])
def test_a_run_started_afresh_in_a_used_folder_is_that_run_alone(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, what: str
) -> None:
    """The first run saves no checkpoint; the second has another seed, or other data."""
    run = tmp_path / "run"
    config = dataclasses.replace(load_recipe(str(tiny_recipe)), data=str(tiny_data), run=str(run))
    train(dataclasses.replace(config, save_every=0))
    for name in ("report.html", "report.md", "report.png"):
        (run / name).write_text("the page of the first run")
    changes = {"seed": 7} if what == "seed" else {"data": str(write_data(tmp_path / "other", seed=5))}
    again = dataclasses.replace(config, **changes)
    train(again)
    train(dataclasses.replace(again, run=str(tmp_path / "new")))
    untimed = ("eval", "step", "loss", "perplexity", "bits_per_byte", "tokens", "texts", "skipped", "data")
    for kind in ("train", "eval", "sample"):
        kept, new = (
            [{key: event[key] for key in untimed if key in event} for event in events(folder, kind)]
            for folder in (run, tmp_path / "new")
        )
        assert kept == new, kind
    assert len(events(run, "run")) == len(events(run, "end")) == 1
    assert not list(run.glob("report.*"))
    (note,) = [event["text"] for event in events(run, "note") if "earlier start" in event["text"]]
    assert "left no checkpoint: the record of its 12 updates is removed" in note
    assert "seed = 7" in (run / "config.toml").read_text() or what == "data"


def test_notes_of_earlier_starts_stay(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"event": "run", "step": 0},
        {"event": "eval", "step": 0, "eval": "val_loss", "loss": 9.0},
        {"event": "verdict", "step": 0, "text": "of another run"},
        {"event": "sample", "step": 0, "texts": ["of another run"]},
        {"event": "train", "step": 1, "loss": 9.0},
        {"event": "note", "step": 1, "text": "what happened, happened"},
        {"event": "end", "step": 0, "reason": "failed"},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(dataclasses.replace(load_recipe(str(tiny_recipe)), data=str(tiny_data), run=str(run), max_steps=2))
    record = (run / "metrics.jsonl").read_text()
    assert "what happened, happened" in record
    assert "of another run" not in record and '"loss":9.0' not in record and "failed" not in record
    assert events(run, "eval")[0]["step"] == 0


def test_a_validation_split_shorter_than_a_window_is_refused_before_the_first_update(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", n_val=32)  # seq_len is 32, and the last target is one more
    config = configured(tmp_path, TINY_RECIPE, data=str(data))
    with pytest.raises(
        DataError, match=r"data: the validation split has 32 tokens, expected at least 33.*--eval-every"
    ):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(dataclasses.replace(config, eval_every=0, max_steps=1))
    enough = dataclasses.replace(config, data=str(write_data(tmp_path / "more", n_val=33)), run=str(tmp_path / "2"))
    train(dataclasses.replace(enough, max_steps=1))
    assert [event["tokens"] for event in events(tmp_path / "2", "eval")] == [32, 32]


def test_of_a_mixture_every_validation_split_has_to_hold_a_window(tmp_path: Path, tiny_data: Path) -> None:
    small = write_data(tmp_path / "small", n_val=20)
    config = configured(tmp_path, MIXED.format(tiny_data, small) + TINY_RECIPE)
    with pytest.raises(DataError, match=r"small: the validation split has 20 tokens, expected at least 33"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("seq_len", "longest"), [(32, 31), (16, 15)])
def test_a_prompt_that_leaves_no_room_is_refused_before_the_first_update(
    tmp_path: Path, tiny_data: Path, seq_len: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TINY_RECIPE.replace("seq_len = 32", f"seq_len = {seq_len}")
    too_long = recipe.replace('prompt = "a"', f'prompt = "{"a" * (longest + 1)}"')
    with pytest.raises(ConfigError, match=rf"sample.prompt has {longest + 1} tokens, expected at most {longest}: .*32"):
        train(configured(tmp_path, too_long, data=str(tiny_data)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(configured(tmp_path, too_long, data=str(tiny_data), sample_every=0, max_steps=1, save_every=0))
    generate, asked = observe_module.generate, list[int]()

    def looking(model: Any, ids: Any, max_new_tokens: int, **options: Any) -> Any:
        asked.append(max_new_tokens)
        return generate(model, ids, max_new_tokens, **options)

    monkeypatch.setattr(observe_module, "generate", looking)
    fits = recipe.replace('prompt = "a"', f'prompt = "{"a" * longest}"')
    train(configured(tmp_path, fits, data=str(tiny_data), max_steps=1))
    assert asked == [1], "of 8 new tokens there is room for one"
    assert len(events(tmp_path / "run", "sample")) == 1
