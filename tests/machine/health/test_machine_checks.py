"""Findings about a machine: what is odd is a warning that says what to do. Rates are planted, as if it were so."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from regpt2.base.device import choose_compute
from regpt2.base.ranks.world import World
from regpt2.config.run import RunConfig
from regpt2.data.loader import BatchConfig
from regpt2.machine.health import machine_checks
from regpt2.machine.health.patient import Patient
from regpt2.model.gpt import GPTConfig

CPU = torch.device("cpu")
CONFIG = RunConfig(
    model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257),
    batch=BatchConfig(batch_tokens=256, micro_batch=2, seq_len=32),
    precision="fp32",
)
PATIENT = Patient(World(rank=0, local_rank=0, size=1, device=CPU), CONFIG)


def patient_with(**changes: object) -> Patient:
    return dataclasses.replace(PATIENT, config=dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cores", "threads", "ranks", "advice"),
    [(8, 8, 1, ""), (4, 4, 2, "OMP_NUM_THREADS=2"), (8, 1, 2, "OMP_NUM_THREADS=4 (torchrun sets 1)"), (8, 4, 2, "")],
)
def test_threads_that_do_not_fit_the_cores(
    cores: int, threads: int, ranks: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "cores_here", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = machine_checks.device(dataclasses.replace(PATIENT, ranks_here=ranks))
    assert found.status == ("warn" if advice else "ok")
    assert advice in found.advice


def test_other_work_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.os, "cpu_count", lambda: 4)
    for load, status in ((0.3, "ok"), (3.0, "warn")):
        monkeypatch.setattr(machine_checks.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert machine_checks.other_work(PATIENT).status == status


def test_a_driver_without_a_gpu_for_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "torch sees no GPU" in machine_checks.software(PATIENT).found


@pytest.mark.skipif(choose_compute("auto", CPU).precision != "bf16", reason="this CPU has no bf16")
def test_bf16_that_is_slower_than_fp32_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 2e11, torch.bfloat16: 1e11}
    monkeypatch.setattr(machine_checks, "matmul_rate", lambda shapes, dtype, device, **more: rates[dtype])
    found = machine_checks.matmul(patient_with(precision="auto"))
    assert (found.status, found.advice) == ("warn", "bf16 is slower than fp32 here: --precision fp32")
    assert found.found == "at the model's shapes fp32 200 GFLOP/s, bf16 100 GFLOP/s"


@pytest.mark.parametrize(("square", "status"), [(7.7e14, "ok"), (5e14, "warn")])
def test_a_card_below_its_data_sheet_is_said(square: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "peak_flops", lambda device, precision: 9.894e14)
    monkeypatch.setattr(machine_checks, "nvidia_smi", lambda device, fields: ["1200", "1980", "690", "700", "71"])
    monkeypatch.setattr(machine_checks, "matmul_rate", lambda *given, **more: square)
    found = machine_checks.matmul(PATIENT)
    assert found.status == status
    assert f"{100 * square / 9.894e14:.0f} % of the data sheet" in found.found
    assert ("clock 1200 of 1980 MHz, 690 of 700 W, 71 C" in found.advice) == (status == "warn")


def test_an_exchange_that_costs_more_than_a_fifth_of_the_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "matmul_rate", lambda *given, **more: 1e9)
    two_ranks = dataclasses.replace(PATIENT.world, size=2)
    batch = dataclasses.replace(CONFIG.batch, batch_tokens=2_000_000)
    two = dataclasses.replace(patient_with(batch=batch), world=two_ranks)
    work_s = 1e6 * machine_checks.flops_per_token(PATIENT.config.model, 32) / 1e9
    for share, status in ((0.1, "ok"), (0.3, "warn")):
        monkeypatch.setattr(machine_checks.rates, "exchange_seconds", lambda *given, share=share: share * work_s)
        found = machine_checks.all_reduce(two)
        assert found.status == status
        assert found.figures["compute_s"] == pytest.approx(work_s)


def test_a_compiler_that_makes_wrong_code_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.torch, "compile", lambda function: lambda x: function(x) * 1.001)
    found = machine_checks.compiling(patient_with(compile="on"))
    assert found.status == "FAIL"
    assert "a small kernel is off by" in found.found
    assert machine_checks.compiling(PATIENT).status == "ok"  # not used on a CPU


def test_a_container_has_the_cores_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(machine_checks.Path, "exists", lambda self: True)
    for text, cores in (("max 100000\n", 64), ("250000 100000\n", 3)):
        monkeypatch.setattr(machine_checks.Path, "read_text", lambda self, text=text: text)
        assert machine_checks.cores_here() == cores


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of one, said here without one."""
    h200 = SimpleNamespace(
        total_memory=150_110_011_392, major=9, minor=0, multi_processor_count=132, uuid="1-2", name="NVIDIA H200"
    )
    said = {
        "get_device_properties": h200,
        "get_device_name": h200.name,
        "get_device_capability": (9, 0),
        "device_count": 8,
        "memory_reserved": 0,
        "memory_allocated": 0,
        "mem_get_info": (140_000_000_000, h200.total_memory),
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(machine_checks, "nvidia_smi", lambda device, fields: ["580.65"])
    monkeypatch.setattr(machine_checks.rates, "copy_rate", lambda *given, **more: 2e12)
    on_card = dataclasses.replace(PATIENT, world=dataclasses.replace(PATIENT.world, device=torch.device("cuda", 0)))
    assert "NCCL 2.27.5" in machine_checks.software(on_card).found
    assert "NVIDIA H200, 8 visible, 150.1 GB, compute capability 9.0, 132 m" in machine_checks.device(on_card).found
    assert (machine_checks.other_work(on_card).status, "10.1 GB" in machine_checks.other_work(on_card).found) == (
        "warn",
        True,
    )
    assert machine_checks.memory(on_card).found.startswith("140.0 GB free for this rank")
    assert machine_checks.copying(on_card).advice == "expected at least 60 % of 4,800 GB/s: check other processes"
    assert on_card.supported == ["fp32", "tf32", "bf16", "fp16"]
    torch.set_float32_matmul_precision("medium")  # as on a CPU
