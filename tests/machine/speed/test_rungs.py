"""The ladder's rungs: each changes one thing, the last is the step of a real run, and a wrong one is seen."""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from operator import attrgetter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.errors import Problem, UsageError
from regpt2.base.options import parse
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.machine.speed import rungs
from regpt2.machine.speed.rungs import RUNGS, Rung, RungResult, climb, default_rungs, find_rungs, key_of
from regpt2.machine.speed.steps import DoesNotFit, StepTimes, StepWork, time_steps
from regpt2.machine.speed.table import cells, figures_of, for_markdown, for_screen, summary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import build_optimizer

TINY = StepWork(
    model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257),
    micro_batch=2,
    seq_len=32,
    device="cpu",
    warmup_steps=1,
    steps=2,
)
CPU = torch.device("cpu")


def here(rung: Rung, work: StepWork) -> StepTimes:
    """A real step, in this process."""
    return time_steps(work, began_at=0.0, on_step=lambda done: None)


def told(median_s: float = 1.0, **other: object) -> StepTimes:
    """Times made up."""
    times = StepTimes(
        step_s=[median_s] * 3, losses=[5.0, 4.9, 4.8], grad_norms=[1.0] * 3, tokens=64, flops_per_token=1e6,
        setup_s=1.0, peak_bytes=10**9, device="cpu: a test", precision="fp32", compiled=False,
        attention="matmul", torch="0",
    )  # fmt: skip
    return replace(times, **other)  # type: ignore[arg-type]


def by_name(rows: list[RungResult]) -> dict[str, RungResult]:
    return {row.rung: row for row in rows}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_changes_one_thing_and_the_last_is_training(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "pick_device", torch.device)
    names = [rung.name for rung in RUNGS if rung.only_on in ("", device) and rung.name != "fp16"]
    rows = list(climb(replace(TINY, device=device), find_rungs(names), time=lambda *_: told()))
    assert [row.rung for row in rows] == names and not any(row.why_not for row in rows)
    for before, after in pairwise(rows):
        old, new = asdict(before.work), asdict(after.work)
        changed = {name for name in old if old[name] != new[name]}
        parts = set(before.work.as_lecture) ^ set(after.work.as_lecture)
        if after.rung in ("train", "bf16"):  # "auto" is bf16 here; autocast and bf16 come together
            assert changed == {"precision", "as_lecture"} and len(parts) == 1
        else:
            assert len(changed) == 1, after.rung
            assert len(parts) <= 1 or parts == {"plain_attention", "torch_attention"}, after.rung
    assert rows[-1].work == replace(TINY, device=device, compile="on" if "compile" in names else "auto")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_option_of_a_rung_sets_in_training_what_the_rung_changes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rung without an option changes only how the lecture's first step was computed, and no setting of a run."""
    monkeypatch.setattr(rungs, "pick_device", torch.device)
    shown = [rung for rung in RUNGS if rung.only_on in ("", device)]
    work, plain = rungs.lowest(replace(TINY, device=device)), load_recipe("gpt2_124m")
    for rung in shown:
        before, work = work, rung.change(work)
        config = parse(RunConfig, rung.option.split(), "regpt2 train gpt2_124m", default=plain)
        if rung.name == "adamw":
            assert config.optim.name == "adamw" and build_optimizer(GPT(TINY.model), config.optim).defaults["fused"]
        elif rung.option:
            setting = rung.option.split()[0].removeprefix("--").replace("-", "_")
            assert attrgetter(setting)(config) == attrgetter(setting)(work), rung.name
            assert setting.split(".")[-1] == rung.name or str(attrgetter(setting)(work)) == rung.name
        elif rung.name != "train":  # which goes back to training's own choice, "auto"
            assert replace(work, as_lecture=()) == replace(before, as_lecture=()), rung.name
            assert set(work.as_lecture) != set(before.as_lecture)


def test_every_rung_of_a_cpu_computes_the_same() -> None:
    rows = list(climb(TINY, find_rungs(default_rungs(CPU)), time=here))
    reasons = {row.rung: row.why_not for row in rows if row.why_not}
    assert reasons.keys() == {"tf32"} or reasons.keys() == {"tf32", "bf16", "stream"}, reasons
    assert "not in the hardware" in reasons["tf32"]
    found = by_name(rows)
    assert found["flash"].times and found["flash"].times.attention == "flash"
    assert found["fp32"].times and found["fp32"].times.attention == "matmul"
    last = figures_of(rows)[-1]
    assert last is not None and 0 < last.loss_apart < 2e-3


def not_causal(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3) @ v


def louder(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **named: 1.01 * function(*arguments, **named)


@pytest.mark.parametrize("plant", ["attention", "loss", "nan"])
def test_a_rung_that_computes_something_else_is_wrong_and_not_fast(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if plant == "attention":
        monkeypatch.setattr(F, "scaled_dot_product_attention", not_causal)
    bad = {
        "loss": lambda t: replace(t, losses=[1.01 * x for x in t.losses]),
        "nan": lambda t: replace(t, losses=[float("nan")] * 3),
    }

    def time(rung: Rung, work: StepWork) -> StepTimes:
        return bad.get(plant, lambda t: t)(here(rung, work)) if rung.name == "flash" else here(rung, work)

    rows = list(climb(TINY, find_rungs(["fp32", "flash", "vocab_multiple"]), time=time))
    wrong, after = rows[1:]
    assert wrong.is_wrong and wrong.why_not.startswith("WRONG")
    assert figures_of(rows)[1] is None and wrong.why_not in for_screen(rows)[2]
    assert "plain_attention" in after.work.as_lecture and not after.why_not, "what is wrong is not built upon"


def test_a_gradient_that_is_wrong_shows_though_the_loss_is_right() -> None:
    def time(rung: Rung, work: StepWork) -> StepTimes:
        times = here(rung, work)
        return replace(times, grad_norms=[1.02 * x for x in times.grad_norms]) if rung.name == "flash" else times

    assert "norm of the gradient" in list(climb(TINY, find_rungs(["fp32", "flash"]), time=time))[1].why_not


def test_an_overflow_of_fp16_is_no_error() -> None:
    times = {"fp32": told(), "fp16": told(precision="fp16", grad_norms=[float("inf")] * 3, losses=[5.0, 5.0, 4.9])}
    rows = list(climb(TINY, find_rungs(["fp32", "fp16"]), time=lambda rung, _: times[rung.name]))
    assert not rows[1].why_not


def test_a_rung_that_a_machine_cannot_do_says_why_and_is_left_out_of_the_next() -> None:
    def time(rung: Rung, work: StepWork) -> StepTimes:
        if rung.name == "compile":
            raise Problem("there is no Triton")
        if rung.name == "flash":
            raise DoesNotFit("100 GB wanted")
        return told()

    rows = list(climb(TINY, find_rungs(["fp32", "compile", "flash", "vocab_multiple"]), time=time))
    assert [row.why_not for row in rows] == ["", "there is no Triton", "out of memory: 100 GB wanted", ""]
    assert rows[3].work.compile == "off" and "plain_attention" not in rows[3].work.as_lecture
    assert not any(row.is_wrong for row in rows)


def test_what_was_measured_with_the_same_settings_is_not_measured_again() -> None:
    chosen = find_rungs(["fp32", "flash"])
    first = list(climb(TINY, chosen, time=lambda *_: told(2.0)))
    known = {key_of(asdict(row.work)): row.times for row in first if row.times}
    again = list(climb(TINY, chosen, known=known, time=lambda *_: pytest.fail("measured again")))
    assert again == first
    longer = list(climb(replace(TINY, steps=3), chosen, known=known, time=lambda *_: told(3.0)))
    assert all(row.times and row.times.median_s == 3.0 for row in longer)


def test_an_unknown_rung_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'flash'"):
        find_rungs(["flesh"])


def test_the_table_has_medians_gains_and_reasons() -> None:
    def time(rung: Rung, work: StepWork) -> StepTimes:
        if rung.name == "tf32":
            raise Problem("no | TF32")
        return told() if rung.name == "fp32" else told(0.25, step_s=[0.2, 0.25, 0.3])

    rows = list(climb(TINY, find_rungs(["fp32", "tf32", "flash"]), time=time))
    figures = figures_of(rows)[2]
    assert figures is not None
    assert (figures.step_ms, figures.tokens_per_s, figures.gain, figures.in_all) == (250, 256, 4, 4)
    assert (figures.low_ms, figures.high_ms) == pytest.approx((210, 290))
    assert figures.mfu is None, "of a CPU no data sheet is known"
    assert figures.palm_flop_per_s > figures.flop_per_s
    assert cells(rows)[3][:6] == ["flash", "96 ms x1.35", "250.0", "±16.0%", "256", "x4.00"]
    assert {len(line) for line in for_screen(rows)[1:4:2]} == {len(for_screen(rows)[0])}
    assert for_screen(rows)[2].endswith("no | TF32")
    assert {line.count("|") for line in for_markdown(rows)} == {11, 0, 4}, "times, then what the rungs change"
    assert "| tf32 | TF32 | --precision tf32 |" in for_markdown(rows)
    assert summary(rows)[:2] == [
        "From fp32 to flash: x4.00.",
        "From fp32 to flash: x4.00; in the lecture, on an A100: x10.42.",
    ]
    assert summary(rows[1:2]) == ["No rung could be measured."]
