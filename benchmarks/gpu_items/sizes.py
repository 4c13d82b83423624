"""GPT-2's larger sizes, one micro-batch an update: eager, then, if time is left, compiled."""

from gpu_items import Check
from gpu_timing import keep_step, step_work
from regpt2.config.recipe_files import load_recipe

MICRO_BATCH = {"gpt2_350m": 32, "gpt2_774m": 16, "gpt2_1558m": 8}


def run(check: Check) -> None:
    for compile_it in ("off",) if check.smoke else ("off", "on"):
        for recipe, micro_batch in list(MICRO_BATCH.items())[: 1 if check.smoke else None]:
            model = load_recipe(recipe).model
            work = step_work(check, model=model, micro_batch=micro_batch, compile=compile_it, warmup_steps=5, steps=20)
            keep_step(check, f"{recipe}, B={micro_batch}, {'compiled' if compile_it == 'on' else 'eager'}", work)
