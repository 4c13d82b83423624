"""The same bits again? A killed and resumed run beside an uninterrupted one; the cost of deterministic kernels.

With `--deterministic` the checkpoints of both runs must be equal, bit by bit, and so must the gradients of two passes.
With default kernels equal bits are only recorded. The runs need tyro.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu_items import Check
from gpu_items._right import BY_VALUES
from gpu_timing import TINY, call_times, spread
from regpt2.base.device import be_deterministic, can_compile, choose_compute, pick_device
from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.base.record.metrics import read_events
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.strategy import make_trainable

TEXTS = Path(__file__).parents[2] / "docs"
RECIPE = """
max_steps = {steps}
save_every = {save_every}
eval_every = 0
sample_every = 0
log_every = 1
[model]
n_layer = {n_layer}
n_head = {n_head}
n_embd = {n_embd}
block_size = {seq_len}
vocab_size = 257
dropout = 0.1
[batch]
batch_tokens = {batch_tokens}
micro_batch = 8
seq_len = {seq_len}
"""
SMALL = {"steps": 400, "save_every": 100, "n_layer": 4, "n_head": 4, "n_embd": 256, "seq_len": 256}
TINIEST = {"steps": 100, "save_every": 20, "n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 16}
COMPILED_S = 40  # for runs whose step is compiled


def run(check: Check) -> None:
    device = pick_device(check.device)
    ways = (False, True) if can_compile(device) else (False,)
    if importlib.util.find_spec("tyro") is None:
        check.keep("exact resume after SIGKILL", skipped="the training loop needs tyro: see --wheels")
    else:
        exact_resume(check, device, ways)
    costs(check, device, ways)


def exact_resume(check: Check, device: torch.device, ways: tuple[bool, ...]) -> None:
    """Rows of real runs, in processes of their own; their messages are in this item's log."""
    folder = check.folder / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sizes = TINIEST if check.smoke else SMALL
    recipe, data = folder / "recipe.toml", folder / "data"
    recipe.write_text(RECIPE.format(**sizes, batch_tokens=2 * 8 * sizes["seq_len"]))
    regpt2 = [sys.executable, "-m", "regpt2"]
    prepare = [*regpt2, "prepare", "text_files", "--input", TEXTS, "--tokenizer", "bytes", "--val-tokens", "20000"]
    if (code := subprocess.run([*map(str, prepare), "--out", str(data)]).returncode) != 0:
        raise Problem(f"regpt2 prepare ended with code {code}: see {check.log}")
    train = [*regpt2, "train", recipe, "--data", data, "--device", device.type, "--deterministic"]
    for compiled in ways:
        if compiled and check.left_s < COMPILED_S:
            return
        way = "compiled" if compiled else "eager"
        command = [*train, "--compile", "on" if compiled else "off"]
        killed_and_not(check, f"exact resume after SIGKILL, {way}", command, folder / way, sizes)
    shutil.rmtree(folder)


def killed_and_not(check: Check, name: str, train: list[object], folder: Path, sizes: dict[str, int]) -> None:
    """Both runs at the same time; the killed one is then resumed to its end."""
    whole, killed = ([*map(str, train), "--run", str(folder / run)] for run in ("whole", "killed"))
    started_at = time.time()
    with subprocess.Popen(whole) as one, subprocess.Popen(killed) as other:
        had = kill_after(other, folder / "killed" / "checkpoints", f"step-{sizes['save_every']:08d}")
    if check.dry and BY_VALUES.search(reason := last_words(folder / "whole")):
        check.keep(name, not_compared=True, why=f"the loop believed a pretended GPU's values: {reason}")
        return
    if one.returncode or not had:
        raise Problem(f"{name}: the runs ended with codes {one.returncode} and {other.returncode}: see {check.log}")
    if (again := subprocess.run(killed).returncode) != 0:
        raise Problem(f"{name}: the resumed run ended with code {again}: see {check.log}")
    last = f"step-{sizes['steps']:08d}"
    if last in had:
        check.keep(name, not_shown="the run ended before it could be killed")
        return
    ends = [digests(folder / run / "checkpoints" / last) for run in ("whole", "killed")]
    differing = [file for file, digest in ends[0].items() if ends[1][file] != digest]
    check.judge(
        name,
        steps=sizes["steps"],
        resumed_at=max(int(checkpoint.removeprefix("step-")) for checkpoint in had),
        seconds=time.time() - started_at,
        ok=not differing,
        why=f"other bits in {', '.join(differing)}" if differing else "",
    )


def kill_after(process: subprocess.Popen[bytes], checkpoints: Path, name: str) -> list[str]:
    """SIGKILL a few steps after the checkpoint exists; returns the checkpoints that remain."""
    while process.poll() is None and not (checkpoints / name).exists():
        time.sleep(0.002)
    time.sleep(0.05)
    process.kill()
    process.wait()
    return [path.name for path in checkpoints.glob("step-*")]


def last_words(run: Path) -> str:
    """Why a run ended, by its own record; empty if the record has no reason."""
    ends = [event for event in read_events(run / "metrics.jsonl") if event["event"] == "end"]
    return f"{ends[-1]['reason']} at step {ends[-1]['step']}" if ends else ""


def digests(checkpoint: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}


def costs(check: Check, device: torch.device, ways: tuple[bool, ...]) -> None:
    """Loss and gradient of two blocks at the real width; default kernels come first, as the mode cannot be undone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first call in this process
    dtype = choose_compute("auto", device).dtype
    for deterministic in (False, True):
        if deterministic:
            be_deterministic(device)
        for compiled in ways:
            torch.compiler.reset()
            name = f"{'compiled' if compiled else 'eager'}, {'deterministic' if deterministic else 'default'} kernels"
            differing, times = again_and_again(check, device, dtype, compiled=compiled)
            if deterministic:
                check.judge(name, **times, ok=not differing, why=f"other bits in {differing[:3]}" if differing else "")
            else:
                check.keep(name, **times, same_bits=not differing, differing=", ".join(differing[:3]))


def again_and_again(
    check: Check, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> tuple[list[str], dict[str, float]]:
    """The names of tensors whose bits differ between passes, and the milliseconds of a pass."""
    world = World(rank=0, local_rank=0, size=1, device=device)
    model = GPT(TINY if check.smoke else GPTConfig(n_layer=2), seed=1).to(device)
    trainable = make_trainable(model, dtype, world, compiled=compiled)
    shape = (2, 33) if check.smoke else (32, 1025)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = trainable(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    gradients()  # compiling, choosing kernels
    tries = [{name: g.clone() for name, g in gradients().items()} for _ in range(2 if check.smoke else 5)]
    differing = sorted({n for one in tries[1:] for n, g in one.items() if not torch.equal(g, tries[0][n])})
    return differing, spread(call_times(gradients, device, **({"calls": 2, "warmup": 1} if check.smoke else {})))
