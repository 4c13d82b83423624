"""Ranks: values over all of them, without pickle; what fails on one fails on all; wrong sums are seen."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from rank_processes import spawn
from regpt2.base.errors import ConfigError, DataError, FailedElsewhere, Problem
from regpt2.base.ranks import world as world_module
from regpt2.base.ranks.world import World, check_exchange, start_world

CPU = torch.device("cpu")


def on_ranks(size: int, port: int, scenario: str, out: Path) -> list[dict[str, object]]:
    spawn(rank_main, args=(size, port, scenario, str(out)), nprocs=size)
    return [json.loads((out / f"{scenario}-{rank}.json").read_text()) for rank in range(size)]


def rank_main(rank: int, size: int, port: int, scenario: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with start_world(CPU, timeout_s=30) as world:
            result = SCENARIOS[scenario](world)
    except Problem as problem:
        result = {"kind": type(problem).__name__, "text": str(problem), "exit_code": problem.exit_code}
    Path(out, f"{scenario}-{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def exchange(world: World) -> dict[str, object]:
    mine = {"rank": world.rank, "text": "ü" * world.rank, "none": None}
    return {
        "everyones": world.everyones(mine),
        "from_main": world.from_main(mine),
        "stack": world.stack(torch.tensor([world.rank, 7])).tolist(),
        "sum": world.sum_on_cpu(torch.tensor([2**62, world.rank])).tolist(),
        "max": float(world.max(torch.tensor(float(world.rank)))),
    }


def refuse(world: World) -> dict[str, object]:
    with world.together():
        if world.rank == 1:
            raise ConfigError("this rank has another recipe.")
    return {"left": True}


def refuse_twice(world: World) -> dict[str, object]:
    with world.together():
        raise DataError(f"rank {world.rank} cannot read.")
    return {"left": True}


def vanish(world: World) -> dict[str, object]:
    if world.rank == 1:
        os._exit(0)
    time.sleep(0.5)
    world.sum(torch.zeros(1))
    return {"left": False}


SCENARIOS = {"exchange": exchange, "refuse": refuse, "refuse_twice": refuse_twice, "vanish": vanish}


def test_values_reach_every_rank(tmp_path: Path, unused_port: int) -> None:
    results = on_ranks(3, unused_port, "exchange", tmp_path)
    said = [{"rank": rank, "text": "ü" * rank, "none": None} for rank in range(3)]
    for result in results:
        assert result["everyones"] == said
        assert result["from_main"] == said[0]
        assert result["stack"] == [[0, 7], [1, 7], [2, 7]]
        assert result["sum"] == [3 * 2**62 - 2**64, 3]  # 64-bit sums wrap around, as the digests of the data need it
        assert result["max"] == 2.0


def test_what_fails_on_one_rank_fails_on_all_and_is_said_by_that_one(tmp_path: Path, unused_port: int) -> None:
    silent, speaks = on_ranks(2, unused_port, "refuse", tmp_path)
    assert speaks == {"kind": "ConfigError", "text": "this rank has another recipe.", "exit_code": 2}
    assert silent["kind"] == "FailedElsewhere"
    assert silent["exit_code"] == 2
    assert "rank 1 failed: this rank has another recipe." in str(silent["text"])


def test_each_rank_that_fails_says_what_it_met(tmp_path: Path, unused_port: int) -> None:
    results = on_ranks(2, unused_port, "refuse_twice", tmp_path)
    assert [r["text"] for r in results] == ["rank 0 cannot read.", "rank 1 cannot read."]


def test_a_lost_rank_is_a_clear_message(tmp_path: Path, unused_port: int) -> None:
    spawn(rank_main, args=(2, unused_port, "vanish", str(tmp_path)), nprocs=2)
    stays = json.loads((tmp_path / "vanish-0.json").read_text())
    assert stays["kind"] == "Problem"
    assert "rank 0 has lost another rank" in str(stays["text"])


def test_a_rank_that_cannot_meet_the_others_is_a_clear_message(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(Problem, match=r"rank 1 of 2 could not connect to the others at 127.0.0.1"),
        start_world(CPU, timeout_s=1.0),
    ):
        pass


def test_alone_everything_is_the_identity() -> None:
    with start_world(CPU) as alone:
        assert alone.everyones("x") == ["x"]
        assert alone.from_main(3) == 3
        assert alone.stack(torch.tensor([1])).tolist() == [[1]]
        with pytest.raises(DataError, match="here"), alone.together():
            raise DataError("here")
        check_exchange(alone)


@pytest.mark.parametrize("broken", ["sum", "max", "stack"])
def test_a_backend_that_gives_wrong_values_is_refused(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo's average did in silence (pytorch#162338)."""
    right = getattr(World, broken)
    monkeypatch.setattr(World, broken, lambda self, value: right(self, value) * 2)
    monkeypatch.setattr(world_module.dist, "get_backend", lambda: "gloo")
    with pytest.raises(Problem, match=rf"rank 0: the {broken} of torch.float32 over 1 ranks is .* expected"):
        check_exchange(World(rank=0, local_rank=0, size=1, device=CPU))


def test_another_ranks_failure_has_that_ranks_exit_code() -> None:
    assert FailedElsewhere("rank 1 failed: x", 2).exit_code == 2
