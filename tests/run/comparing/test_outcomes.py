"""What a comparison concludes, from runs whose curves are made up and whose crossings are known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regpt2.run.comparing.outcomes import Outcome, answer, outcomes, remarks
from regpt2.run.comparing.runs import Arm, Comparison, first_reached, last_step, read_plan, read_run, read_runs
from regpt2.run.comparing.tables import NOTHING, arms_table, chance, costs_table, for_screen, results_table, seeds_table

STEPS = 100


def a_plan(*labels: str, seeds: int = 4, target: float | None = None) -> Comparison:
    arms = [Arm(label, f"{label}=demo", STEPS, 1000 * STEPS, []) for label in labels]
    return Comparison(arms, seeds, "100k tokens", target, "regpt2 compare ...")


def write_run(
    folder: Path, losses: list[float], *, step_ms: float = 20.0, ended: str = "finished", **start: Any
) -> None:
    """A record: 100 updates of 1,000 tokens, validation losses evenly spread from the first step to the last."""
    events: list[dict[str, Any]] = [
        {"event": "run", "step": 0, "dataset": "made up", "data_fingerprint": "f", "torch": "2", "batch_tokens": 1000}
        | start
    ]
    at = np.linspace(0, STEPS, len(losses)).astype(int)
    for step in range(STEPS + 1):
        if step:
            events.append({"event": "train", "step": step, "loss": 1.0, "step_ms": step_ms, "tokens": 1000 * step})
        events += [
            {"event": "eval", "eval": "val_loss", "step": step, "loss": str(loss) if math.isnan(loss) else loss}
            for loss, place in zip(losses, at.tolist(), strict=True)
            if place == step
        ]
    events += [{"event": "end", "step": STEPS, "reason": ended}] if ended else []
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def concluded(folder: Path, plan: Comparison) -> list[Outcome]:
    return outcomes(plan, read_runs(folder, plan))


def test_a_curve_crosses_where_its_lines_do() -> None:
    at, losses = np.array([0.0, 10.0, 20.0, 30.0]), np.array([8.0, 4.0, 5.0, 2.0])
    assert first_reached(at, losses, 6.0) == 5.0
    assert first_reached(at, losses, 4.0) == 10.0
    assert first_reached(at, losses, 4.5) == pytest.approx(8.75), "the first time, though it rises again"
    assert first_reached(at, losses, 3.5) == 25.0
    assert first_reached(at, losses, 9.0) == 0.0
    assert first_reached(at, losses, 1.9) == math.inf
    assert first_reached(at, np.array([8.0, math.nan, 4.0, 4.0]), 4.0) == 20.0, "a gap is drawn over"


def test_tokens_and_time_to_the_baselines_loss_are_found_seed_by_seed(tmp_path: Path) -> None:
    plan = a_plan("slow", "fast", "worse", seeds=2, target=4.0)
    for seed, shift in ((1, 0.0), (2, 0.1)):
        write_run(tmp_path / f"slow/seed-{seed}", [6 + shift, 5 + shift, 4 + shift])  # 2 a run, evenly
        write_run(tmp_path / f"fast/seed-{seed}", [6 + shift, 3 + shift, 2 + shift], step_ms=10)
        write_run(tmp_path / f"worse/seed-{seed}", [6 + shift, 5.5 + shift, 5 + shift])
    slow, fast, worse = concluded(tmp_path, plan)
    assert slow.shares is None and slow.verdict == "no test: it takes two seeds"
    assert fast.shares is not None and worse.shares is not None
    # Down from 6 to 4 on a line of 3 in half a run: after a third of it; an update takes half the time.
    assert fast.shares.tokens == pytest.approx([1 / 3, 1 / 3]) and fast.shares.seconds == pytest.approx([1 / 6, 1 / 6])
    assert worse.shares.tokens == [math.inf, math.inf]
    assert slow.to_target is not None and slow.to_target.tokens == [100_000.0, math.inf]
    assert slow.seconds == pytest.approx(2.0) and fast.seconds == pytest.approx(1.0)
    head, _, fast_row, worse_row = costs_table(plan, [slow, fast, worse])
    told = dict(zip(head, fast_row, strict=True))
    assert (told["tokens to slow's loss"], told["time to slow's loss"]) == ("33.3% ± 0.0%", "16.7% ± 0.0%")
    assert worse_row.count("not reached") == 4
    assert costs_table(plan, [slow])[1][-2:] == ["not reached by 1 of 2"] * 2


def four_seeds(folder: Path, *, by: float, noise: float) -> Outcome:
    """An arm whose losses are off from the baseline's by `by`, give or take."""
    for seed, (wobble, own) in enumerate([(0.3, -1.0), (-0.2, 0.4), (0.1, 1.2), (0.0, -0.6)], start=1):
        write_run(folder / f"a/seed-{seed}", [5.0, 3.0 + wobble])
        write_run(folder / f"b/seed-{seed}", [5.0, 3.0 + wobble + by + noise * own])
    return concluded(folder, a_plan("a", "b"))[1]


@pytest.mark.parametrize(
    ("by", "noise", "verdict"),
    [
        (-0.05, 0.01, "better"),  # far less than seeds differ: pairs see it
        (0.05, 0.01, "worse"),
        (-0.05, 0.1, "no difference shown"),
        (0.0, 0.0, "no difference shown"),
        (-0.002, 0.0001, "better by less than 0.004"),
    ],
)
def test_the_verdict(tmp_path: Path, by: float, noise: float, verdict: str) -> None:
    found = four_seeds(tmp_path, by=by, noise=noise)
    assert found.verdict == verdict
    assert found.against is not None and found.against.mean == pytest.approx(by, abs=1e-9)


@pytest.mark.parametrize(
    ("by", "noise", "begins"),
    [
        (-0.05, 0.01, "b is better than a by 0.0500 nats ("),
        (0.05, 0.01, "b is worse than a by 0.0500 nats ("),
        (0.05, 0.1, "b shows no difference from a: it ends 0.0500 nats higher ("),
        (-0.002, 0.0001, "b is better than a by 0.0020 nats, less than the 0.004 that matter ("),
    ],
)
def test_the_answer_says_whether_by_how_much_and_how_certain(
    tmp_path: Path, by: float, noise: float, begins: str
) -> None:
    four_seeds(tmp_path, by=by, noise=noise)
    off = by + noise * np.array([-1.0, 0.4, 1.2, -0.6])
    half = 3.18245 * off.std(ddof=1) / 2  # of every table of Student's t: 3 degrees of freedom, 95 %
    said = answer(a_plan("a", "b"), concluded(tmp_path, a_plan("a", "b")))
    assert said.startswith(begins)
    assert f"95 % interval {off.mean() - half:+.4f} to {off.mean() + half:+.4f}, p = " in said
    assert said.endswith(", 4 seeds).")


def test_the_answer_about_several_arms_names_the_best_first(tmp_path: Path) -> None:
    shifts = {"a": 0.0, "b": 0.3, "c": -0.2, "d": 0.0, "e": -0.3, "f": 0.0}
    for seed, own in enumerate([-1.0, 0.4, 1.2, -0.6], start=1):
        for label, by in shifts.items():
            write_run(tmp_path / f"{label}/seed-{seed}", [5.0, 3.0 + by + 0.01 * own * (label != "a")])
    plan = a_plan("a", "b", "c", "d")
    said = answer(plan, concluded(tmp_path, plan))
    assert said.startswith("Beside a with 4 seeds, c is better by 0.2000 nats (p = ")
    assert said.index("d shows no difference (at the same loss") > said.index("b is worse by 0.3000 nats (p = ") > 0
    assert said.endswith("; p is corrected for 3 arms.")
    plan = a_plan("a", "b", "c", "d", "e", "f")
    said = answer(plan, concluded(tmp_path, plan))
    assert said.startswith("Of 5 arms beside a with 4 seeds, 2 are better (the best, e, is better by 0.3000 nats (p")
    assert "1 is worse, 2 show no difference; p is corrected for 5 arms." in said


def test_the_answer_without_a_test_claims_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a/seed-1", [5.0, 3.0])
    write_run(tmp_path / "b/seed-1", [5.0, 2.9])
    plan = a_plan("a", "b", seeds=1)
    said = answer(plan, concluded(tmp_path, plan))
    assert said == "Beside a, b ends 0.1000 nats lower on one seed, which shows nothing."
    plan = a_plan("a", "gone", seeds=1)
    assert "gone cannot be compared: no run of it finished." in answer(plan, concluded(tmp_path, plan))
    plan = a_plan("gone", "a", seeds=1)
    assert answer(plan, concluded(tmp_path, plan)).startswith("No run of gone finished")


def test_a_lost_seed_is_in_the_answer(tmp_path: Path) -> None:
    four_seeds(tmp_path, by=-0.05, noise=0.01)
    plan = a_plan("a", "b", seeds=5)
    assert answer(plan, concluded(tmp_path, plan)).endswith(", 4 of 5 seeds).")


def test_several_arms_are_corrected_for(tmp_path: Path) -> None:
    plan = a_plan("a", "b", "c", "d")
    for seed, own in enumerate([-1.0, 0.4, 1.2, -0.6], start=1):
        write_run(tmp_path / f"a/seed-{seed}", [5.0, 3.0])
        for label, by in (("b", -0.018), ("c", 0.0), ("d", -0.2)):
            write_run(tmp_path / f"{label}/seed-{seed}", [5.0, 3.0 + by + 0.01 * own])
    _, b, c, d = concluded(tmp_path, plan)
    assert b.against is not None and b.against.p < 0.05 < (b.p_holm or 0), "alone it would have passed"
    assert b.p_holm == pytest.approx(2 * b.against.p)
    assert [one.verdict for one in (b, c, d)] == ["no difference shown", "no difference shown", "better"]


def test_what_did_not_finish_does_not_count_and_is_said(tmp_path: Path) -> None:
    plan = a_plan("a", "b", seeds=5)
    plan.failures["b/seed-2"] = "out of memory"
    for seed in range(1, 6):
        write_run(tmp_path / f"a/seed-{seed}", [5.0, 3.0])
    write_run(tmp_path / "b/seed-1", [5.0, 2.0])
    write_run(tmp_path / "b/seed-2", [5.0, 2.0], ended="failed: out of memory")
    write_run(tmp_path / "b/seed-3", [5.0, math.nan])
    write_run(tmp_path / "b/seed-4", [5.0, 2.0], ended="")
    runs = read_runs(tmp_path, plan)
    assert [run.status for run in runs[1]] == [
        "finished", "failed: out of memory", "diverged: its last validation loss is nan", "at step 100", "not begun",
    ]  # fmt: skip
    _, b = found = outcomes(plan, runs)
    assert b.finals == {1: 2.0} and b.against is None
    said = remarks(plan, runs, found)
    assert "b seed 2 does not count: failed: out of memory." in said
    assert "Not begun, with these seeds: b (5)." in said
    assert any("Fewer than 4 pairs" in line for line in said)
    head, _, row = costs_table(plan, found)
    assert dict(zip(head, row, strict=True))["seeds"] == "1 of 5"


def test_runs_of_other_data_or_another_machine_are_told(tmp_path: Path) -> None:
    plan = a_plan("a", "b", seeds=1)
    write_run(tmp_path / "a/seed-1", [5.0, 3.0], device="cpu: one")
    write_run(tmp_path / "b/seed-1", [5.0, 3.0], device="cpu: two", data_fingerprint="g")
    runs = read_runs(tmp_path, plan)
    said = remarks(plan, runs, outcomes(plan, runs))
    assert "The data of these runs differ, so their losses cannot be compared." in said
    assert "The runs used different devices: cpu: one, cpu: two." in said


def test_tables_have_a_cell_for_everything(tmp_path: Path) -> None:
    plan = a_plan("a", "b", seeds=1, target=2.0)
    write_run(tmp_path / "a/seed-1", [5.0, 3.0])
    runs = read_runs(tmp_path, plan)
    found = outcomes(plan, runs)
    for rows in (results_table(found), costs_table(plan, found), seeds_table(plan, runs, found), arms_table(plan)):
        assert len(rows) == 3 and len({len(row) for row in rows}) == 1
        assert len({len(line) for line in for_screen(rows)}) == 1
    assert results_table(found)[2] == ["b", "no run finished", *[NOTHING] * 5]
    assert [chance(p) for p in (None, 1e-9, 0.04321, 1.0)] == [NOTHING, "< 1e-6", "0.0432", "1"]


def test_the_newest_update_is_read_from_the_end_of_the_file(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    write_run(tmp_path / "run", [5.0, 3.0])
    assert last_step(tmp_path / "run") == STEPS
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 2')
    assert last_step(tmp_path / "run") == STEPS
    assert read_run(tmp_path, a_plan("x"), Arm("run", "", STEPS, 0, []), 1).status == "not begun"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"plan": {"arms": 3}}', '{"plan": {"arms": []}}'])
def test_a_damaged_plan_is_one_message(tmp_path: Path, damage: str) -> None:
    (tmp_path / "compare.json").write_text(damage)
    with pytest.raises(Exception, match="holds no comparison"):
        read_plan(tmp_path)
