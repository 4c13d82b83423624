"""What is free: the machine, control groups, the limit on address space, and the ranks that share it."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regpt2.base import free_memory
from regpt2.base.free_memory import free_bytes

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_process_may_take_what_the_machine_has_free() -> None:
    free = free_bytes(CPU)
    assert free is not None
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * (int(lines["MemTotal"].split()[0]) + int(lines["SwapTotal"].split()[0]))
    assert 1e6 < free <= total


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_free_on_machine", lambda: 8_000)
    monkeypatch.setattr(free_memory, "_free_in_groups", list)
    assert free_bytes(CPU) == 8_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 2_000


def test_a_limit_on_address_space_counts() -> None:
    code = "import torch; from regpt2.base.free_memory import free_bytes; print(free_bytes(torch.device('cpu')))"
    limit = 8 << 30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=limited)
    assert int(done.stdout) < limit


@pytest.mark.parametrize(("version", "cached"), [("2", "inactive_file"), ("1", "total_inactive_file")])
def test_the_narrowest_control_group_counts(
    version: str, cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = tmp_path / "box", tmp_path / "box" / "job"
    inner.mkdir(parents=True)
    limit, taken = ("memory.max", "memory.current") if version == "2" else free_memory._GROUPS[1][1:3]
    for folder, limit_bytes, taken_bytes in ((outer, 1_000, 900), (inner, 700, 400)):
        (folder / limit).write_text(f"{limit_bytes}\n")
        (folder / taken).write_text(f"{taken_bytes}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{cached} 50\n")
    line = "0::/box/job\n" if version == "2" else "4:memory:/box/job\n0::/\n"
    (tmp_path / "cgroup").write_text(line)
    groups = tuple((str(tmp_path), *names[1:]) for names in free_memory._GROUPS)
    monkeypatch.setattr(free_memory, "_GROUPS", groups)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path / "cgroup")
    assert sorted(free_memory._free_in_groups()) == [150, 350]
    (inner / limit).write_text("max\n")
    assert free_memory._free_in_groups() == [150]


def test_a_real_control_group_counts(tmp_path: Path) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"regpt2-test-{tmp_path.name}"
    if not group.parent.is_dir():
        pytest.skip("no memory groups of version 1 here")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError:
        pytest.skip("control groups may not be made here")
    code = "import torch; from regpt2.base.free_memory import free_bytes; print(free_bytes(torch.device('cpu')))"
    inside = f'echo $$ > {group}/cgroup.procs && exec {sys.executable} -c "{code}"'
    try:
        done = subprocess.run(["sh", "-c", inside], capture_output=True, text=True, check=True)
        assert 1 << 30 < int(done.stdout) < 2 << 30
    finally:
        group.rmdir()
