"""Rates of matmuls: right arithmetic on a known clock, and nothing of a run is touched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from regpt2.model import matmul_rate as module
from regpt2.model.flops import flops_per_token
from regpt2.model.gpt import GPTConfig
from regpt2.model.matmul_rate import matmul_rate, model_shapes, seconds_of, square_rate

CPU = torch.device("cpu")


def test_the_median_of_repetitions_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = 0.0, iter([100.0, 1.0, 9.0, 2.0])

    def work() -> None:
        nonlocal now
        now += next(took)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    assert seconds_of(work, CPU, at_least_s=0.0) == 2.0


def test_the_shapes_are_those_of_a_forward_pass() -> None:
    model = GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=1000)
    flops = sum(2 * n * rows * inputs * outputs for rows, inputs, outputs, n in model_shapes(model, 10))
    attention = 2 * 64 * 128 * 3  # C T L, forward
    assert flops == 10 * (flops_per_token(model, 128) / 3 - attention)


def test_a_matmul_rate_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 10.0])
    monkeypatch.setattr(module, "seconds_of", lambda *work, **more: next(times))
    found = matmul_rate([(2, 3, 4, 5), (2, 3, 10, 1)], torch.float32, CPU, at_least_s=1.0)
    assert found == (2 * 2 * 3 * 4 * 5 + 2 * 2 * 3 * 10) / (5 * 1.0 + 10.0)


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (lambda n: n**3 / 1e11, [256, 512]),  # 512 takes 1.3 ms
        (lambda n: n**3 / 1e12, [256, 512, 1024]),  # a faster machine shows its rate only with larger ones
        (lambda n: n**3 / 1e9, [256, 512]),  # a slow one too is not judged by the smallest alone
    ],
)
def test_squares_grow_until_they_show_the_rate_and_the_fastest_run_counts(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], sizes: list[int]
) -> None:
    tried: list[int] = []

    def timed(work: Any, device: torch.device, *, times: int) -> list[float]:
        x, weight = work.args
        assert x.shape == weight.shape and x.dtype == torch.bfloat16
        tried.append(len(x))
        return [1e-9, *[7 * seconds(len(x))] * (times - 2), seconds(len(x))]  # the first is not yet the kernel's own

    monkeypatch.setattr(module, "timed", timed)
    assert square_rate(torch.bfloat16, CPU) == pytest.approx(2 * 512**3 / seconds(512))
    assert tried == sizes


def test_measuring_draws_no_number_of_a_run_and_changes_no_setting() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert square_rate(torch.float32, CPU) > 0
    matmul_rate([(8, 8, 8, 1)], torch.float32, CPU, at_least_s=0.0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before[1:]
