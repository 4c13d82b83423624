"""Rates: right arithmetic on a known clock, real files, and what is wrong is said."""

from pathlib import Path

import pytest
import torch

from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.machine.speed import rates

CPU = torch.device("cpu")


def test_attention_says_its_kernel() -> None:
    long = rates.attention_rate((1, 2, 384, 16), torch.float32, CPU, at_least_s=0.0)
    short = rates.attention_rate((1, 2, 64, 16), torch.float32, CPU, at_least_s=0.0)
    assert (long[0], short[0]) == ("flash", "matmul")
    assert long[2] > 0


def test_a_compiled_flex_attention_is_no_matmul() -> None:
    """Compiled it is one kernel of this name, as Inductor calls it."""
    name = "triton_tem_fused__unsafe_view_flex_attention_split_transpose_view_11"

    def work() -> None:
        with torch.profiler.record_function(name):
            torch.ones(2) @ torch.ones(2)

    assert rates.attention_kernel(work) == "FlexAttention"


def test_copies_are_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "seconds_of", lambda *work, **more: 2.0)
    assert rates.copy_rate(CPU, 1000, at_least_s=0.0) == 1000.0


def test_a_disk_keeps_what_was_written(tmp_path: Path) -> None:
    assert min(rates.disk_rate(tmp_path / "file", 3 << 20)) > 0
    assert (tmp_path / "file").stat().st_size == 3 << 20


def test_a_disk_that_changes_a_byte_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(file: object) -> None:
        data = bytearray((tmp_path / "file").read_bytes())
        data[-1] ^= 1
        (tmp_path / "file").write_bytes(data)

    monkeypatch.setattr(rates, "forget_cached", damage)
    with pytest.raises(Problem, match="does not hold what was written"):
        rates.disk_rate(tmp_path / "file", 3 << 20)


def test_wrong_sums_over_ranks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = World(rank=0, local_rank=0, size=1, device=CPU)
    assert rates.exchange_seconds(alone, 4096) >= 0

    def wrong(self: World, value: torch.Tensor) -> torch.Tensor:
        value[7] += 1
        return value

    monkeypatch.setattr(World, "sum", wrong)
    with pytest.raises(Problem, match="of 1,024 sums over 1 ranks are wrong: 1 on rank 0"):
        rates.exchange_seconds(alone, 4096)
