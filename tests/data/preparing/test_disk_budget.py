"""How much disk is asked for, and which parts may be begun: simulated preparations."""

from pathlib import Path

import pytest

from regpt2.base.errors import Problem, UsageError
from regpt2.data.preparing import disk_budget as space_module
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.sources.plan import InputFile, Part, Plan, Slice

GB = 1_000_000_000


def plan(n_parts: int, text_bytes: int, *, remote_bytes: int = 0, n_tokens: int = 0) -> Plan:
    path, url = ("", "https://a/b") if remote_bytes else ("/a", "")
    parts = (
        Part((Slice(InputFile(path, f"{n}", remote_bytes or text_bytes, 0, url=url)),), text_bytes)
        for n in range(n_parts)
    )
    return Plan(tuple(parts), "source", "revision", n_tokens=n_tokens)


def test_the_need_of_fineweb_edu_is_what_the_docs_say() -> None:
    fineweb = plan(14, 2 * 28_518_193_415 // 14, remote_bytes=28_518_193_415 // 14, n_tokens=9_953_989_344)
    one, eight = (Space(fineweb, "gpt2", 100_000_000, workers, None) for workers in (1, 8))
    assert one.download_bytes == pytest.approx(28.5 * GB, rel=0.01)
    assert one.shards_bytes == pytest.approx(2 * 1.05 * 9.954 * GB, rel=0.01)
    assert one.most_bytes == one.least_bytes == pytest.approx(24.8 * GB, rel=0.01)
    assert eight.most_bytes == pytest.approx(49.5 * GB, rel=0.01)
    assert Space(fineweb, "gpt2", 100_000_000, 8, 30 * GB).most_bytes == 30 * GB


def test_too_low_a_limit_and_too_full_a_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"--disk-limit 0\.001 is too little: 0\.1 GB of shards and one file at a time"
    ):
        Space(plan(100, 1_000_000), "gpt2", 1_000_000, 2, 1_000_000).require(tmp_path)
    monkeypatch.setattr(space_module, "free_bytes", lambda folder: 5)
    monkeypatch.setattr("regpt2.base.files.free_bytes", lambda folder: 5)
    with pytest.raises(Problem, match=r"needs .* free some space"):
        Space(plan(100, 1_000_000), "gpt2", 1_000_000, 2, None).require(tmp_path)


@pytest.mark.seconds
@pytest.mark.parametrize("tokens_per_byte", [0.1, 0.22, 0.5])
@pytest.mark.parametrize("workers", [1, 2, 16])
def test_without_a_limit_no_worker_waits(tokens_per_byte: float, workers: int) -> None:
    """Whatever the text turns out to hold: parts wait for a shard to be full, workers for nothing."""
    part_bytes, shard_tokens = 2_000_000, 100_000_000
    space = Space(plan(2000, part_bytes), "gpt2", shard_tokens, workers, None)
    packed, waiting = 0, 0.0
    may_begin = space.admission(lambda: packed, lambda: int(2 * waiting))
    for index, part in enumerate(space.plan.parts):
        if index >= workers:
            packed += 1
            waiting = (waiting + tokens_per_byte * part_bytes) % shard_tokens
        assert may_begin((index, part)), f"part {index} has to wait"


def test_within_a_limit_what_is_begun_and_not_packed_is_bounded() -> None:
    files = plan(20, 4_000, remote_bytes=2_000, n_tokens=20_000)
    packed = 0
    least = Space(files, "gpt2", 100, 8, None).least_bytes
    may_begin = Space(files, "gpt2", 100, 8, least + 5_000).admission(lambda: packed, lambda: 0)
    tasks = list(enumerate(files.parts))
    assert [may_begin(task) for task in tasks[:4]] == [True, True, False, False]  # 4,100 bytes each
    packed = 7
    assert [may_begin(task) for task in tasks[7:11]] == [True, True, False, False]
