"""Length and dropout by the size of the data: plain numbers, the same at every start; a word where text is repeated."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Run, write_data
from regpt2.base.errors import ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.config.passes import repetition_warnings, settle, settled_line
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import read_toml
from regpt2.data.loader import BatchConfig
from regpt2.data.mixture import Mixture, open_mixture, read_shares
from regpt2.model.architecture import config_class


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return write_data(folder / "a", n_train=20_000), write_data(folder / "b", n_train=10_000, seed=1)


def config(**changes: object) -> RunConfig:
    return replace(RunConfig(batch=BatchConfig(batch_tokens=1024, micro_batch=8, seq_len=128)), **changes)


def opened(*folders: str) -> Mixture:
    alone = len(folders) == 1
    return open_mixture(read_shares(folders[0] if alone else "", () if alone else folders))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(2, 1000, 39), (2.5, 1000, 48), (9, 100, 100), (0.01, 5, 1)]
)
def test_passes_are_updates_and_at_most_max_steps(
    two: tuple[Path, Path], epochs: float, max_steps: int, steps: int
) -> None:
    """39 = 2 x 20,000 / 1,024, rounded down."""
    before = config(max_epochs=epochs, max_steps=max_steps)
    with opened(str(two[0])) as data:
        after = settle(before, data)
        assert (after.max_steps, after.max_epochs) == (steps, 0)
        assert settle(after, data) == after
        line = settled_line(before, after, data)
    assert line.startswith("20,000 tokens of training data: ")
    assert f"are {steps} updates" in line
    assert ("allows more" in line) == (steps == max_steps)


def test_of_a_mixture_the_most_repeated_part_counts(two: tuple[Path, Path]) -> None:
    with opened(f"{two[0]}=0.5", f"{two[1]}=0.5") as data:
        assert settle(config(max_epochs=4), data).max_steps == 4 * 20_000 // 1024
    with opened(f"{two[0]}=0.8", f"{two[1]}=0.2") as data:
        assert settle(config(max_epochs=4), data).max_steps == 4 * 25_000 // 1024


@pytest.mark.parametrize(
    ("n_tokens", "dropout"), [(999_999, 0.2), (1_000_000, 0.1), (9_999_999, 0.1), (10_000_000, 0.0)]
)
def test_dropout_follows_the_size_where_none_is_given(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, n_tokens: int, dropout: float
) -> None:
    with opened(str(two[0])) as data:
        monkeypatch.setattr(data, "n_tokens", n_tokens)
        by_size = config(dropout_by_size=True)
        assert settle(by_size, data).model.dropout == dropout
        assert not settle(by_size, data).dropout_by_size
        assert f"dropout {dropout:g}" in settled_line(by_size, settle(by_size, data), data)
        given = replace(by_size, model=replace(by_size.model, dropout=0.3))
        assert settle(given, data).model.dropout == 0.3
        modern = replace(by_size, model=config_class("modern")(architecture="modern"))
        assert settle(modern, data).model.dropout == dropout
        assert settle(config(), data) == config()
        assert not settled_line(config(), config(), data)


def test_repeated_text_is_named_with_what_can_be_done(two: tuple[Path, Path]) -> None:
    with opened(str(two[0])) as data:
        assert not repetition_warnings(config(max_steps=78), data)  # 3.99 times
        (text,) = repetition_warnings(config(max_steps=98), data)
        assert text.startswith("this run reads the 20,000 tokens of a 5.0 times.")
        steps = int(re.search(r"--max-steps (\d+) for 4 times", text)[1])  # type: ignore[index]
        assert steps == 78
        for mend in ("add text", "--model.dropout", "--stop-after-worse"):
            assert mend in text
        dropped = config(max_steps=98, stop_after_worse=3)
        (text,) = repetition_warnings(replace(dropped, model=replace(dropped.model, dropout=0.1)), data)
        assert "It stops after 3 validations" in text
        assert "dropout" not in text and "--stop-after-worse" not in text
        by_heart = replace(config().batch, one_batch=True)
        assert not repetition_warnings(config(max_steps=98, batch=by_heart), data)
    with opened(f"{two[0]}=0.5", f"{two[1]}=0.5") as data:
        (text,) = repetition_warnings(config(max_steps=98), data)  # 2.5 and 5.0 times
        assert "10,000 tokens of b 5.0 times" in text and "lower its weight" in text
        assert int(re.search(r"--max-steps (\d+)", text)[1]) == 78  # type: ignore[index]


def test_the_numbers_are_recorded_and_a_resume_finds_them_again(
    tmp_path: Path, two: tuple[Path, Path], regpt2: Run
) -> None:
    small = ("--model.vocab-size", 257, "--model.n-layer", 1, "--model.n-embd", 16, "--model.n-head", 2)
    often = ("--model.block-size", 32, "--batch.seq-len", 32, "--batch.micro-batch", 32, "--eval-every", 2)
    command = ("train", "own_text", "--data", two[1], "--run", tmp_path / "run", *small, *often, "--sample-every", 0)
    first = regpt2(*command, "--max-epochs", 0.5, "--evals.val-tokens", 64)
    assert first.returncode == 0, first.stderr
    assert "10,000 tokens of training data: 0.41 epochs are 4 updates; dropout 0.2" in first.stdout
    kept = read_toml(tmp_path / "run/config.toml")
    assert (kept.max_steps, kept.max_epochs, kept.model.dropout, kept.dropout_by_size) == (4, 0, 0.2, False)
    again = regpt2(*command, "--max-epochs", 0.5, "--evals.val-tokens", 64)
    assert again.returncode == 0
    assert "resuming from step 4" in again.stdout and "was" not in again.stderr
    longer = regpt2(*command, "--max-epochs", 4.3, "--max-steps", 42, "--evals.val-tokens", 64, "--save-every", 0)
    assert longer.returncode == 0
    assert "this run reads the 10,000 tokens of b 4.2 times" in longer.stderr
    notes = [event["text"] for event in read_events(tmp_path / "run/metrics.jsonl") if event["event"] == "note"]
    assert any("tokens of b 4.2 times" in text for text in notes)


@pytest.mark.parametrize("epochs", [-1.0, float("inf"), float("nan")])
def test_impossible_passes_are_refused(epochs: float) -> None:
    with pytest.raises(ConfigError, match="max_epochs"):
        config(max_epochs=epochs)


def test_the_recipe_for_fixed_data_has_all_its_parts() -> None:
    recipe = load_recipe("fixed_data")
    assert recipe.max_epochs >= 8 and recipe.batch.order == "documents"
    assert 0.8 <= recipe.optim.weight_decay <= 1.6 and recipe.optim.ema and not recipe.model.dropout
    assert recipe.keep_best and recipe.stop_after_worse and recipe.eval_every


def test_the_recipes_for_own_text_keep_the_best_and_stop() -> None:
    for name in ("own_text", "finetune"):
        recipe = load_recipe(name)
        assert recipe.keep_best and recipe.stop_after_worse and recipe.max_epochs and recipe.sample_every
        assert recipe.schedule.warmup_steps <= 20
