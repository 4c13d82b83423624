"""Strict determinism: what it switches on, and that an operation without such a form is named."""

import json

import pytest
import torch

from regpt2.base.device import be_deterministic, undetermined_operation
from regpt2.base.errors import Problem
from regpt2.commands import evaluate, sample, train
from regpt2.evals.measuring import measure
from warm_processes import run_python

CODE = """
import json, os, torch, torch._inductor.config
from regpt2.base.device import be_deterministic
be_deterministic(torch.device("cuda"))
print(json.dumps([
    torch.are_deterministic_algorithms_enabled(),
    torch.is_deterministic_algorithms_warn_only_enabled(),
    os.environ["CUBLAS_WORKSPACE_CONFIG"],
    getattr(torch._inductor.config, "deterministic", True),
]))
"""


def test_on_a_gpu_nothing_undetermined_is_let_through() -> None:
    """Only asked to warn, torch would let attention choose cuDNN's kernel. No GPU is needed to be told so."""
    done = run_python("-c", CODE)
    assert json.loads(done.stdout) == [True, False, ":4096:8", True]


def test_a_cpu_is_left_as_it_is() -> None:
    be_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def torchs_own_error() -> RuntimeError:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    return caught.value


def test_torch_names_the_operation(torchs_own_error: RuntimeError) -> None:
    assert undetermined_operation(torchs_own_error) == "put_"
    assert undetermined_operation(RuntimeError("CUDA error")) == ""


def test_training_ends_by_its_name(torchs_own_error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: object) -> None:
        raise torchs_own_error

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(Problem, match=r"put_ has no deterministic form.*--deterministic"):
        train.main(["demo", "--deterministic"])


def test_sampling_and_evaluating_ask_for_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any model is loaded: the missing one ends each command."""
    asked: list[str] = []
    monkeypatch.setattr(sample, "be_deterministic", lambda device: asked.append("sample"))
    monkeypatch.setattr(measure, "be_deterministic", lambda device: asked.append("evaluate"))
    for verb, flags in ((sample, []), (evaluate, ["--evals", "lambada"])):
        for deterministic in ([], ["--deterministic"]):
            with pytest.raises(Problem):
                verb.main(["no/such/model", "--device", "cpu", *flags, *deterministic])
    assert asked == ["sample", "evaluate"]
