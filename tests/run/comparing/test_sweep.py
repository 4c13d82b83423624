"""A grid judged, from runs whose losses are made up; its axes read; its tables and pictures."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from test_outcomes import write_run

from regpt2.base.errors import UsageError
from regpt2.run.comparing.axes import place_arms, read_axes, together
from regpt2.run.comparing.outcomes import Outcome, outcomes
from regpt2.run.comparing.runs import Arm, Axis, Comparison, read_plan, read_runs
from regpt2.run.comparing.significance import holm
from regpt2.run.comparing.sweep.best import BEST, LEVEL, WORSE, Sweep, _tests, is_geometric, judge
from regpt2.run.comparing.sweep.tables import grid_table, ranked_table
from regpt2.run.comparing.write import show

RATES = Axis(["optim.lr"], [[0.001], [0.002], [0.004]])
DECAYS = Axis(["optim.weight_decay"], [[0.0], [0.1]])


def a_grid(folder: Path, axes: list[Axis], losses: Callable[..., Sequence[float]]) -> Comparison:
    """Runs with these losses, a list by seed for the values of each place; None: the run failed."""
    arms, n_seeds = [], 0
    for at in itertools.product(*(range(len(axis.values)) for axis in axes)):
        values = [axis.values[place][0] for axis, place in zip(axes, at, strict=True)]
        label = ",".join(f"{axis.names[0]}={value}" for axis, value in zip(axes, values, strict=True))
        arms.append(Arm(label, "demo", 100, 100_000, [], list(at)))
        finals = losses(*values)
        n_seeds = len(finals)
        for seed, loss in enumerate(finals, 1):
            write_run(folder / label / f"seed-{seed}", [5.0, 4.0, loss], dataset="made up", device="cpu")
    arms = [arms[-1], *arms[:-1]]  # the baseline need not be the first of the grid
    return Comparison(arms, n_seeds, "100k tokens", None, "regpt2 compare ...", kind="sweep", axes=axes)


def judged(folder: Path, axes: list[Axis], losses: Callable[..., Sequence[float]]) -> Sweep:
    plan = a_grid(folder, axes, losses)
    runs = read_runs(folder, plan)
    return judge(plan, runs, outcomes(plan, runs))


WOBBLE = [0.30, -0.20, 0.10, 0.0]  # what seeds share
OWN = np.array([[1, -1, 2, -2], [-1, 2, -2, 1], [2, 1, -1, -2]]) * 1e-3  # and what they do not


def bowl(rate: float, shift: float = 0.2) -> list[float]:
    off = {0.001: shift, 0.002: 0.0, 0.004: 0.004}[rate]
    return [1.4 + off + wobble + own for wobble, own in zip(WOBBLE, OWN[int(1000 * rate) % 3], strict=True)]


def test_the_best_is_marked_and_so_is_what_cannot_be_told_from_it(tmp_path: Path) -> None:
    sweep = judged(tmp_path, [RATES], bowl)
    assert [cell.verdict for cell in sweep.cells] == [WORSE, BEST, LEVEL], "in the order of the grid"
    worse, best, level = sweep.cells
    assert best.against is None and worse.against is not None and worse.against.mean == pytest.approx(0.2)
    assert worse.against.low < 0.2 < worse.against.high and level.p_holm is not None and level.p_holm > 0.05
    assert sweep.edges == []
    assert sweep.answer().startswith("The best is optim.lr = 0.002 at 1.4500 ± ")
    assert sweep.answer().endswith(" nats; 1 of 2 others cannot be told from it.")
    assert grid_table(sweep)[0] == ["optim.lr", "loss", ""]
    assert [row[0] for row in grid_table(sweep)[1:]] == ["0.001", "0.002", "0.004"]
    assert [row[2] for row in grid_table(sweep)[1:]] == ["", "best", "~"]
    assert [row[0] for row in ranked_table(sweep)[1:]] == ["0.002", "0.004", "0.001"]


def test_the_noise_is_the_residual_of_the_analysis_of_variance_with_all_pairs_corrected() -> None:
    """Of a whole grid whose halves are alike: two-way ANOVA by its textbook formula."""
    generator = np.random.default_rng(1)
    y = generator.normal(0, 1, (4, 3)) + generator.normal(0, 5, 3) + np.array([[0.0], [0.1], [9], [9.1]])
    tests, corrected = _tests([Outcome("", dict(enumerate(row.tolist())), 0, 0) for row in y], 3)
    good = y[np.argsort(y.mean(1))[:2]]
    residual = good - good.mean(1, keepdims=True) - good.mean(0) + good.mean()
    pooled = math.sqrt(2 * (residual**2).sum() / ((2 - 1) * (3 - 1)))
    own = {pair: float(np.std(y[pair[1]] - y[pair[0]], ddof=1)) for pair in tests}
    assert {pair: test.sd for pair, test in tests.items()} == pytest.approx(
        {pair: max(pooled, sd) for pair, sd in own.items()}
    )
    assert len(tests) == 6 and list(corrected.values()) == holm([test.p for test in tests.values()])
    if stats := pytest.importorskip("scipy.stats"):
        test = tests[0, 2]
        assert test.p == pytest.approx(2 * stats.t.sf(test.mean / (test.sd / math.sqrt(3)), 2))


@pytest.mark.parametrize(("n_places", "n_seeds"), [(6, 2), (6, 4), (3, 3)])
def test_equal_places_are_told_apart_in_at_most_5_of_100_grids(n_places: int, n_seeds: int) -> None:
    """Though the best is picked after the fact."""
    generator, wrong = np.random.default_rng(2), 0
    for _ in range(60):
        losses = generator.normal(0, 1, (n_places, n_seeds)) + generator.normal(0, 3, n_seeds)
        found = [Outcome("", dict(enumerate(row.tolist())), 0, 0) for row in losses]
        best = int(np.argmin(losses.mean(1)))
        wrong += any(p < 0.05 for pair, p in _tests(found, n_seeds)[1].items() if best in pair)
    assert wrong <= 8, "0.05 x 60 = 3, and three standard deviations of a count"


def test_a_place_with_a_lost_seed_is_not_the_best_and_one_with_none_has_no_loss(tmp_path: Path) -> None:
    def losses(rate: float, decay: float) -> list[float]:
        if rate == 0.004:
            return [math.nan] * 3
        lucky = [0.5, 0.5, math.nan] if (rate, decay) == (0.001, 0.1) else [0.0] * 3
        return [1.4 + rate + decay - low + wobble for low, wobble in zip(lucky, WOBBLE[:3], strict=True)]

    sweep = judged(tmp_path, [RATES, DECAYS], losses)
    assert sweep.best is not None and sweep.best.arm.label == "optim.lr=0.001,optim.weight_decay=0.0"
    table = grid_table(sweep)
    assert table[0] == ["optim.lr \\ optim.weight_decay", "0", "0.1"]
    assert [row[0] for row in table[1:]] == ["0.001", "0.002", "0.004"] and table[3][1:] == ["diverged", "diverged"]
    assert "2 have no loss" in sweep.answer()
    assert [row[2] for row in ranked_table(sweep)[-2:]] == ["diverged", "diverged"]
    assert sweep.edges == ["The best optim.lr, 0.001, is the smallest of the grid; add smaller values."], (
        "decay 0 is fine"
    )


def test_the_largest_value_is_an_edge_and_words_have_none(tmp_path: Path) -> None:
    names = Axis(["optim.name"], [["adamw"], ["muon"]])
    sweep = judged(
        tmp_path, [RATES, names], lambda rate, name: [2 - 100 * rate - 0.1 * (name == "muon") + w for w in WOBBLE]
    )
    assert sweep.edges == ["The best optim.lr, 0.004, is the largest of the grid; add larger values."]


def test_one_seed_gives_a_best_and_no_test(tmp_path: Path) -> None:
    sweep = judged(tmp_path, [RATES], lambda rate: [1 + rate])
    assert [cell.verdict.split(":")[0] for cell in sweep.cells] == [BEST, "no test", "no test"]
    assert judged(tmp_path / "none", [RATES], lambda _: [math.nan]).answer().startswith("No run of the grid finished")


@pytest.mark.parametrize(
    ("values", "geometric"),
    [([1e-3, 2e-3, 4e-3], True), ([1, 2, 3, 4], False), ([0, 1, 10], False), ([1, 10], True), ([1, 2], False)],
)
def test_values_that_grow_by_ratios_get_a_logarithmic_axis(values: list[float], geometric: bool) -> None:
    assert is_geometric(values) is geometric


@pytest.mark.parametrize(
    "axes", [[RATES], [RATES, DECAYS], [RATES, DECAYS, Axis(["optim.name"], [["adamw"], ["muon"]])]]
)
def test_its_files_begin_with_the_answer_and_can_be_read_back(tmp_path: Path, axes: list[Axis]) -> None:
    def losses(rate: float, decay: float = 0, name: str = "") -> list[float]:
        return [math.nan if rate == 0.004 and decay else 1.4 + 10 * rate + decay + w for w in WOBBLE]

    plan = a_grid(tmp_path, axes, losses)
    show(tmp_path, plan)
    written: dict[str, Any] = json.loads((tmp_path / "compare.json").read_text())
    assert next(iter(written)) == "answer" and written["answer"].startswith("The best is optim.lr = 0.001")
    assert [cell["at"] for cell in written["sweep"]["cells"]] == sorted(arm.at for arm in plan.arms)
    assert read_plan(tmp_path) == plan
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    assert text.startswith("# The best is optim.lr = 0.001") and "The best is optim.lr = 0.001" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == {1: 2, 2: 4, 3: 0}[len(axes)], "each drawing twice: for a desk and a phone"
    assert not [color for color in ("#0000", "#ffffff") if color in page], "all colors are the page's"
    assert imread(tmp_path / "compare.png").shape[1] == 1760


def test_axes_are_read_with_the_types_of_their_settings(tiny_recipe: Path) -> None:
    axes = read_axes(["optim.lr=1e-3,.002", "model.n-embd=32,64 model.n_head=2,4"], "--sweep")
    arms, typed, own = place_arms(str(tiny_recipe), ["--optim.lr", "0.002"], axes)
    assert [axis.names for axis in typed] == [["optim.lr"], ["model.n_embd", "model.n_head"]]
    assert typed[1].values == [[32, 2], [64, 4]] and typed[0].values == [[0.001], [0.002]]
    assert [arm.at for arm in arms] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert arms[3].given.label == "optim.lr=0.002,model.n_embd=64,model.n_head=4"
    assert (arms[3].given.config.optim.lr, arms[3].given.config.model.n_head) == (0.002, 4)
    assert own == 2, "the recipe's own values"
    (whole,), _, own = place_arms(str(tiny_recipe), [], [Axis(["optim.lr"], [[1]])])
    assert whole.given.label == "optim.lr=1" and type(whole.given.config.optim.lr) is float and own == 0
    (betas,) = read_axes(["optim.betas=[0.9,0.95],[0.9,0.99]"], "--sweep")
    labels = [arm.given.label for arm in place_arms(str(tiny_recipe), [], [betas])[0]]
    assert labels == ["optim.betas=0.9-0.95", "optim.betas=0.9-0.99"]
    (named,) = read_axes(["optim.name=adamw,lion"], "--sweep")
    assert [arm.given.config.optim.name for arm in place_arms(str(tiny_recipe), [], [named])[0]] == ["adamw", "lion"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr"], "is no SETTING=VALUE"),
        (["optim.lr=1e-3"], "has one value"),
        (["optim.lr=1e-3,,1"], "has an empty value"),
        (["optim.lr=1e-3,0.001"], "optim.lr=0.001 comes twice"),
        (["optim.lr=1,2", "optim.lr=3,4"], "has optim.lr twice"),
        (["optim.lrr=1,2"], "no setting 'optim.lrr'; did you mean 'optim.lr'"),
        (["optim.lr=1e-3,-1"], r"optim.lr=-1: optim.lr = -1.0 must be above 0"),
        (["optim.lr=1e-3,fast"], "'fast' is a str, expected float"),
        (["model.n_embd=32,33"], "model.n_embd=33: model.n_embd = 33 must be a multiple of model.n_head = 2"),
        (["model.n_embd=32,64 model.n_head=1,2,4"], "model.n_embd has 2, model.n_head has 3"),
        (["model.vocab_size=257,300"], "losses on these do not compare"),
        (["seed=1,2"], "cannot change seed; use --seeds N"),
        (["max_steps=1,2"], "cannot change max_steps; use budget"),
        (["optim.lr=" + ",".join(f"{i}e-5" for i in range(1, 1002))], "has 1,001 places"),
    ],
)
def test_a_wrong_axis_is_one_message(tiny_recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        place_arms(str(tiny_recipe), [], read_axes(words, "--sweep"))
    assert "\n" not in str(error.value)


def test_settings_of_one_axis_change_together() -> None:
    axis = together(read_axes(["a.b=1,2", "c=x,y"], "--scaling"), "--scaling")
    assert axis == Axis(["a.b", "c"], [[1, "x"], [2, "y"]])
