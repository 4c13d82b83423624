"""Sizes counted, laws checked on what they held out, words, tables and pictures; from runs whose losses are made up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from test_outcomes import write_run

from regpt2.base.errors import UsageError
from regpt2.config.recipe_files import load_recipe
from regpt2.model.modern import ModernConfig
from regpt2.run.comparing.outcomes import outcomes
from regpt2.run.comparing.runs import Arm, Axis, Comparison, read_plan, read_runs
from regpt2.run.comparing.scaling.forecast import Forecast, forecast, law_remarks
from regpt2.run.comparing.scaling.sizes import non_embedding, size_of, sized, variable
from regpt2.run.comparing.scaling.tables import laws_table, sizes_table
from regpt2.run.comparing.write import show

E, A, EXPONENT = 1.2, 40.0, 0.35
OFF = [[0.002, -0.001], [-0.001, 0.001], [0.001, 0.0], [-0.002, 0.001], [0.001, -0.001]]


def sizes(folder: Path, *, last_is_off: float = 0.0, floor: float = E, n: int = 5, noise: float = 1.0) -> Comparison:
    """Five sizes, each twice the last, on a known law, two seeds each."""
    arms = []
    for at in range(n):
        arm = Arm(f"model.n_embd={32 * (at + 1)}", "demo", 100, 100_000, [], [at], 25_000 * 2**at, 1e9 * 2**at)
        loss = floor + A * arm.weights**-EXPONENT + (last_is_off if at == n - 1 else 0)
        for seed, off in enumerate(OFF[at], 1):
            losses = [5.0, 4.0, loss + noise * off]
            write_run(folder / arm.label / f"seed-{seed}", losses, dataset="made up", device="cpu")
        arms.append(arm)
    axis = Axis(["model.n_embd"], [[32 * (at + 1)] for at in range(n)])
    return Comparison(
        arms[::-1], 2, "100k tokens", None, "regpt2 compare ...", kind="scaling", axes=[axis], hold_out=1,
        over="parameters",
    )  # fmt: skip


def forecast_of(folder: Path, plan: Comparison) -> Forecast:
    return forecast(plan, outcomes(plan, read_runs(folder, plan)))


def test_the_largest_size_is_held_out_and_compared_with_what_was_predicted(tmp_path: Path) -> None:
    found = forecast_of(tmp_path, sizes(tmp_path))
    assert [size.is_held_out for size in found.sizes] == [False] * 4 + [True], "from small to large"
    (check,), (bare,) = found.checks
    assert check.size.arm.weights == 400_000 and check.verdict == "within"
    assert bare.value < check.value - 0.05, "without E the law falls too fast"
    assert bare.interval.high - bare.interval.low > 5 * (check.interval.high - check.interval.low)
    assert found.whole is not None and found.ahead == 800_000
    truth = E + A * 800_000**-EXPONENT
    assert truth in found.ahead_interval() and found.whole.exponent.low < EXPONENT < found.whole.exponent.high
    words = found.answer()
    assert words.startswith("With 800k non-embedding parameters, twice the most here, a loss of 1.5")
    assert f"the 400k held out came to {check.size.mean:.3f}, inside the predicted" in words


def test_a_miss_is_called_one(tmp_path: Path) -> None:
    found = forecast_of(tmp_path, sizes(tmp_path, last_is_off=0.1))
    assert found.checks[0][0].verdict.startswith("missed by +0.1")
    assert ", outside the predicted " in found.answer()


def test_nothing_held_out_fits_all(tmp_path: Path) -> None:
    plan = replace(sizes(tmp_path), hold_out=0)
    found = forecast_of(tmp_path, plan)
    assert found.checks == [[], []] and found.answer().endswith("no size was held out to check the law.")
    assert found.whole is not None and found.laws[0].law.floor == found.whole.law.floor
    assert [row[-1] for row in laws_table(found)[1:]] == ["–", "–", "twice the largest"]


def test_remarks_name_an_e_that_is_not_determined_and_a_rate_that_is_not_tuned(tmp_path: Path) -> None:
    known = sizes(tmp_path / "known")
    lines = law_remarks(forecast_of(tmp_path / "known", known), known)
    assert any("A pure power law (E = 0) does not fit" in line for line in lines)
    assert any("The learning rate is not tuned anew" in line for line in lines)
    vague = sizes(tmp_path / "vague", floor=0.3, noise=10)
    assert any("do not determine E: every value from 0 to" in line
               for line in law_remarks(forecast_of(tmp_path / "vague", vague), vague))  # fmt: skip
    tokens = replace(known, over="tokens", arms=[replace(arm, tokens=arm.weights) for arm in known.arms])
    lines = law_remarks(forecast_of(tmp_path / "known", tokens), tokens)
    assert any("Parameters and tokens both change" in line for line in lines)
    assert not any("learning rate" in line for line in lines)


def test_losses_that_do_not_fall_show_no_law(tmp_path: Path) -> None:
    plan = sizes(tmp_path)
    runs = outcomes(plan, read_runs(tmp_path, plan))
    level = [replace(one, finals={1: 2.0 + 0.01 * (at % 2), 2: 2.01}) for at, one in enumerate(runs)]
    found = forecast(plan, level)
    assert found.answer().startswith("The loss does not fall measurably with non-embedding parameters here")
    assert any("The same loss at every size fits too." in line for line in law_remarks(found, plan))


def test_a_size_without_a_loss_leaves_the_law_to_the_others(tmp_path: Path) -> None:
    plan = sizes(tmp_path, n=4)
    plan.failures.update({f"model.n_embd=32/seed-{seed}": "out of memory" for seed in (1, 2)})
    found = forecast_of(tmp_path, plan)
    assert found.laws == [] and found.answer() == "Too few sizes finished for a power law."
    assert law_remarks(found, plan) == ["A law needs 3 finished sizes that are not held out."]
    show(tmp_path, plan)
    assert sizes_table(found, plan.axes[0])[1][4:6] == ["–", "–"]


def test_its_files_begin_with_the_answer_and_can_be_read_back(tmp_path: Path) -> None:
    plan = sizes(tmp_path)
    show(tmp_path, plan)
    written: dict[str, Any] = json.loads((tmp_path / "compare.json").read_text())
    law, bare = written["scaling"]["laws"]
    assert next(iter(written)) == "answer" and written["answer"].startswith("With 800k non-embedding parameters")
    assert law["E_interval"]["low"] < E < law["E_interval"]["high"] and bare["E"] == 0
    (check,) = law["checks"]
    assert check["interval"]["low"] < check["came"] < check["interval"]["high"] and check["verdict"] == "within"
    assert read_plan(tmp_path) == plan
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    assert text.startswith("# With 800k") and "With 800k" in page and page.count("<svg") == 2
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and "#0000" not in page
    assert imread(tmp_path / "compare.png").shape[1] == 1760


@pytest.mark.parametrize("recipe", ["demo", "modern_small"])
def test_parameters_leave_out_tables_of_tokens_and_positions(recipe: str) -> None:
    config = load_recipe(recipe).model
    C, L = config.n_embd, config.n_layer
    blocks = 12 * C * C * L  # Kaplan et al., table 1: 12 layers x width^2
    biases_and_norms = L * 13 * C + 2 * C
    expected = blocks if isinstance(config, ModernConfig) else blocks + biases_and_norms
    assert expected <= non_embedding(config) <= expected * 1.01


def test_the_variable_is_what_varies() -> None:
    small, large, more, both = (
        sized(Arm("x", "", 1, tokens, []), replace(demo, model=replace(demo.model, n_embd=width)))
        for demo in [load_recipe("demo")]
        for tokens, width in ((1000, 64), (1000, 128), (2000, 64), (2000, 128))
    )
    huge = replace(large, weights=10**9, flops=1e20)
    assert variable([small, large, huge], "", 0) == "parameters"
    assert variable([small, more, replace(more, tokens=5000)], "", 0) == "tokens"
    assert variable([small, both, huge], "", 0) == "flops"
    assert variable([small, both, replace(huge, tokens=5000)], "tokens", 0) == "tokens"
    assert size_of(more, "flops") == 2 * size_of(small, "flops")
    for arms, over, held_out, message in (
        ([small, large, huge], "tokens", 0, "needs another number at every size"),
        ([small, large, huge], "params", 0, "must be one of parameters, tokens, flops"),
        ([small, small, small], "", 0, "changes neither parameters nor tokens"),
        ([small, large, huge], "", 1, "leave 2 to fit, expected at least 3"),
        ([small, large, huge], "", -1, "must be at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            variable(arms, over, held_out)


def test_an_interval_that_is_not_known_is_not_written_as_a_number(tmp_path: Path) -> None:
    plan = replace(sizes(tmp_path, n=4), seeds=1)
    found = forecast_of(tmp_path, plan)
    assert math.isnan(found.laws[0].floor.low) and found.main == 1, "three runs: only the pure law has an interval"
    assert "nan" not in str(laws_table(found)) + found.answer() + str(law_remarks(found, plan))
    assert any("leave nothing to judge them by" in line for line in law_remarks(found, plan))
