"""EleutherAI's lm-evaluation-harness. In: a model and names of its tasks; out: what the harness finds.

The harness words the prompts and computes the metrics; scoring and generation are ours.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.sampling.generate import generate

RESAMPLES = 1000  # for standard errors that need a bootstrap: they are good to 2 %; the harness's 100,000 take minutes


def run_tasks(context: EvalContext, tasks: str, *, include_path: Path | None = None, limit: int = 0) -> dict[str, Any]:
    """What the harness finds on these tasks (separated by commas); empty on ranks but the first of each machine.

    Raises:
        UsageError: the harness has no such task.
        Problem: a task failed.
    """
    from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415  (an extra)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    manager = TaskManager(include_path=include_path)
    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UsageError(f"--tasks: the harness has no {name!r}{did_you_mean(name, manager.all_tasks)}")
    try:
        found: dict[str, Any] | None = simple_evaluate(
            model=harness_model(context),
            tasks=names,
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    except Problem:
        raise
    except Exception as error:  # a task is code of others and may download: it can fail in any way
        raise Problem(f"the harness could not run {tasks}: {type(error).__name__}: {error}") from error
    return found or {}


def harness_model(context: EvalContext) -> Any:
    """The model for the harness's own API: `lm_eval.simple_evaluate(model=harness_model(context), ...)`.

    With several ranks each one runs the harness on all examples; they share the work of scoring.
    """
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415  (an extra)

    class HarnessModel(Requests, TemplateLM):  # type: ignore[misc]
        """Ours first, the harness's for the rest."""

    return HarnessModel(context)


class Requests:
    """The requests of the harness that its `TemplateLM` leaves to a model."""

    def __init__(self, context: EvalContext) -> None:
        super().__init__()
        self.context = context
        self.encoding = context.need_tokenizer()
        self.max_length = context.context_size

    @property
    def eot_token_id(self) -> int:
        """The first token of a text that has no context."""
        return self.encoding.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; `<|endoftext|>` in it becomes one token, as in the harness's own models."""
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
            raise Problem("the task has an ending of no tokens, which cannot be scored.")
        scored = score_endings(self.context, "harness", [Question(before, (after,)) for before, after in pairs])
        return list(zip((-scored.nats).flatten().tolist(), scored.greedy.flatten().tolist(), strict=True))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each prompt, up to the first stop string. Ranks take prompts in turn."""
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
            raise Problem(
                f"the task asks for {n_new:,} new tokens: no room for a prompt in a context of {self.max_length:,}."
            )
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
    """The text has reached a stop string."""


class _Text:
    """The text generated up to now; it ends at a stop string."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self.tokenizer, self.until, self.so_far = tokenizer, [end for end in until if end], ""
        self.ids: list[int] = []

    def feed(self, new: Tensor) -> None:  # (1,)
        """Take the next token.

        Raises:
            _Ended: it is <|endoftext|>, or completes a stop string; `so_far` excludes both.
        """
        if int(new) == self.tokenizer.eot:
            raise _Ended
        self.ids.append(int(new))
        whole = self.tokenizer.decode(self.ids)
        self.so_far = min((whole.split(end)[0] for end in self.until), key=len, default=whole)
        if self.so_far != whole:
            raise _Ended
