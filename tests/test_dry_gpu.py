"""`benchmarks/dry_gpu/`: the stand-in compiles and behaves, its scripts start, its tables say what was measured."""

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from warm_processes import run_python

DRY = Path(__file__).parents[1] / "benchmarks" / "dry_gpu"
STAND_IN = DRY / "stand_in"
ROOT = DRY.parents[1]
sys.path.insert(0, str(DRY))
table = importlib.import_module("table")

needs_gcc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("gcc") or not shutil.which("nm"),
    reason="the dry GPU is made by gcc, on Linux",
)
FLAGS = ["-std=c11", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", f"-I{STAND_IN}"]
# Of CUDA's header as much as runtime.c uses; the build takes the real one, from the packages beside torch.
HEADER = """
#include <stddef.h>
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor;
    int maxBlocksPerMultiProcessor, regsPerBlock, regsPerMultiprocessor, l2CacheSize, memoryBusWidth;
    int maxGridSize[3], maxThreadsDim[3];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};
struct cudaFuncAttributes { int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion; };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes { enum cudaMemoryType type; void *devicePointer, *hostPointer; };
"""
TORCH = """
int cudaMalloc(void); int cudaOther(void); int cublasSgemm_v2(void); int cudnnGetVersion(void); int printf_(void);
int torch(void) { return cudaMalloc() + cudaOther() + cublasSgemm_v2() + cudnnGetVersion() + printf_(); }
"""


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, **options)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiled as build.sh does, but for the header and for a torch that is three lines."""
    folder = tmp_path_factory.mktemp("dry_gpu")
    libraries = folder / "site" / "torch" / "lib"
    libraries.mkdir(parents=True)
    (folder / "driver_types.h").write_text(HEADER)
    (folder / "torch.c").write_text(TORCH)
    run("gcc", "-shared", "-fPIC", folder / "torch.c", "-o", libraries / "libtorch_cuda.so", check=True)
    for name in ("driver", "runtime"):
        made = run("gcc", *FLAGS, "-isystem", folder, "-c", STAND_IN / f"{name}.c", "-o", folder / f"{name}.o")
        assert made.returncode == 0, made.stderr
    objects = [folder / "driver.o", folder / "runtime.o"]
    stubs = run(sys.executable, STAND_IN / "stubs.py", folder / "site", *objects)
    assert stubs.returncode == 0, stubs.stderr
    (folder / "stubs.c").write_text(stubs.stdout)
    assert run("gcc", *FLAGS, "-c", folder / "stubs.c", "-o", folder / "stubs.o").returncode == 0
    run("gcc", "-shared", "-o", folder / "libdry.so", *objects, folder / "stubs.o", "-ldl", check=True)
    return ctypes.CDLL(str(folder / "libdry.so"))


def count(library: ctypes.CDLL, name: str) -> int:
    return ctypes.c_long.in_dll(library, f"dry_{name}").value


@needs_gcc
def test_stubs_are_made_for_what_is_missing_and_only_for_that(stand_in: ctypes.CDLL) -> None:
    before = count(stand_in, "gemms")
    assert stand_in.cudaOther() == stand_in.cublasSgemm_v2() == 0
    assert count(stand_in, "gemms") - before == 1
    for name in ("cudnnGetVersion", "printf_"):  # the real cuDNN answers the first; the other is not CUDA's
        with pytest.raises(AttributeError):
            getattr(stand_in, name)


@needs_gcc
def test_memory_is_counted_until_there_is_none(stand_in: ctypes.CDLL) -> None:
    first, second, free, total = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    size = ctypes.c_size_t(100 * 10**9)
    assert stand_in.cudaMalloc(ctypes.byref(first), size) == 0
    assert stand_in.cudaMalloc(ctypes.byref(second), size) == 2, "cudaErrorMemoryAllocation"
    assert stand_in.cudaFree(first) == 0
    assert stand_in.cudaMalloc(ctypes.byref(second), size) == 0
    assert second.value != first.value
    stand_in.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    assert free.value == 50 * 10**9 < total.value
    stand_in.cudaFree(second)


@needs_gcc
def test_values_read_back_are_made_up_or_those_last_sent(stand_in: ctypes.CDLL) -> None:
    address, number, n_found, truth = ctypes.c_void_p(), ctypes.c_float(), ctypes.c_int(), ctypes.c_bool()
    sent, got = (ctypes.c_int * 3)(1, 5, 3), (ctypes.c_int * 3)(9, 9, 9)

    def copy(to: object, source: object, n_bytes: int) -> None:
        assert stand_in.cudaMemcpy(to, source, ctypes.c_size_t(n_bytes), 0) == 0

    stand_in.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(4096))
    copy(ctypes.byref(number), address, 4)
    copy(ctypes.byref(n_found), address, 4)
    copy(ctypes.byref(truth), address, 1)
    copy(got, address, 12)
    assert (n_found.value, truth.value, list(got)) == (1, True, [1, 1, 1])
    assert 0 < number.value < 1e-30, "no loss is zero, none is infinite"
    copy(address, sent, 12)
    before = count(stand_in, "copies_to_host"), count(stand_in, "syncs")
    copy(got, address, 12)
    assert list(got) == [1, 5, 3]
    assert (count(stand_in, "copies_to_host"), count(stand_in, "syncs")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("script", ["step", "loss_bytes", "ranks", "table", "plan_memory", "stand_in/stubs"])
def test_scripts_say_what_they_do_and_start_on_no_other_machine(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    helped = run_python(DRY / f"{script}.py", "--help", env=environment)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage:")
    started = run_python(DRY / f"{script}.py", env=environment)
    assert started.returncode != 0
    assert "There is no dry GPU" in started.stderr or "usage:" in started.stderr


@needs_gcc
@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_shell_scripts_show_their_usage(script: str) -> None:
    shown = run(DRY / script, "--help")
    assert (shown.returncode, "Usage:" in shown.stdout) == (2, True)


@needs_gcc
def test_nvidia_smi_answers_each_field() -> None:
    asked = run(STAND_IN / "nvidia-smi", "--id=0", "--format=csv,noheader", "--query-gpu=name,clocks.sm,no.such")
    assert asked.stdout == "NVIDIA H200, 1980, [N/A]\n"


def counted(launches: int, gemms: int) -> dict[str, int]:
    return {"launches": launches, "triton_launches": 10, "gemms": gemms, "cudnn_plans": 0}


STEP = {
    "script": "step",
    "name": "GPT-2, Muon",
    "of_model": {"graphs": 1, "breaks": 0},
    "of_all": {"graphs": 3, "breaks": 1},
    "first_micro_step": counted(100, 5),
    "further_micro_step": counted(150, 5),
    "update": counted(50, 0),
    "waits_in_step": 2,
    "sync_error": "called a synchronizing CUDA operation",
    "peak_bytes": 30e9,
    "planned_bytes": 20e9,
}
LOSS = {
    "script": "loss_bytes",
    "name": "ours",
    "tokens": 65536,
    "width": 768,
    "peak_bytes": 8.5e9,
    "first_peak_bytes": 10.5e9,
    "generated_bytes": 1e9,
    "operator_bytes": 2e9,
    "own_kernel_bytes": 3e9,
    "ms_per_update": 101.49,
}
RANKS = {
    "script": "ranks",
    "name": "ordered, eager",
    "graphs": 0,
    "breaks": 0,
    "exchanges": [{"at": 0.251}, {"at": 1.0}, {"at": 1.0}],
    "during_backward": 1,
    "waits_in_step": 0,
    "sync_error": "",
}
FAILED = {"script": "step", "name": "modern", "failed": "exit code 1: out of memory", "seconds": 1}


def test_tables_show_each_row_once_and_what_failed() -> None:
    about = {"commit": "1234567", "python": "3.11.7", "torch": "2.11.0+cu130", "cuda": "13.0"}
    text = table.tables({"about": about, "rows": [STEP, LOSS, RANKS, FAILED]})
    assert "| GPT-2, Muon | 1 + 2 | 1 | 115 / 165 | 5 | 60 | 2: called a synchronizing CUDA operation |" in text
    assert "| 30.0 / 20.0 = 1.50 | 8.50 | 101.5 |" in text
    assert "| ours | 65,536 | 768 | 8.50 | 10.50 | 1.0 / 2.0 / 3.0 | 101.5 |" in text
    assert "| ordered, eager | 0 | 0 | 3 | 1 | 25, 100 x 2 | 0 |" in text
    assert text.endswith("step: modern: exit code 1: out of memory")
    alone = table.tables({"about": about, "rows": [STEP]})
    assert "| 30.0 / 20.0 = 1.50 | - | - |" in alone


def test_every_row_of_a_step_has_its_head_and_loss() -> None:
    assert {loss for _, loss in table.STEPS.values()} <= set(table.LOSSES)
