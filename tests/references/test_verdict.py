"""The verdict on real logs, on shifted ones, and on real runs with one planted mistake each."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regpt2.references.causes import Evidence, likeliest_first
from regpt2.references.curves import Curve, choose
from regpt2.references.run_facts import Facts, facts_of
from regpt2.references.verdict import Verdict, band_at, judge, of_record

BATCH = 524_288
PLANTED = json.loads(Path(__file__).with_name("planted.json").read_text())
RIGHT = [f"right_{n}" for n in range(1, 5)]


def curve(name: str) -> Curve:
    found = choose(name, None, None)
    assert found is not None
    return found


LLMC, LECTURE = (curve(name) for name in ("fineweb_gpt2_124m_llmc", "fineweb_edu_gpt2_124m_lecture"))
# A public run of this model on FineWeb-Edu, at a learning rate of 2e-3 (anw-g01/gpt2_124m, 18,850 updates of 524,288).
EDU = {1_001: 3.9353, 4_751: 3.3409, 5_001: 3.3344, 9_501: 3.2083, 14_251: 3.1038, 16_501: 3.0632, 18_850: 3.0438}
SLOWER = LLMC.loss + np.linspace(0, 0.3, len(LLMC.loss))  # falls behind more and more
THE_SAME = Facts(
    dataset="fineweb",
    n_params=124_439_808,
    tokenizer="gpt2",
    batch_tokens=BATCH,
    lr=6e-4,
    warmup_steps=715,
    final_lr_fraction=0.1,
    schedule="cosine",
    weight_decay=0.1,
    order="shuffled",
    precision="bf16",
)


def at_points(of: Curve, losses: Any, steps: int, facts: Facts = THE_SAME, total: int = 19_560) -> Verdict:
    """The verdict on `losses` at the curve's own points, up to so many steps."""
    n = int((of.tokens <= steps * BATCH).sum())
    return judge(of, of.tokens[:n], losses[:n], total_tokens=total * BATCH, facts=facts)


@pytest.mark.parametrize("steps", [250, 500, 1000, 5000, 10_000, 19_560])
@pytest.mark.parametrize(
    ("shift", "state"), [(0.0, "on track"), (0.015, "on track"), (0.15, "above"), (-0.15, "better")]
)
def test_the_real_log_is_on_track_and_a_shifted_one_is_not(steps: int, shift: float, state: str) -> None:
    found = at_points(LLMC, LLMC.loss + shift, steps)
    assert found.state == state
    assert found.difference == pytest.approx(shift)
    assert bool(found.checks) == (state == "above")
    assert found.line().startswith(state)
    json.dumps(found.event(), allow_nan=False)


def test_reruns_of_llmcs_recipe_are_on_track_and_a_slightly_worse_end_is_not() -> None:
    """Three published ends: the band has to hold them, and not much more."""
    for end, state in (
        (3.2722, "on track"),
        (3.2847, "on track"),
        (3.29, "on track"),
        (3.30, "above"),
        (3.24, "better"),
    ):
        assert judge(LLMC, [19_073 * BATCH], [end], total_tokens=19_073 * BATCH, facts=THE_SAME).state == state


def test_the_band_is_wide_while_the_loss_falls_and_narrow_at_the_end() -> None:
    widths = [band_at(LLMC, steps * BATCH, 19_560 * BATCH)[0] for steps in (500, 2_000, 10_000, 19_560)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0.08 and widths[-1] < 0.025


def test_the_seeds_of_ten_published_runs_stay_inside_of_the_band() -> None:
    of = curve("fineweb_modern_muon_baseline")
    for end in (3.27722, 3.27941, 3.27699, 3.28091, 3.27822, 3.28034, 3.27873, 3.27932, 3.2772, 3.27825):
        assert judge(of, [3250 * BATCH], [end], total_tokens=3250 * BATCH, facts=Facts()).state == "on track"
    assert band_at(of, 3250 * BATCH, 3250 * BATCH)[0] == pytest.approx(0.056, abs=0.001)


def test_the_scatter_of_reruns_of_the_long_windows_is_inside_of_the_band() -> None:
    """0.004 is their standard deviation: three of them, 0.02 for reruns, 0.02 for another model, 5 % of the tokens."""
    of = curve("fineweb_modern_long_windows")
    for end, state in ((3.2785, "on track"), (3.2905, "on track"), (3.3405, "on track"), (3.35, "above")):
        assert judge(of, [1390 * BATCH], [end], total_tokens=1390 * BATCH, facts=Facts()).state == state
    band, why = band_at(of, 1390 * BATCH, 1390 * BATCH)
    assert band == pytest.approx(0.067, abs=0.001) and "0.012 (3 deviations over runs)" in why


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"seq_len": 1024.0}, "windows: sequences of 1,024 tokens, the reference has 65,536"),
        ({"window_from": 0.0}, "windows: attention's does not grow, the reference's grows from 128 tokens"),
        ({"model": {"value_embeddings": False, "window": 0}}, "model: without value_embeddings, window, which the"),
    ],
)
def test_other_windows_than_the_references_are_named_first(change: Any, first: str) -> None:
    of = curve("fineweb_modern_long_windows")
    same = dataclasses.replace(
        THE_SAME, schedule="stable_linear", warmup_steps=0, final_lr_fraction=0, weight_decay=0, optimizer="muon",
        seq_len=65_536.0, window_from=128.0,
    )  # fmt: skip
    facts = dataclasses.replace(same, **change)
    assert at_points(of, of.loss + 0.2, 1000, facts, total=1390).checks[0].startswith(first)
    assert at_points(of, of.loss + 0.2, 1000, same, total=1390).checks[0].startswith("tokenizer or validation set")


def test_the_slope_of_a_straight_way_down_is_the_schedules_and_widens_no_band() -> None:
    of = curve("fineweb_gpt2_124m_stable_linear")
    before, end = (band_at(of, steps * BATCH, 9536 * BATCH)[0] for steps in (6850, 9536))
    assert of.slope(9536 * BATCH) > 3 * of.slope(6850 * BATCH)
    assert end == pytest.approx(before, abs=0.001)


def test_another_length_costs_a_stable_then_linear_curve_nothing_before_its_way_down() -> None:
    """Until then the learning rate is the peak, whatever the end: 70 % of 3,250 updates are the way down."""
    of = curve("fineweb_modern_muon_baseline")
    reasons = {steps: band_at(of, steps * BATCH, 6500 * BATCH)[1] for steps in (900, 2000)}
    assert "another length" not in reasons[900]
    assert "another length" in reasons[2000]


def test_the_public_run_written_up_as_a_97_percent_match_is_above() -> None:
    """3.3969 at the end of the lecture's recipe on FineWeb-Edu, with HellaSwag at 26.99 %."""
    facts = dataclasses.replace(THE_SAME, dataset="fineweb_edu")
    found = judge(LECTURE, [0, 19_073 * BATCH], [10.951, 3.3969], total_tokens=19_073 * BATCH, facts=facts)
    assert found.state == "above" and found.difference is not None and found.difference > 0.3
    assert "by shape" in found.line() and "OpenAI's GPT-2 124M has 3.2924" in found.line()


def test_a_curve_by_shape_agrees_with_a_real_run_on_that_data() -> None:
    """The run had 3.3 times the learning rate: ahead during warm-up, then inside of the band to the end."""
    total = 18_850 * BATCH
    found = {
        step: judge(LECTURE, [step * BATCH], [loss], total_tokens=total, facts=Facts()) for step, loss in EDU.items()
    }
    assert found.pop(1_001).state == "better"
    assert {verdict.state for step, verdict in found.items() if step >= 5_000} == {"on track"}


@pytest.mark.parametrize("step", [4_751, 9_501, 14_251])
def test_the_projected_end_of_a_real_run_is_right_to_0_04_from_a_quarter_on(step: int) -> None:
    total = 18_850 * BATCH
    found = judge(LECTURE, [step * BATCH], [EDU[step]], total_tokens=total, facts=Facts())
    assert found.projected_end == pytest.approx(EDU[18_850], abs=0.04)
    early = judge(LECTURE, [0.1 * total], [LECTURE.at(0.1 * total)], total_tokens=total, facts=Facts())
    assert early.projected_end is None, "at a tenth it would have been off by up to 0.1"


def test_a_run_of_another_length_gets_a_wider_band_and_no_projection() -> None:
    found = judge(LLMC, [4_000 * BATCH], [LLMC.at(4_000 * BATCH) - 0.05], total_tokens=5_000 * BATCH, facts=THE_SAME)
    assert found.state == "on track" and "another length" in found.band_reason
    assert found.projected_end is None and found.reference_end is None


def test_before_the_first_point_it_is_too_early() -> None:
    found = at_points(LLMC, LLMC.loss, 100)
    assert (found.state, found.worth_saying, found.checks) == ("too early", False, ())


def test_beyond_the_curves_end_its_end_is_the_reference() -> None:
    found = judge(LLMC, [40_000 * BATCH], [3.15], total_tokens=80_000 * BATCH, facts=THE_SAME)
    assert found.difference == pytest.approx(3.15 - 3.2722)
    assert judge(LLMC, [40_000 * BATCH], [4.0], total_tokens=80_000 * BATCH, facts=Facts()).state == "above"


def test_the_end_is_compared_with_the_end_and_openais_line_is_there() -> None:
    found = judge(LLMC, [19_073 * BATCH], [3.275], total_tokens=19_073 * BATCH, facts=THE_SAME)
    assert found.line() == (
        "on track at the end: 3.2750, the reference 3.2722 (band 0.022); on this data OpenAI's GPT-2 124M has 3.4250"
    )


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"batch_tokens": BATCH / 8}, "batch tokens: 65,536 an update, the reference has 524,288"),
        ({"lr": 6e-3}, "learning rate: 0.006, the reference has 0.0006"),
        ({"warmup_steps": 0.0}, "learning rate: warm-up of 0 updates, the reference has 700"),
        ({"schedule": "constant"}, "learning rate: schedule constant, the reference has cosine"),
        ({"final_lr_fraction": 1.0}, "learning rate: it ends at 100% of its peak, the reference at 0%"),
        ({"order": "one batch"}, "data order: every update sees the same batch"),
        ({"tokenizer": "bytes"}, "tokenizer: bytes"),
        ({"dataset": "openwebtext"}, "data set: openwebtext, the reference has fineweb"),
        ({"weight_decay": 0.0}, "decay groups: weight decay 0, the reference has 0.1"),
        ({"precision": "fp16"}, "precision: fp16"),
        ({"skipped": 40}, "precision: 40 of 0 updates were skipped"),
    ],
)
def test_what_differs_from_the_reference_is_named_first_and_what_is_equal_is_not(change: Any, first: str) -> None:
    (check,) = at_points(LLMC, SLOWER, 5000, dataclasses.replace(THE_SAME, **change)).checks
    assert check.startswith(first)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"model": {"rotary": False, "softcap": 0.0, "qk_norm": True}}, "model: without rotary, softcap, which the"),
        ({"optimizer": "adamw"}, "optimizer: adamw, the reference has muon"),
    ],
)
def test_an_ingredient_that_is_switched_off_is_named_first(change: Any, first: str) -> None:
    of = curve("fineweb_modern_muon_baseline")
    facts = dataclasses.replace(THE_SAME, schedule="stable_linear", warmup_steps=0, final_lr_fraction=0, **change)
    assert at_points(of, of.loss + 0.2, 2000, facts, total=3250).checks[0].startswith(first)


def test_with_nothing_known_the_checks_come_in_their_usual_order() -> None:
    words = [check.split(":")[0] for check in at_points(LLMC, SLOWER, 5000, Facts()).checks]
    assert words == ["batch tokens", "learning rate", "data order", "precision", "tokenizer", "decay groups"]


def test_with_all_equal_and_no_symptom_it_says_that() -> None:
    assert at_points(LLMC, SLOWER, 5000).checks[0].startswith("all that the record says is the reference's")


def first_symptom(losses: Any, train_losses: Any = (), steps: int = 5000) -> str:
    train = np.array(train_losses, dtype=float)
    facts = Facts(train_losses=train, train_steps=np.arange(1.0, len(train) + 1))
    return at_points(LLMC, losses, steps, facts).checks[0]


def test_symptoms_of_curves_made_by_hand() -> None:
    stalled = np.maximum(LLMC.loss, 7.5)  # nanoGPT #411
    assert first_symptom(stalled, steps=2000).startswith("learning rate: the loss stands still at 7.50")
    assert first_symptom(LLMC.loss * 1.2).startswith("tokenizer: the loss starts at 13.21")
    elsewhere = LLMC.loss + 0.4 * (LLMC.tokens > 0)
    assert first_symptom(elsewhere).startswith("tokenizer or validation set: the same 0.40 above")
    rng = np.random.default_rng(0)
    trend = np.interp(np.arange(1, 5001), LLMC.tokens / BATCH, SLOWER)
    assert first_symptom(SLOWER, trend + 0.042 * rng.standard_normal(5000)).startswith("batch tokens: 524,288")
    assert "1/8" in first_symptom(SLOWER, trend + 0.042 * math.sqrt(8) * rng.standard_normal(5000))
    wave = 0.1 * np.sin(np.arange(5000) * 2 * math.pi / 190)  # the shards' own ups and downs: build-nanogpt #52
    assert first_symptom(SLOWER, trend + wave + 0.042 * rng.standard_normal(5000)).startswith("data order: one period")
    assert first_symptom(SLOWER, trend - 0.3).startswith("validation set: 0.3")


# Real runs, below: the reference is the mean of four seeds of the right recipe.


def small(name: str, updates: int, *, facts: bool) -> tuple[Verdict, Evidence]:
    """The verdict on one of the planted runs after so many updates, with what it says of itself or without."""
    runs, recipe = PLANTED["runs"], PLANTED["recipe"]
    losses = np.array([runs[right]["eval_losses"] for right in RIGHT])
    late = [np.diff(runs[right]["train_losses"][150:]) for right in RIGHT]
    tokens = np.arange(0.0, 301, 20) * recipe["batch_tokens"]
    of = Curve(
        name="small",
        title="",
        dataset="",
        source="",
        batch_tokens=recipe["batch_tokens"],
        tokens=tokens,
        loss=losses.mean(0),
        spread=losses.std(0, ddof=1),
        recipe=recipe,
        scatter=float(np.median(np.abs(late))) / 0.6745 / math.sqrt(2),
    )
    train = np.array(runs[name]["train_losses"][:updates])
    hidden = Facts(train_losses=train, train_steps=np.arange(1.0, updates + 1))
    said = {key: recipe[key] for key in ("lr", "warmup_steps", "final_lr_fraction", "schedule", "weight_decay")}
    said |= {"batch_tokens": recipe["batch_tokens"], "order": "shuffled", "precision": "fp32", "tokenizer": "gpt2"}
    said |= {"learning_rate_x10": {"lr": 4e-2}, "no_warm_up": {"warmup_steps": 0}}.get(name, {})
    known = dataclasses.replace(hidden, **said) if facts else hidden
    n = updates // 20 + 1
    points = tokens[:n], np.array(runs[name]["eval_losses"][:n])
    return judge(of, *points, total_tokens=300 * of.batch_tokens, facts=known), Evidence(of, known, *points)


@pytest.mark.parametrize("updates", range(40, 301, 20))
def test_a_right_rerun_is_on_track_at_every_evaluation(updates: int) -> None:
    found, evidence = small("rerun", updates, facts=False)
    assert found.state == "on track"
    symptoms = [text for text in likeliest_first(evidence) if not text.startswith(_OPEN)]
    assert not symptoms, "a right run shows no symptom even if it is asked for them"


_OPEN = (
    "batch tokens: 4,096 an update",
    "learning rate: peak,",
    "data order: every window once",
    "precision: bf16",
    "tokenizer: GPT-2's",
    "decay groups: 0.1",
)


@pytest.mark.parametrize(
    ("name", "updates", "hidden", "known"),
    [
        ("learning_rate_x10", 80, "learning rate: 0.27 below", "learning rate: 0.04, the reference has 0.004"),
        ("learning_rate_x10", 300, "learning rate: 0.27 below", "learning rate: 0.04, the reference has 0.004"),
        ("no_warm_up", 140, "learning rate: 0.29 below", "learning rate: warm-up of 0 updates, the reference has 30"),
        ("batch_of_an_eighth", 80, "batch tokens: single updates scatter", "batch tokens: single updates scatter"),
        ("batch_of_an_eighth", 300, "batch tokens: single updates scatter", "batch tokens: single updates scatter"),
    ],
)
def test_a_planted_mistake_is_above_and_named_first(name: str, updates: int, hidden: str, known: str) -> None:
    """By its symptoms alone, and by what the record says. The eighth of a batch claims to be a whole one."""
    for facts, first in ((False, hidden), (True, known)):
        found, _ = small(name, updates, facts=facts)
        assert found.state == "above"
        assert found.checks[0].startswith(first)


def test_no_warm_up_and_too_high_a_rate_are_not_told_apart_and_a_mild_mistake_heals() -> None:
    for name in ("learning_rate_x10", "no_warm_up"):
        assert "cannot tell the two apart" in small(name, 140, facts=False)[0].checks[0]
    assert small("no_warm_up", 300, facts=False)[0].state == "on track", "0.11 above, as far as seeds differ here"


# By the record alone.


def record(steps: int = 500, *, loss: float = 0.0, **config: Any) -> list[dict[str, Any]]:
    """What a run of llm.c's recipe would have written down."""
    start: dict[str, Any] = {"event": "run", "step": 0, "n_params": 124_439_808, "batch_tokens": BATCH}
    start |= {"max_steps": 19_560, "tokenizer": "gpt2", "precision": "bf16", "dataset": None}
    start["config"] = {"data": "data/fineweb10B", "optim": {"name": "adamw", "lr": 6e-4, "weight_decay": 0.1}, **config}
    rows = [(int(t / BATCH), float(x)) for t, x in zip(LLMC.tokens, LLMC.loss, strict=True) if t <= steps * BATCH]
    return [start, *({"event": "eval", "step": s, "eval": "val_loss", "loss": x + loss * (s > 0)} for s, x in rows)]


def test_a_record_alone_is_enough() -> None:
    found = of_record(record(5000))
    assert found is not None
    assert (found.state, found.curve, found.tokens) == ("on track", LLMC.name, 5000 * BATCH)
    warned = of_record(record(500, loss=0.3, batch={"order": "sequential"}))
    assert warned is not None and warned.state == "above", "clearly off is said in the first 500 updates"
    hot = record(5000)
    hot[2]["loss"] -= 0.3
    hot[-1]["loss"] += 0.3
    found = of_record(hot)
    assert found is not None and found.checks[0].startswith("learning rate: 0.30 below the reference at first")
    fast = of_record(record(5000, schedule={"kind": "stable_linear"}))
    assert fast is not None and fast.curve == "fineweb_gpt2_124m_stable_linear"
    facts = facts_of(record(model={"rotary": False}))
    assert (facts.optimizer, facts.model) == ("adamw", {"rotary": False})
    assert of_record(record(5000), "off") is None
    assert of_record([]) is None


def test_a_record_is_not_trusted() -> None:
    """Wrong types, spelled-out infinities, huge numbers, missing keys: unknown, and no crash."""
    bad: list[dict[str, Any]] = [
        {},
        {"event": "run", "step": 0, "config": 7, "n_params": [1], "max_steps": "inf", "batch_tokens": True},
        {"event": "run", "step": 0, "config": {"optim": [], "batch": None, "data": 3}, "baselines": "x"},
        {"event": "eval", "step": 5, "eval": "val_loss", "loss": "nan"},
        {"event": "eval", "step": 5, "eval": "val_loss", "loss": 10**400},
        {"event": "train", "step": 1, "loss": "inf"},
        {"event": "train", "step": "1", "loss": 1.0},
        {"event": "train", "step": 10**400, "loss": 1.0},
        {"event": "eval", "step": 10**400, "eval": "val_loss", "loss": 1.0},
        {"event": "eval", "step": -5, "eval": "val_loss", "loss": 1.0},
    ]
    assert of_record(bad) is None
    found = of_record([*bad, *record(500)])
    assert found is not None and found.state == "on track"
    assert facts_of(bad).n_params is None


def test_without_a_reference_the_run_is_asked_alone() -> None:
    def at_end(
        losses: list[float], first: float = math.log(257), bits: float = 2.0, n_params: float | None = None
    ) -> Verdict:
        n = len(losses)
        facts = Facts(
            vocab_size=257,
            gzip_bits=2.07,
            max_steps=100.0 * (n - 1),
            train_steps=np.array([1.0]),
            train_losses=np.array([first]),
            eval_steps=100.0 * np.arange(n),
            eval_bits=np.full(n, bits),
            n_params=n_params,
        )
        return judge(None, facts.eval_steps, losses, total_tokens=100.0 * (n - 1), facts=facts)

    fine = at_end([5.5, 2.2, 1.6, 1.4])
    assert (fine.state, fine.checks, fine.worth_saying) == ("no reference", (), True)
    assert fine.line().endswith("what can be checked without one is in order")
    assert "learned by heart" in at_end([5.5, 2.2, 1.6, 1.9]).checks[0]
    assert "not near ln(vocabulary)" in at_end([5.5, 2.2, 1.6], first=7.0).checks[0]
    assert "gzip needs 2.070" in at_end([5.5, 2.2, 1.6], bits=2.4).checks[0]
    short = at_end([5.5, 2.2, 1.6], bits=2.4, n_params=201.0)
    assert (short.state, short.checks, short.worth_saying) == ("too short", (), True)
    assert short.line() == "too short to judge: 1.6000 after 200 tokens, fewer than one per parameter"
    assert "not near ln(vocabulary)" in at_end([5.5, 2.2, 1.6], first=7.0, n_params=201.0).line()
