"""EleutherAI's lm-evaluation-harness. In: a model and names of its tasks; out: its figures, printed and as JSON.

regpt2 harness runs/gpt2_124m --tasks hellaswag,lambada_openai
regpt2 harness hf:gpt2 --tasks my_task --include-path my_tasks
"""

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from regpt2 import __version__
from regpt2.base.console import figure, say
from regpt2.base.device import Precision, choose_compute, device_name, pick_device
from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.base.ranks.world import start_world
from regpt2.evals.measuring.harness import run_tasks
from regpt2.evals.scoring.context import EvalContext
from regpt2.model.files.load import KINDS, load_model
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.training.ranks.strategy import in_compute_type


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Measure a model by tasks of EleutherAI's lm-evaluation-harness."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=KINDS)]
    tasks: str
    """The harness's names of tasks, groups or tags, or paths of YAML files, separated by commas."""
    include_path: Path | None = None
    """A folder with tasks of your own, as YAML files."""
    limit: int = 0
    """Score only the first N examples of each task; 0 = all."""
    batch: int = 8
    """Sequences of the training length per forward pass; shorter ones are packed to the same number of tokens."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """Precision of the scores. Text is always generated in fp32."""
    out: Path | None = None
    """Also write the results to this JSON file."""


def main(arguments: list[str]) -> int:
    """`regpt2 harness MODEL --tasks NAMES [options]`."""
    options = parse(HarnessOptions, arguments, "regpt2 harness")
    _check(options)
    compute = choose_compute(options.precision, pick_device(options.device))
    with start_world(pick_device(options.device)) as world:
        loaded = load_model(options.model, device=world.device)
        context = EvalContext(
            model=in_compute_type(loaded.model, compute.dtype),
            world=world,
            data=None,
            seq_len=loaded.model.context_size,
            batch=options.batch,
            val_tokens=0,
            tokenizer=tokenizer_of(loaded),
        )
        found = run_tasks(context, options.tasks, include_path=options.include_path, limit=options.limit)
        if world.is_main:
            _show(found)
            if options.out is not None:
                about = {"model": loaded.source, "step": loaded.step, "device": device_name(world.device)}
                about |= {"precision": compute.precision, "torch": torch.__version__, "version": __version__}
                about |= {"lm_eval": importlib.metadata.version("lm_eval"), "limit": options.limit}
                kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot") if key in found}
                write_atomic(options.out, json.dumps({**about, **kept}, indent=2, default=str) + "\n")
    return 0


def _check(options: HarnessOptions) -> None:
    """Refuse wrong options before any work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise Problem("regpt2 harness needs the package lm_eval, which is not installed: pip install 'regpt2[harness]'")
    if options.batch < 1 or options.limit < 0:
        raise UsageError(f"--batch {options.batch} must be at least 1, --limit {options.limit} at least 0 (= all).")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UsageError(f"--include-path {options.include_path} must be a folder with YAML files.")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")


def _show(found: dict[str, Any]) -> None:
    for task, figures in found["results"].items():
        say(f"{task}  (version {found['versions'].get(task)}, {found['n-shot'].get(task)}-shot)")
        for key, value in figures.items():
            metric, comma, how = key.partition(",")  # "acc,none": how answers were filtered before they were judged
            if comma and not metric.endswith("_stderr"):
                stderr = figures.get(f"{metric}_stderr,{how}")
                shown = f" +- {stderr:.3g}" if isinstance(stderr, float) else ""
                say(f"  {metric if how == 'none' else key:<14} {figure(value, 5)}{shown}")
