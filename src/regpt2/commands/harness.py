"""EleutherAI's lm-evaluation-harness. In: a model and names of its tasks; out: its figures, printed and as JSON.

The harness words the prompts and works out the metrics; scoring and generation are ours.

regpt2 harness runs/gpt2_124m --tasks hellaswag,lambada_openai
regpt2 harness hf:gpt2 --tasks my_task --include-path my_tasks
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from regpt2 import __version__
from regpt2.base.console import figure, say
from regpt2.base.device import Precision, choose_compute, device_name, pick_device
from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.base.ranks.world import start_world
from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.model.files.load import KINDS, load_model
from regpt2.sampling.generate import generate
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.training.ranks.strategy import in_compute_type

RESAMPLES = 1000  # for standard errors that need a bootstrap: they are good to 2 %; the harness's 100,000 take minutes


@dataclass(frozen=True, kw_only=True)
class Options:
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
    options = parse(Options, arguments, "regpt2 harness")
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
        found = _run(context, options)
        if world.is_main:
            _show(found)
            if options.out is not None:
                about = {"model": loaded.source, "step": loaded.step, "device": device_name(world.device)}
                about |= {"precision": compute.precision, "torch": torch.__version__, "version": __version__}
                about |= {"lm_eval": importlib.metadata.version("lm_eval"), "limit": options.limit}
                kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot") if key in found}
                write_atomic(options.out, json.dumps({**about, **kept}, indent=2, default=str) + "\n")
    return 0


def _check(options: Options) -> None:
    """What can be told before any work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise Problem("regpt2 harness needs the package lm_eval, which is not installed: pip install 'regpt2[harness]'")
    if options.batch < 1 or options.limit < 0:
        raise UsageError(f"--batch {options.batch} must be at least 1, --limit {options.limit} at least 0 (= all).")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UsageError(f"--include-path {options.include_path} must be a folder with YAML files.")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")


def _run(context: EvalContext, options: Options) -> dict[str, Any]:
    """What the harness finds; empty on ranks but the first of each machine."""
    from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415  (an extra)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    manager = TaskManager(include_path=options.include_path)
    names = [name.strip() for name in options.tasks.split(",")]
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UsageError(f"--tasks: the harness has no {name!r}{did_you_mean(name, manager.all_tasks)}")
    try:
        found: dict[str, Any] | None = simple_evaluate(
            model=harness_model(context),
            tasks=names,
            task_manager=manager,
            limit=options.limit or None,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    except Problem:
        raise
    except Exception as error:  # a task may fail in any way: it is the work of others, and may fetch data
        raise Problem(f"the harness could not run {options.tasks}: {type(error).__name__}: {error}") from error
    return found or {}


def _show(found: dict[str, Any]) -> None:
    for task, figures in found["results"].items():
        say(f"{task}  (version {found['versions'].get(task)}, {found['n-shot'].get(task)}-shot)")
        for key, value in figures.items():
            metric, comma, how = key.partition(",")  # "acc,none": how answers were filtered before they were judged
            if comma and not metric.endswith("_stderr"):
                stderr = figures.get(f"{metric}_stderr,{how}")
                shown = f" +- {stderr:.3g}" if isinstance(stderr, float) else ""
                say(f"  {metric if how == 'none' else key:<14} {figure(value, 5)}{shown}")


def harness_model(context: EvalContext) -> Any:
    """The model as the harness's own API takes it: `lm_eval.simple_evaluate(model=harness_model(context), ...)`.

    With several ranks each one runs the harness on all examples; they share the work of scoring.
    """
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415  (an extra)

    class HarnessModel(Requests, TemplateLM):  # type: ignore[misc]
        """Ours first, the harness's for the rest."""

    return HarnessModel(context)


class Requests:
    """What the harness asks of a model, but for what its `TemplateLM` answers by itself."""

    def __init__(self, context: EvalContext) -> None:
        super().__init__()
        self.context = context
        self.encoding = context.need_tokenizer()
        self.max_length = context.context_size

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.encoding.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; `<|endoftext|>` in it is the one token, as for the harness's own models."""
        return self.encoding.encode_with_end_of_text(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of `max_length`; the last one reaches back to be as long."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), self.max_length):
                before = ids[max(0, start - self.max_length) : start] or [self.eot_token_id]
                pairs.append((before, ids[start : start + self.max_length]))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += log_probability
        return sums

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log-probability of each ending after its context, and whether each of its tokens is the likeliest."""
        if not all(after for _, after in pairs):
            raise Problem("the task has an ending without a token: nothing to score.")
        scored = score_endings(self.context, "harness", [Question(before, (after,)) for before, after in pairs])
        return list(zip((-scored.nats).flatten().tolist(), scored.greedy.flatten().tolist(), strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each prompt, up to the first of the strings that end it. Ranks take prompts in turn."""
        world = self.context.world
        with world.together():
            mine = [
                self._continue(*request.args, seed=number)
                for number, request in enumerate(requests)
                if number % world.size == world.rank
            ]
        shares = world.everyones(mine)
        return [shares[number % world.size][number // world.size] for number in range(len(requests))]

    def _continue(self, prompt: str, asked: dict[str, Any], *, seed: int) -> str:
        from lm_eval.models.utils import normalize_gen_kwargs  # noqa: PLC0415

        self.context.on_batch()
        wanted: dict[str, Any] = normalize_gen_kwargs(asked)
        n_new, gpt = wanted["max_gen_toks"], self.context.gpt
        if n_new >= self.max_length:
            raise Problem(f"the task wants {n_new:,} new tokens, which leave no prompt in {self.max_length:,}.")
        ids = self.tok_encode(prompt)[n_new - self.max_length :] or [self.eot_token_id]
        text = _Text(self.encoding, wanted["until"])
        device = self.context.world.device
        with suppress(_Ended):
            generate(
                gpt,
                torch.tensor([ids], device=device),
                n_new,
                temperature=wanted.get("temperature", float(wanted["do_sample"])),
                top_k=wanted.get("top_k", 0),
                top_p=wanted.get("top_p", 1.0),
                generator=torch.Generator(device).manual_seed(seed),
                never=self.encoding.textless,
                on_token=text.feed,
            )
        return text.so_far


class _Ended(Exception):
    """The text has come to one of the strings that end it."""


class _Text:
    """What has been generated, and whether that is the end."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self.tokenizer, self.until, self.so_far = tokenizer, [end for end in until if end], ""
        self.ids: list[int] = []

    def feed(self, new: Tensor) -> None:  # (1,)
        """Take the next token.

        Raises:
            _Ended: it is <|endoftext|>, or completes a string that ends the text; `so_far` is without.
        """
        if int(new) == self.tokenizer.eot:
            raise _Ended
        self.ids.append(int(new))
        whole = self.tokenizer.decode(self.ids)
        self.so_far = min((whole.split(end)[0] for end in self.until), key=len, default=whole)
        if self.so_far != whole:
            raise _Ended
