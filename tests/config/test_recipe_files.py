"""Every shipped recipe loads, says what it should at its head, and describes the model that it names."""

import pytest
import torch

from regpt2.config.recipe_files import RECIPES, find_recipe, load_recipe, recipe_head, recipe_names
from regpt2.config.toml_file import read_toml, to_toml
from regpt2.model.architecture import build_model
from regpt2.references.curves import N_PARAMS, choose
from regpt2.training.optimizer import OptimConfig

PARAMETERS = {  # by hand: V C + T C + L (12 C^2 + 13 C) + 2 C; modern 2 V C + L (12 C^2 + 2 C) + 2 C
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "overfit_one_batch": 124_439_808,
    "gpt2_124m_fast": 124_439_808,
    "modern_124m": 162_149_376,
    "modern_350m": 404_967_424,
    "modern_124m_long": 275_562_287,  # 5 V C + 12 (12 C^2) - 4 C^2 + 47 scalars
    "small": 3_290_880,
    "modern_small": 3_279_872,
    "finetune": 124_439_808,
    "own_text": 7_242_624,
    "fixed_data": 124_439_808,
}
FOR_GPUS = ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "gpt2_124m_fast", "modern_124m", "modern_350m"]
FOR_GPUS += ["modern_124m_long"]


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
        model = build_model(load_recipe(name).model)
    assert model.n_params() == n_params


@pytest.mark.parametrize("name", FOR_GPUS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_recipe_for_gpus_fits_one_to_eight_of_them(name: str, world_size: int) -> None:
    assert load_recipe(name).batch.grad_accum_steps(world_size) >= 1


def test_the_lectures_run_is_the_lectures() -> None:
    config = load_recipe("gpt2_124m")
    assert config.max_steps * config.batch.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert config.optim == OptimConfig(
        name="adamw", lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, grad_clip=1.0
    )
    assert (config.schedule.warmup_steps, config.schedule.min_lr_fraction) == (715, 0.1)


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("gpt2_124m_fast", "fineweb_gpt2_124m_stable_linear"),
        ("modern_124m", "fineweb_modern_muon_baseline"),
        ("modern_124m_long", "fineweb_modern_long_windows"),
    ],
)
def test_a_recipe_is_what_its_reference_curve_says_of_itself(name: str, curve: str) -> None:
    """The tokens, the schedule, the optimizer: or the verdict would hold a run against what it is not meant to be."""
    config = load_recipe(name)
    of = choose("auto", "fineweb", PARAMETERS[name], config.schedule.kind)
    assert of is not None and of.name == curve
    assert N_PARAMS[of.model] == PARAMETERS[name]
    assert config.max_steps * config.batch.batch_tokens == of.tokens[-1]
    said = {
        "optimizer": config.optim.name,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "warmup_steps": config.schedule.warmup_steps,
        "final_lr_fraction": config.schedule.min_lr_fraction,
        "schedule": config.schedule.kind,
        "decay_fraction": config.schedule.decay_fraction,
    }
    assert {key: said[key] for key in of.recipe if key in said} == {k: v for k, v in of.recipe.items() if k in said}
    assert all(getattr(config.model, ingredient) for ingredient in of.recipe.get("ingredients", ()))


def test_the_small_recipes_are_a_fair_pair() -> None:
    """The same data in the same pieces, a sixth of the tokens; as many parameters, to half a percent."""
    faithful, modern = load_recipe("small"), load_recipe("modern_small")
    for name in ("data", "batch", "evals"):
        assert getattr(faithful, name) == getattr(modern, name)
    assert faithful.max_steps == 6 * modern.max_steps
    for name in ("n_layer", "n_embd", "block_size", "vocab_size"):
        assert getattr(faithful.model, name) == getattr(modern.model, name)
    assert PARAMETERS["modern_small"] == pytest.approx(PARAMETERS["small"], rel=0.005)


def test_recipes_lie_in_the_package() -> None:
    assert RECIPES.is_dir()
    assert "demo" in recipe_names()
