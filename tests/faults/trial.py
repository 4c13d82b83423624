"""What a trial trains: a tiny recipe on tiny data through the real command. In: a run folder; out: its digest."""

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import points
from suite import Bench

from regpt2 import cli
from regpt2.base.errors import CheckpointError
from regpt2.base.record.metrics import read_events
from regpt2.run import ending
from regpt2.training import checkpoint

STEPS, SAVE_EVERY, KEEP = 24, 4, 3
RECIPE = f"""
max_steps = {STEPS}
eval_every = 8
sample_every = 12
save_every = {SAVE_EVERY}
keep_checkpoints = {KEEP}
device = "cpu"
precision = "fp32"
[model]
n_layer = 2
n_head = 2
n_embd = 64
block_size = 32
vocab_size = 257
dropout = 0.1
[batch]
batch_tokens = 256
micro_batch = 2
seq_len = 32
[optim]
lr = 3e-3
[schedule]
warmup_steps = 4
[evals]
val_tokens = 512
[sample]
prompt = "a"
n = 1
max_new_tokens = 4
[guard]
window = 16
"""
# 3.2 million weights and two moments each: 39 MB, so that a kill can land inside the write
BIG_RECIPE = RECIPE.replace("n_layer = 2", "n_layer = 4").replace("n_embd = 64", "n_embd = 256")
MUON = RECIPE.replace("dropout = 0.1", 'architecture = "modern"').replace("[optim]", '[optim]\nname = "muon"')
# Attention's window grows from 4 to 16 tokens, by 4 every 6 updates, so kills fall before and after each growth.
INGREDIENTS = ("document_mask", "weightless_norms", "half_rotary", "value_embeddings", "unet_skips", "x0_mixing")
WINDOWS = MUON.replace(
    "[batch]", "\n".join(["window = 16", "mlp_only_layer = 1", *(f"{name} = true" for name in INGREDIENTS), "[batch]"])
).replace("[schedule]", "[schedule]\nwindow_from = 4")
RECIPES = {"adamw": RECIPE, "muon": MUON, "windows": WINDOWS}

WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "by", "at", "from", "his")


def write_text(path: Path, n_bytes: int, seed: int = 0) -> Path:
    """Lines of words, the same for the same seed."""
    rng = random.Random(seed)
    lines: list[str] = []
    size = 0
    while size < n_bytes:
        lines.append(" ".join(rng.choices(WORDS, k=12)) + f" {rng.randrange(1000)}.")
        size += len(lines[-1]) + 1 + (len(lines) % 6 == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line + "\n" * (n % 6 == 5) for n, line in enumerate(lines)) + "\n")
    return path


def prepare_data(bench: Bench, n_bytes: int = 200_000) -> Path:
    """A data folder of several shards, made by the real `regpt2 prepare`."""
    folder = bench.shared / "data"
    if not (folder / "manifest.json").exists():  # it is written last
        with bench.alone():
            _prepare(bench, folder, n_bytes)
    return folder


def _prepare(bench: Bench, folder: Path, n_bytes: int) -> None:
    text = write_text(bench.shared / "text" / "a.txt", n_bytes)
    options = ["--input", text, "--tokenizer", "bytes", "--out", folder, "--workers", 1, "--shard-tokens", 50_000]
    code = bench.fork(lambda: cli.main(["prepare", "text_files", *map(str, options)])).wait()
    assert code == 0, "the data could not be prepared"


def arguments(bench: Bench, run: Path, *more: object, recipe: str = RECIPE) -> list[str]:
    """The command line of a training run on the bench's data."""
    name = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    path = bench.folder / f"{name}.toml"
    if not path.exists():  # a trial may be reading it
        path.write_text(recipe)
    return ["train", str(path), "--data", str(prepare_data(bench)), "--run", str(run), *map(str, more)]


def start(
    bench: Bench,
    run: Path,
    *more: object,
    recipe: str = RECIPE,
    before: Callable[[], object] | None = None,
    page: bool = False,
) -> "points.zygote.Trial":
    """Fork the real `regpt2 train`. `before` arms what should happen in it; without `page` no report is drawn."""
    argv = arguments(bench, run, *more, recipe=recipe)

    def work() -> int:
        if not page:  # 0.7 s of matplotlib that has no part in most faults
            ending.write_report = lambda run: run / "report.html"
        if before is not None:
            before()
        return cli.main(argv)

    return bench.fork(work)


def finish(bench: Bench, run: Path, *more: object, recipe: str = RECIPE) -> None:
    """Start or go on with a run, undisturbed, to its end."""
    trial = start(bench, run, *more, recipe=recipe)
    if (code := trial.wait(120)) != 0:
        raise AssertionError(f"an undisturbed run ended with exit code {code}: {trial.said[-1500:]}")


def reference(bench: Bench, recipe: str = RECIPE) -> dict[str, Any]:
    """The digest of a run that nothing disturbs; computed once."""
    run = bench.shared / f"reference-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    prepare_data(bench)
    with bench.alone():
        if not run.exists():
            finish(bench, run, recipe=recipe)
    return digest(run)


def digest(run: Path, step: int = STEPS) -> dict[str, Any]:
    """All that must be equal: weights, all of the optimizer's state, the run's, losses, evaluations, samples.

    What a clock measured (names that end in `_s`, `_ms`) has no place in it.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    found: dict[str, Any] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).exists() else "missing"
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.CONFIG)
    }
    if (folder / checkpoint.STATE).exists():
        found["state"] = timeless(json.loads((folder / checkpoint.STATE).read_text()))
    events = list(read_events(run / "metrics.jsonl"))
    for kind in ("train", "eval", "sample"):
        found[kind] = [timeless(event) for event in events if event["event"] == kind]
    return found


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by name; its lock does not count."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock measured."""
    return {k: v for k, v in values.items() if not k.endswith(("_s", "_ms")) and k != "mfu"}


def last_logged(run: Path) -> int:
    """The last update that the record knows; 0 for none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    return max((e["step"] for e in read_events(path) if e["event"] == "train"), default=0)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a record."""
    return [event for event in read_events(run / "metrics.jsonl") if event["event"] == kind]


def unloadable(run: Path, keep: int = KEEP) -> list[str]:
    """What is wrong with the checkpoints under their final names; empty if all is well.

    The newest `keep` must verify; an older one may be half removed. A folder set aside means that one was bad.
    """
    checkpoints = run / "checkpoints"
    wrong = [f"{path.name} was set aside" for path in checkpoints.glob("bad-*")]
    for folder in checkpoint.folders(checkpoints)[-keep:]:
        try:
            checkpoint.verify(folder)
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 for none."""
    names = [folder.name for folder in checkpoint.folders(run / "checkpoints")]
    return int(names[-1].removeprefix("step-")) if names else 0


def wait_for_step(trial: "points.zygote.Trial", run: Path, step: int) -> bool:
    """Until the record shows an update; False if the trial ended before."""

    def seen() -> bool:
        time.sleep(0.005)
        return last_logged(run) >= step

    return trial.until(seen)
