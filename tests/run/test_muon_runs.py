"""Runs with Muon by the real command: killed and resumed to the bit; begun on one rank, continued on two, then one."""

import shutil
import tomllib
from pathlib import Path

import pytest
from test_train import command, losses, run_train, state_of, torchrun, wait_for_step

from conftest import TINY_RECIPE
from regpt2.base.errors import ConfigError
from regpt2.base.record.metrics import read_events
from regpt2.config.recipe_files import load_recipe
from regpt2.config.toml_file import to_toml
from warm_processes import Python


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    quiet = TINY_RECIPE.replace("eval_every = 6", "eval_every = 0").replace("sample_every = 12", "sample_every = 0")
    constant = quiet.replace("[schedule]", '[schedule]\nkind = "constant"')  # the same for any max_steps
    path.write_text(constant.replace("[optim]", '[optim]\nname = "muon"\nembedding_lr = 0.01\nmuon.ns_steps = 6'))
    return path


def test_a_config_with_a_table_in_a_table_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(str(recipe))
    assert config.optim.muon.ns_steps == 6
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert tomllib.loads(again.read_text())["optim"]["muon"]["ns_coefficients"] == [3.4445, -4.775, 2.0315]
    assert load_recipe(str(again)) == config


@pytest.mark.slow
def test_kill_9_and_a_change_of_ranks(recipe: Path, tmp_path: Path, tiny_data: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_train(recipe, tiny_data, straight)
    assert losses(straight)[12] < losses(straight)[1] - 0.3

    endless = command(recipe, tiny_data, killed, "--max-steps", "100000", "--keep-checkpoints", "0")
    process = Python(*endless)
    wait_for_step(killed, 6, process)
    process.kill()
    process.communicate(timeout=60)
    assert max(losses(killed)) < 100_000
    for folder in sorted((killed / "checkpoints").iterdir())[1:]:  # go on from step 4, however far it came
        shutil.rmtree(folder)
    run_train(recipe, tiny_data, killed)
    assert state_of(killed) == state_of(straight)
    assert losses(killed) == losses(straight)

    elastic = tmp_path / "elastic"
    run_train(recipe, tiny_data, elastic, max_steps=4)
    torchrun(2, recipe, tiny_data, elastic, "--max-steps", "8")
    run_train(recipe, tiny_data, elastic)
    # The same sums in another order, 1e-7 each, grow through the iteration's slope of up to 500
    assert all(losses(elastic)[step] == pytest.approx(loss, abs=1e-3) for step, loss in losses(straight).items())


def test_going_on_with_another_optimizer_is_refused_and_unused_options_are_noted(
    recipe: Path, tmp_path: Path, tiny_data: Path
) -> None:
    run, text = tmp_path / "run", recipe.read_text()
    run_train(recipe, tiny_data, run, max_steps=4)
    recipe.write_text(text.replace('name = "muon"', 'name = "lion"'))
    with pytest.raises(ConfigError, match=r"optim\.name was muon .* and is lion now"):
        run_train(recipe, tiny_data, run)
    run_train(recipe, tiny_data, tmp_path / "other", max_steps=4)
    notes = [e["text"] for e in read_events(tmp_path / "other" / "metrics.jsonl") if e["event"] == "note"]
    assert "optim.muon has no effect with optim.name = 'lion'." in notes
