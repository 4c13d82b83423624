"""benchmarks/: turns, results and tables; every kind of side on tiny work; a trainer that runs on by itself."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

names = ("bare_matmuls", "exports", "generation", "profile_step", "run", "sides", "tables", "training", "works")
bare_matmuls, exports, generation, profile_step, run, sides, tables, training, works = map(
    importlib.import_module, names
)

TINY = works.TrainingWork(model=works.TINY_TRAINED, micro_batch=2, seq_len=64)
FAKE = """
import sys
sys.path.insert(0, sys.argv[1])
from sides import serve
print("a peer that prints")
serve(lambda: {"wall_s": float(sys.argv[2]), "cpu_s": None, "turn": 1})
"""
CLONE = """
from dataclasses import dataclass
import torch
from regpt2.model import gpt

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool

class GPT(gpt.GPT):
    def __init__(self, config):
        print("a peer that prints")
        super().__init__(gpt.GPTConfig(**{key: value for key, value in vars(config).items() if key != "bias"}))

    def forward(self, x, y):
        return None, super().forward(x, y)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
TRAINER = """
import itertools, time
for i in itertools.count():
    time.sleep(0.05)
    print(f"step {i}: train loss {9 - i}.5 (took {i}.0 ms)")
"""


def fake(wall_s: float) -> list[str]:
    """A side that says it took so long."""
    return [sys.executable, "-c", FAKE, str(BENCHMARKS), str(wall_s)]


@pytest.mark.process
def test_sides_take_turns_and_the_ratio_is_of_neighbors() -> None:
    warmup, rows = sides.take_turns({"a": fake(1.0), "b": fake(3.0)}, least=3, most=9, seconds=0)
    assert len(warmup) == 1 and len(rows) == 3
    assert sides.ratios(rows, "a", "b", "wall_s") == [3.0, 3.0, 3.0]
    assert sides.ratios(rows, "a", "b", "cpu_s") == []  # not measured


@pytest.mark.process
def test_short_work_is_done_many_times_a_turn() -> None:
    _, rows = sides.take_turns({"a": fake(0.1), "b": fake(0.2)}, least=1, most=1, seconds=0)
    assert rows[0]["a"]["wall_s"] == pytest.approx(0.1 / 5)  # a turn of 0.5 s is 5 works, and each answer is for all


@pytest.mark.process
def test_a_side_that_dies_is_named_with_its_last_words() -> None:
    dies = [sys.executable, "-c", "import sys; sys.exit('no such kernel')"]
    with pytest.raises(sides.SideFailed, match="b: no such kernel"):
        sides.take_turns({"a": fake(1.0), "b": dies}, least=1, most=1, seconds=0)


def entry(peer: str, their_s: float) -> dict[str, Any]:
    found = {"kind": "training", "work": "124M, B=4, T=1024", "precision": "bf16", "peer": peer, "tokens": 4096}
    found |= {"ratio": their_s / 2, "ratio_spread": [1.0, 3.0], "cpu_ratio": None, "our_s": 2.0, "their_s": their_s}
    return found | {"our_peak_bytes": 3 * 10**9, "their_peak_bytes": 4 * 10**9}


def test_a_result_measured_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run.save(out, "cpu", "results", [entry("one", 4.0)])
    run.save(out, "cpu", "results", [entry("two", 4.0)])
    run.save(out, "cpu", "results", [entry("one", 8.0)])
    assert [(found["peer"], found["their_s"]) for found in json.loads(out.read_text())["results"]] == [
        ("one", 8.0),
        ("two", 4.0),
    ]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.update_readme(readme, [out])
    said = readme.read_text()
    assert "| bf16 | one | **4.00x** (1.00-3.00) | - | 2,048 / 512 | 3.00 / 4.00 = 0.75 |" in said
    assert said.startswith("before\n") and said.endswith("\nafter\n") and "old" not in said


def test_a_share_of_the_limit_stands_beside_the_ratio() -> None:
    """A step of 2 s whose matmuls alone take 1 s is at half of their rate; theirs, of 4 s, at a quarter."""
    turn = {run.OURS: {"wall_s": 2.0}, "one": {"wall_s": 4.0}, run.LIMIT: {"wall_s": 1.0}}
    slower = {name: {"wall_s": 3 * side["wall_s"]} for name, side in turn.items()}  # a minute in which all are slow
    found = run.limit(TINY, [turn, slower, turn], "one")
    assert (found["our_share"], found["their_share"]) == (0.5, 0.25)
    assert found["matmul_flops_per_s"] == bare_matmuls.flops(TINY)
    shared = entry("one", 4.0) | {"our_share": 0.5, "their_share": 0.25, "matmul_flops_per_s": 406e9}
    assert run.of_limit(shared) == "; ours at 50%, theirs at 25% of the bare matmuls' 406 GFLOP/s"
    first, _, one, two = tables.table("training", [shared, entry("two", 4.0)]).splitlines()[2:]
    assert first.endswith(f"| {tables.SHARES} |")
    assert one.endswith("| 50% / 25% of 406 GFLOP/s |") and two.endswith("| - |")
    assert tables.SHARES not in tables.table("training", [entry("two", 4.0)])  # files of before


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_bare_matmuls_are_those_of_a_training_step(accumulated: int) -> None:
    """As torch counts the products of a whole step of transformers' GPT-2, less those of attention."""
    work = works.dataclasses.replace(TINY, grad_accum_steps=accumulated)
    products = bare_matmuls.step(work, "fp32")
    with FlopCounterMode(display=False) as bare:
        products()
    assert bare.get_total_flops() == bare_matmuls.flops(work)
    step, pairs = training.theirs(work, "transformers", "fp32", False, Path()), training.batches(work)
    with FlopCounterMode(display=False) as whole:
        step(pairs)
    counts = {str(name): n for name, n in whole.get_flop_counts()["Global"].items()}
    linear = counts["aten.mm"] + counts["aten.addmm"]
    padded = exports.GPTConfig(**work.model.sizes()).padded_vocab_size
    head = 6 * work.tokens * work.model.n_embd
    assert linear - head * work.model.vocab_size == bare.get_total_flops() - head * padded


def test_the_tables_of_the_readme_are_those_of_its_files() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    block = text[text.index(tables.BEGIN) + len(tables.BEGIN) : text.index(tables.END)].strip()
    files = [BENCHMARKS / "results" / name for name in re.findall(r"^`results/([\w.-]+\.json)`: ", block, re.MULTILINE)]
    assert block == tables.block(files)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_no_two_comparisons_are_kept_under_one_name(device: str, quick: bool) -> None:
    plan = works.plan(device, quick=quick)
    names = [run.key(run.identity(each, side)) for each in plan for side in each.rivals]
    assert quick or len(set(names)) == len(names) > 7
    for each in plan:  # what travels to a side comes back as it was
        kind = type(each.work)
        assert kind.from_json(json.loads(json.dumps(run.dataclasses.asdict(each.work)))) == each.work


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_peer_does_the_same_work(precision: str) -> None:
    if precision == "bf16" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("no bf16 here")
    pairs = training.batches(TINY)
    ours, theirs = training.ours(TINY, precision), training.theirs(TINY, "transformers", precision, False, Path())
    first = [float(step(pairs)) for step in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], abs=run.SAME_WORK)
    later = [[float(step(pairs)) for _ in range(4)][-1] for step in (ours, theirs)]
    assert all(late < early for late, early in zip(later, first, strict=True))  # both learn


def test_a_generation_peer_makes_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = exports.GPT(exports.GPTConfig(**works.TINY.sizes()))
    for name in ("native", "huggingface"):
        exports.export(model, tmp_path, name, None)
    work = works.GenerationWork(model=works.TINY, batch=2, prompt_tokens=8, new_tokens=6)
    ours, theirs = (make(work, "fp32", tmp_path)() for make in (generation.ours, generation.transformers))
    assert ours == theirs and [len(row) for row in ours] == [6, 6]


def test_a_side_with_another_model_is_found_out() -> None:
    text = works.Comparison(works.GenerationWork(model=works.TINY, batch=1), (works.SideSpec("llama.cpp", "fp32"),))
    assert run.sameness(text, text.rivals[0], {"ids": [[1, 2]]}, {"ids": [[1, 3]]}) == {"same_ids": 0.5}
    with pytest.raises(sides.SideFailed, match="not the same model"):
        run.sameness(text, text.rivals[0], {"ids": [[1, 2]]}, {"ids": [[3, 2]]})
    step = works.Comparison(TINY, (works.SideSpec("nanoGPT", "fp32"),))
    for loss in (5.0, float("nan")):
        with pytest.raises(sides.SideFailed, match="not the same work"):
            run.sameness(step, step.rivals[0], {"loss": 5.5}, {"loss": loss})


@pytest.mark.process
def test_one_command_measures_and_leaves_out_who_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone, out = tmp_path / "nanoGPT" / "model.py", tmp_path / "results.json"
    clone.parent.mkdir()
    clone.write_text(CLONE)
    words = ["B=4, T=64, fp32: nanoGPT", "B=1, T=64, bf16: build-nanogpt"]
    options = ["--quick", "--device", "cpu", "--peers", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["run.py", *options, "--only", *words])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert not ended.value.code
    (found,) = json.loads(out.read_text())["results"]
    assert found["peer"] == "nanoGPT" and found["ratio"] > 0 and len(found["turns_s"]) == run.TINY_PAIRS
    assert found["their_first_loss"] == pytest.approx(found["our_first_loss"], abs=1e-3)
    assert 0 < found["our_share"] < 1 and 0 < found["their_share"] < 1
    shown = capsys.readouterr().out
    assert "bf16: build-nanogpt, compiled is left out: it is not installed, or not in --peers" in shown
    assert re.search(r"as fast \(.*\); ours at \d+%, theirs at \d+% of the bare matmuls' \d+ GFLOP/s", shown)


@pytest.mark.seconds
def test_a_profile_finds_every_matmul_and_a_floor_for_it() -> None:
    found = profile_step.profile_step(TINY, "fp32", steps=1)
    parts = {part["part"]: part for part in found["parts"]}
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "head"):
        for way in ("forward", "dgrad", "wgrad"):
            assert parts[f"{layer} {way}"]["ms"] > 0 and parts[f"{layer} {way}"]["floor_ms"] > 0
    assert {"attention forward", "attention backward", profile_step.OPTIMIZER, profile_step.LOSS} <= parts.keys()
    assert not any(name.startswith("other ") and name.endswith(("forward", "dgrad", "wgrad")) for name in parts)
    assert sum(part["ms"] for part in found["parts"]) == pytest.approx(1e3 * found["profiled_step_s"], rel=0.05)


def stands_still(pid: int) -> bool:
    """Within some seconds: a signal takes its time."""
    for _ in range(500):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_trainer_that_runs_on_by_itself_stands_still_between_turns() -> None:
    llmc = importlib.import_module("llmc")
    inner, outer = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=outer)
    os.close(outer)
    try:
        found = llmc.steps(process, inner, "cpu")
        seen = []
        for _ in range(3):
            seen.append(next(found))
            assert stands_still(process.pid)
        assert [(step["loss"], step["wall_s"]) for step in seen] == [(9.5, 0.0), (7.5, 0.002), (5.5, 0.004)]
    finally:
        process.kill()
        process.wait()
        found.close()
