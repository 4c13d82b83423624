"""`regpt2 plan`: what it says, what it refuses, its exit codes; and the same check before training."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from regpt2.base.errors import ConfigError, UsageError
from regpt2.commands import plan
from regpt2.commands.train import main as train
from regpt2.machine.planning import disk, run_time
from regpt2.run import setup
from warm_processes import run_python


def planned(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "plan.json"
    code = plan.main([*arguments, "--json", str(out)])
    return code, json.loads(out.read_text())


def test_the_lectures_run_on_eight_gpus_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(tmp_path, "gpt2_124m", "--machine", "h100", "--gpus", "8", "--price", "2.5")
    shown = capsys.readouterr().out
    assert code == 0
    assert found["tokens"] == 19_073 * 524_288
    assert found["seconds"]["training"] == pytest.approx(45 * 60, rel=0.1)  # llm.c: 45 minutes
    assert found["money"] == pytest.approx(2.5 * found["gpu_hours"])
    assert found["disk"]["checkpoints_bytes"] == 4 * 12 * 124_475_904
    assert sum(found["memory"]["parts"].values()) == found["memory"]["bytes"]
    for line in ("time ", "training", "llm.c on 8 x H100", "cost", "activations", "disk for data", "micro_batch"):
        assert line in shown


def test_a_micro_batch_that_the_gpus_cannot_share_is_made_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(tmp_path, "gpt2_124m", "--machine", "H100", "--gpus", "64")
    assert code == 0
    assert (found["micro_batch"], found["ranks"], found["nodes"]) == (8, 64, 8)
    assert next(one for one in found["micro_batches"] if one["micro_batch"] == 8)["grad_accum_steps"] == 1
    shown = capsys.readouterr().out
    assert "gpt2_124m on 64 x H100 in 8 nodes" in shown
    assert "the cost of several nodes by formula" in " ".join(shown.split())
    assert found["step"]["spread"] == 0.25
    assert "micro_batch 64 -> 8: an update of 524,288 tokens on 64 GPUs is 8 sequences per GPU" in shown
    assert "the recipe's" not in shown
    assert "train with --batch.micro-batch 8" in shown


def test_the_smaller_micro_batch_divides_and_fits(tmp_path: Path) -> None:
    """48 sequences each: of 48, 24, 16, 12, ... below 64 an H100 holds 16 of the largest model."""
    where = [
        "--machine",
        "H100",
        "--gpus",
        "8",
        "--batch.micro-batch",
        "64",
        "--batch.batch-tokens",
        str(8 * 48 * 1024),
    ]
    code, found = planned(tmp_path, "gpt2_1558m", *where)
    assert code == 0
    assert found["micro_batch"] == 16
    assert planned(tmp_path, "gpt2_124m", *where)[1]["micro_batch"] == 48


def test_nodes_and_their_network_cost_time(tmp_path: Path) -> None:
    def parts(*more: str) -> dict[str, float]:
        return planned(tmp_path, "gpt2_124m", "--machine", "H100", "--gpus", "16", *more)[1]["step"]["parts"]

    one_node, two, slow = parts("--gpus-per-node", "16"), parts(), parts("--network-gbps", "10")
    assert one_node["slowest rank"] == 0 < two["slowest rank"]
    assert one_node["exchange"] < two["exchange"] < slow["exchange"] / 3
    assert parts("--parallel.reduce-dtype", "bf16")["exchange"] < 0.6 * two["exchange"]


def test_the_scaling_table_is_for_people_and_for_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpt2_124m", "--machine", "H100", "--gpus", "8", "--price", "2.5"]
    assert planned(tmp_path, *arguments)[1]["scaling"] is None
    assert "efficiency" not in capsys.readouterr().out
    code, found = planned(tmp_path, *arguments, "--scaling")
    assert code == 0
    shown = capsys.readouterr().out
    assert "GPUs  nodes" in shown
    for line in ("Efficiency first falls below 80% at 64 GPUs", "updates of 2,097,152 tokens", "FSDP begins to pay"):
        assert line in " ".join(shown.split())
    rows = {one["gpus"]: one for one in found["scaling"]["rows"]}
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert rows[8]["update_s"] == pytest.approx(found["step"]["seconds"])
    assert rows[8]["hours"] * 8 == pytest.approx(found["gpu_hours"])
    assert rows[8]["money"] == pytest.approx(found["money"])
    assert found["scaling"]["larger_batch_pays_at"] == 64
    assert found["scaling"]["larger_batch_efficiency"] > rows[64]["efficiency"]
    code, found = planned(tmp_path, "gpt2_1558m", "--machine", "4090", "--scaling")
    assert found["scaling"]["rows"][0]["update_s"] is None
    assert found["scaling"]["fsdp_pays_at"] == 2
    assert "where DDP does not fit" in capsys.readouterr().out


def test_what_does_not_fit_ends_with_1_and_the_micro_batch_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(tmp_path, "gpt2_1558m", "--machine", "A100-80", "--gpus", "8", "--batch.micro-batch", "64")
    assert code == 1
    assert not found["fits"]
    best = found["best_micro_batch"]
    assert next(one for one in found["micro_batches"] if one["micro_batch"] == best)["fits"]
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert f"--batch.micro-batch {best}" in shown
    assert planned(tmp_path, "gpt2_1558m", "--machine", "T4")[1]["best_micro_batch"] is None


@pytest.mark.seconds
def test_a_disk_that_is_too_small_ends_with_1(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    code, found = planned(tmp_path, str(tiny_recipe), "--run", str(tmp_path / "run"))
    assert code == 1
    assert "GB are free" in found["disk"]["lacks"][0]
    assert "TOO LITTLE SPACE" in capsys.readouterr().out


@pytest.mark.seconds
def test_prepared_data_are_counted(tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, str(tiny_recipe), "--data", str(tiny_data))[1]
    assert found["disk"]["data_bytes"] == 2 * 20_000
    assert found["disk"]["to_prepare_bytes"] == 0


@pytest.mark.process
def test_measured_steps_tell_the_time(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_time, "MEASURE_S", 0.0)
    code, found = planned(tmp_path, str(tiny_recipe), "--measure")
    assert code == 0
    assert "measured here" in found["step"]["how"]
    assert 0 < found["step"]["seconds"] < 5
    assert found["measured"]["peak_bytes"] == pytest.approx(found["measured"]["predicted_bytes"], rel=0.2)


def test_muons_iterations_are_a_part_of_an_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, shared = (
        planned(tmp_path, "modern_124m", "--machine", "H100", "--gpus", gpus)[1]["step"]["parts"]["orthogonalization"]
        for gpus in ("1", "8")
    )
    assert alone == pytest.approx(8 * shared)  # 48 and 24 matrices: no rank has padding
    assert "orthogonalization 1.3" in capsys.readouterr().out
    assert planned(tmp_path, "gpt2_124m", "--machine", "H100")[1]["step"]["parts"]["orthogonalization"] == 0
    assert "orthogonalization" not in capsys.readouterr().out


def test_a_precision_that_nobody_has_measured_has_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "gpt2_124m", "--machine", "H100", "--precision", "fp32")[1]
    assert found["step"] is None
    assert found["gpu_hours"] is None
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2_124m", "--machine", "H10"], "did you mean 'h100'"),
        (["gpt2_124m", "--machine", "H100", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["gpt2_124m", "--machine", "H100", "--gpus", "3"], r"512 sequences of 1,024 tokens; 2 or 4 can"),
        (["gpt2_124m", "--machine", "H100", "--gpus", "1024"], r"512 sequences of 1,024 tokens; 512 can"),
        (["gpt2_124m", "--machine", "H100", "--gpus", "12"], r"multiple of --gpus-per-node 8, .* 8 and 16"),
        (["gpt2_124m", "--machine", "H100", "--gpus-per-node", "0"], "--gpus-per-node 0 must be at least 1"),
        (["gpt2_124m", "--machine", "H100", "--network-gbps", "0"], "--network-gbps 0 must be positive"),
        (["gpt2_124m", "--machine", "H100", "--network-gbps", "nan"], "--network-gbps nan must be positive"),
        (["gpt2_124m", "--machine", "H100", "--scaling", "--measure"], "leave out --measure"),
        (["gpt2_124m", "--machine", "H100", "--scaling", "--precision", "fp32"], "name a GPU with --machine"),
        (["gpt2_124m", "--machine", "cpu", "--scaling"], "name a GPU with --machine"),
        (["gpt2_124m", "--machine", "H100", "--measure"], "without --machine"),
        (["gpt2_124m", "--machine", "cpu", "--gpus", "2"], "--gpus 2 needs GPUs, and this machine has none"),
        (["gpt2_124m", "--machine", "H100", "--nodes", "2"], "--gpus is the number of GPUs in all nodes"),
        (["gpt2_124m", "--price", "-1"], "must be at least 0"),
        (["gpt2_124", "--machine", "H100"], "did you mean 'gpt2_124m'"),
        (["--machine", "H100"], "the recipe comes first"),
    ],
)
def test_wrong_usage_is_answered_with_the_mend(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan.main(arguments)


def test_alone_it_lists_the_recipes(regpt2: Run) -> None:
    done = regpt2("plan")
    assert done.returncode == 2
    assert "gpt2_124m" in done.stdout


def test_training_refuses_what_the_device_cannot_hold(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    arguments = [str(tiny_recipe), "--data", str(tiny_data), "--run", str(run), "--max-steps", "1"]
    monkeypatch.setattr(setup, "free_bytes", lambda device: 900_000)
    with pytest.raises(ConfigError, match=r"micro_batch = 2 .* GB are free.*--no-check-memory"):
        train(arguments)
    assert not run.exists()
    assert train([*arguments, "--no-check-memory"]) == 0


def test_training_under_a_real_limit_stops_before_its_first_step(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "wide.toml"
    recipe.write_text(
        'max_steps = 1\nprecision = "fp32"\ndevice = "cpu"\n'
        "[model]\nn_layer = 12\nn_head = 8\nn_embd = 2048\nblock_size = 32\n"
        "vocab_size = 257\n[batch]\nbatch_tokens = 64\nmicro_batch = 2\nseq_len = 32\n"
    )
    limited = (  # in address space; the states alone would take 9.7 GB
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from regpt2.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = run_python("-c", limited, "train", recipe, "--data", tiny_data, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "GB are free" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mixture_takes_the_place_of_the_recipes_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["gpt2_124m", "--machine", "H100", "--mix", "a=0.7", "b=0.3"]) == 0
    assert "gpt2_124m on H100" in capsys.readouterr().out
