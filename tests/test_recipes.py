"""Every shipped recipe loads, says what it should at its head, and describes the model that it names."""

import dataclasses

import pytest
import torch

from regpt2.config import RECIPES, find_recipe, load_recipe, read_toml, recipe_head, recipe_names, to_toml
from regpt2.model.gpt import GPT

PARAMETERS = {  # by hand: V C + T C + L (12 C^2 + 13 C) + 2 C
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "overfit_one_batch": 124_439_808,
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_round_trips(name: str, tmp_path: object) -> None:
    config = load_recipe(name)
    assert config.run == f"runs/{name}"
    assert config.batch.grad_accum_steps(1) >= 1
    from pathlib import Path

    again = Path(str(tmp_path)) / "config.toml"
    again.write_text(to_toml(config))
    assert read_toml(again) == config


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_states_command_hardware_time_and_result(name: str) -> None:
    head = recipe_head(find_recipe(name))
    for word in ("command:", "hardware:", "time:", "result:"):
        assert word in head, f"{name} does not state its {word}"
    assert len(head.splitlines()[0]) <= 100


@pytest.mark.parametrize(("name", "n_params"), PARAMETERS.items())
def test_a_recipe_builds_the_model_that_it_names(name: str, n_params: int) -> None:
    with torch.device("meta"):
        model = GPT(load_recipe(name).model)
    assert model.n_params() == n_params


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_gpt2_recipes_fit_one_to_eight_gpus(name: str, world_size: int) -> None:
    assert load_recipe(name).batch.grad_accum_steps(world_size) >= 1


def test_the_lectures_run_is_the_lectures() -> None:
    config = load_recipe("gpt2_124m")
    assert config.max_steps * config.batch.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert dataclasses.asdict(config.optim) | {"name": ""} == {
        "name": "", "lr": 6e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "grad_clip": 1.0,
    }  # fmt: skip
    assert (config.schedule.warmup_steps, config.schedule.min_lr_fraction) == (715, 0.1)


def test_recipes_lie_in_the_package() -> None:
    assert RECIPES.is_dir()
    assert "demo" in recipe_names()
