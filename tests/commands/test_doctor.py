"""regpt2 doctor: a line for each check; what is broken fails it: mathematics, disks, data, ranks."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn import functional as F

from rank_processes import command_on_ranks, place
from regpt2.base.errors import UsageError
from regpt2.commands import doctor
from regpt2.machine.health import examine, machine_checks, run_checks
from regpt2.model import gpt
from warm_processes import Python

pytestmark = pytest.mark.seconds  # all of them together


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, str]]:
    """The exit code, and status and text of each check by its name."""
    code = doctor.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out.splitlines()[:-1]
    return code, {line[6:20].strip(): f"{line[:5].strip()} {line[20:]}" for line in printed}


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Path:
    tiny_recipe.write_text(f'run = "{tmp_path / "runs" / "tiny"}"\n{tiny_recipe.read_text()}')
    return tiny_recipe


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is on disks is looked at."""
    monkeypatch.setattr(examine, "machine_checks", lambda patient: {})


@pytest.mark.seconds
def test_a_good_machine_is_ready(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = lines(capsys, recipe, "--data", tiny_data, "--json", tmp_path / "out.json")
    assert code == 0, found
    assert {line.split()[0] for line in found.values()} <= {"ok", "warn"}
    for name in ("software", "device", "memory", "precision", "math fp32", "adamw", "matmul", "copy", "disk", "data"):
        assert name in found
    assert found["attention"].startswith("ok matmul at (1, 2, 32, 16)")
    assert found["precision"].startswith("ok fp32, set by the recipe")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["ready"] is True
    assert {row["check"] for row in written["findings"]} == set(found)
    assert next(row for row in written["findings"] if row["check"] == "copy")["figures"]["copy_bytes_per_s"] > 1e8
    assert not (tmp_path / "runs").exists()  # nothing is left, nothing made
    assert not list(tmp_path.glob(".doctor-*"))


def test_a_wrong_kernel_fails_the_machine(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sees_the_future(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(gpt, "causal_attention", sees_the_future)
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert found["math fp32"].startswith("FAIL against fp64 the loss is off by")


def test_figures_that_are_not_numbers_are_null_in_the_json(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = gpt.linear_cross_entropy
    monkeypatch.setattr(gpt, "linear_cross_entropy", lambda *given: loss(*given) * float("nan"))
    code, found = lines(capsys, recipe, "--quick", "--json", tmp_path / "out.json")
    assert code == 1
    assert "loss is off by nan" in found["math fp32"]
    rows = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)["findings"]
    assert next(row for row in rows if row["check"] == "math fp32")["figures"]["loss"] is None


def test_a_rank_that_the_others_wait_for_is_named() -> None:
    def row(rank: int, rate: float) -> dict[str, object]:
        return {"check": "matmul", "rank": rank, "figures": {"bf16_flops_per_s": rate, "other": rank}}

    assert not examine._slower("matmul", [row(0, 6.0e14), row(1, 5.5e14)])
    (found,) = examine._slower("matmul", [row(0, 6.0e14), row(1, 5.5e14), row(2, 4.0e14)])
    assert found["status"] == "warn"
    assert "rank 2 (400T) is below 80 % of the fastest" in found["found"]


def test_wrong_usage_is_not_a_finding(recipe: Path, tmp_path: Path) -> None:
    for wrong in (["no_such_recipe"], [recipe, "--device", "tpu"], [recipe, "--json", tmp_path]):
        with pytest.raises(UsageError):
            doctor.main([str(argument) for argument in wrong])


def test_a_check_that_crashes_is_a_line_and_not_a_traceback(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*given: object, **more: object) -> None:
        raise ZeroDivisionError("kernel 7 is not there\nmore")

    monkeypatch.setattr(machine_checks.rates, "attention_rate", crash)
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert found["attention"] == "FAIL the check crashed: ZeroDivisionError: kernel 7 is not there"
    assert found["tokenizer"].startswith("ok bytes")


def test_what_the_recipe_asks_and_the_machine_lacks_fails(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe.read_text().replace('precision = "fp32"', 'precision = "tf32"\ntrack = ["wandb"]')
    recipe.write_text(text)
    monkeypatch.setattr(run_checks, "_version", lambda package: "")
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert "precision = 'tf32' is not in the hardware" in found["precision"]
    assert found["packages"] == "FAIL extras: none; track needs wandb; pip install 'regpt2[wandb]'"
    assert found["math fp32"].startswith("ok")


def test_too_little_memory_fails(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "free_bytes", lambda device: 100_000)
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert found["memory"].startswith("FAIL 0.0 GB free")


@pytest.mark.usefixtures("no_machine")
def test_a_recipe_that_cannot_be_trained_here_fails(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(recipe.read_text().replace("batch_tokens = 256", "batch_tokens = 250"))
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert "the nearest is 256" in found["recipe"]
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(run_checks.free_memory, "free_bytes", lambda device: 4_000_000_000)
    code, found = lines(capsys, "gpt2_124m", "--quick", "--device", "cpu")
    assert code == 1
    assert "4.00 GB are free" in found["recipe"]
    assert found["data"].startswith("FAIL data/fineweb_edu_10B: there is no such data folder")


@pytest.mark.usefixtures("no_machine")
def test_damaged_data_fails(recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    shard = folder / "tiny_train_000000.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[-2] ^= 1
    shard.write_bytes(damaged)
    code, found = lines(capsys, recipe, "--data", folder)
    assert code == 1
    assert found["data"].startswith("FAIL")
    assert "has SHA-256" in found["data"]
    shard.write_bytes(damaged[:-100])
    code, found = lines(capsys, recipe, "--data", folder, "--quick")
    assert code == 1
    assert str(shard) in found["data"]


@pytest.mark.usefixtures("no_machine")
def test_data_of_another_vocabulary_fails(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, "--data", tiny_data, "--quick", "--device", "cpu")[0] == 0  # no recipe: nothing to contradict
    code, found = lines(capsys, "overfit_one_batch", "--data", tiny_data, "--quick")
    assert code == 1
    assert "the model 50,257" in found["data"]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.usefixtures("no_machine")
def test_a_folder_that_cannot_be_written_fails(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "locked"
    place.mkdir()
    if os.geteuid() == 0:  # to whom permissions mean nothing
        with mounted(place, "ro"):
            code, found = lines(capsys, recipe, "--run", place / "run", "--quick")
    else:
        place.chmod(0o500)
        code, found = lines(capsys, recipe, "--run", place / "run", "--quick")
    assert code == 1
    assert found["run folder"].startswith(f"FAIL {place}")


@pytest.mark.usefixtures("no_machine")
def test_a_full_disk_fails(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "small"
    place.mkdir()
    with mounted(place, "size=2m"):
        code, found = lines(capsys, recipe, "--run", place / "run", "--quick")
        assert code == 1
        assert "they need" in found["checkpoints"]
        (place / "others").write_bytes(bytes((2 << 20) - 4096))
        code, found = lines(capsys, recipe, "--run", place / "run")
        assert code == 1
        assert "No space left on device" in found["disk"]
        assert list(place.iterdir()) == [place / "others"]


@pytest.mark.usefixtures("no_machine")
def test_a_disk_without_working_locks_fails(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_checks, "try_lock", lambda file: True)
    code, found = lines(capsys, recipe, "--quick")
    assert code == 1
    assert "a locked file can be locked again" in found["run folder"]


@pytest.mark.usefixtures("no_machine")
def test_a_file_in_the_way_fails(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, found = lines(capsys, recipe, "--run", tmp_path / "file" / "run", "--quick")
    assert code == 1
    assert "is not a folder; choose another --run" in found["run folder"]


PLANT = """
import sys
import torch.distributed as dist
from regpt2.cli import main
right = dist.all_reduce
def wrong(value, *more, **named):
    done = right(value, *more, **named)
    if value.numel() > 1000 and dist.get_rank() == 1:
        value.view(-1)[-1] += 1
    return done
dist.all_reduce = wrong
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_are_examined_together_and_one_speaks(recipe: Path, tmp_path: Path, unused_port: int) -> None:
    said = command_on_ranks(2, unused_port, tmp_path, "doctor", recipe, "--json", tmp_path / "out.json", "--quick")
    assert said.count(" software ") == 1
    assert "2 ranks, sums correct" in said
    rows = json.loads((tmp_path / "out.json").read_text())["findings"]
    assert [row["rank"] for row in rows if row["check"] == "math fp32"] == [0, 1]
    assert [row["rank"] for row in rows if row["check"] == "run folder"] == [0]


def test_wrong_sums_of_one_rank_fail_all(recipe: Path, tmp_path: Path, unused_port: int) -> None:
    """Only of large tensors: those that every start checks are right."""
    (tmp_path / "planted.py").write_text(PLANT)
    ranks = [
        Python(tmp_path / "planted.py", "doctor", recipe, "--quick", env={**os.environ, **place(rank, 2, unused_port)})
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert re.search(r"^FAIL  all-reduce    of [\d,]+ sums over 2 ranks are wrong: 1 on rank 1\.$", said[0], re.M)
    assert "1 failed: not ready." in said[0]


def test_ranks_that_cannot_meet_are_a_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    start = doctor.start_world
    monkeypatch.setattr(doctor, "start_world", lambda device, timeout_s: start(device, timeout_s=1.0))
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    assert doctor.main([str(recipe), "--quick"]) == 1
    assert capsys.readouterr().out.startswith("FAIL  ranks         rank 1 of 2 could not connect to the others")
