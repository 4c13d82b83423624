"""Between updates: checkpoints, evaluations, samples. In: a run at a step; out: files, never a changed weight.

Nothing here may cost a run: a checkpoint comes before anything optional, and what fails is noted.
"""

import time
from collections.abc import Sequence

import torch

from regpt2.base import shelves
from regpt2.base.console import figure, say, warn
from regpt2.base.ranks.signals import Stopped
from regpt2.base.record.best import BestSoFar
from regpt2.base.record.metrics import read_events
from regpt2.config.run import RunConfig
from regpt2.evals import EvalContext
from regpt2.evals.scoring.assets import files_by_name
from regpt2.evals.scoring.context import scoring
from regpt2.model.language_model import LanguageModel
from regpt2.references.verdict import of_record
from regpt2.run.saving import save, save_best
from regpt2.run.setup import RunState, TrainingRun
from regpt2.sampling.generate import generate
from regpt2.training.ranks.strategy import in_compute_type


def due(step: int, every: int, last: int) -> bool:
    """Is something due at this step? Every `every` steps and at the last; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


def evals_due(config: RunConfig, step: int) -> tuple[str, ...]:
    """The evaluations of this step. They come before the first update too."""
    is_due = config.eval_every > 0 and (step == 0 or due(step, config.eval_every, config.max_steps))
    return config.evals.names if is_due else ()


def sample_due(config: RunConfig, step: int) -> bool:
    """Are samples due? Not before the first update: an untrained model writes noise."""
    return step > 0 and due(step, config.sample_every, config.max_steps)


def anything_due(config: RunConfig, step: int) -> bool:
    """Is there something to observe at this step?"""
    saving = due(step, config.save_every, config.max_steps)
    return saving or bool(evals_due(config, step)) or sample_due(config, step)


def observe(run: TrainingRun, state: RunState, step: int, *, done: Sequence[str] = ()) -> None:
    """Everything between updates, each at its own interval. Never changes a weight or the order of the data.

    `done`: names that an earlier start has recorded at this step (`MetricsLog.observed`).
    """
    config = run.config
    if step and due(step, config.save_every, config.max_steps):
        save(run, state, step)  # first: an evaluation may hang or run out of memory, and the model is then safe
    names = [name for name in evals_due(config, step) if name not in done and name not in run.without_data]
    sampling = sample_due(config, step) and "sample" not in done
    if not (names or sampling):
        return
    model = run.plain()
    for name in names:
        evaluate(run, state, model, step, name)
    if sampling and run.world.is_main:
        sample(run, model, step)
    run.watchdog.beat(f"step {step}, observed")


def observe_early_end(run: TrainingRun, state: RunState, step: int) -> None:
    """What is due after the last update, at a step that its own validation has made the last: save and sample."""
    if run.config.save_every:
        save(run, state, step)
    if not run.config.sample_every or sample_due(run.config, step):  # never, or written already
        return
    model = run.plain()
    if run.world.is_main:
        sample(run, model, step)


def evaluate(run: TrainingRun, state: RunState, model: LanguageModel, step: int, name: str) -> None:
    """One evaluation. An error in it is recorded, and training continues."""
    started_at = time.perf_counter()
    config = run.config

    def on_batch() -> None:
        run.watchdog.beat(f"step {step}, evaluation {name}")
        if run.stop.received:
            raise Stopped("asked to leave")

    entry, part = shelves.with_part("evals", name)
    context = EvalContext(
        model=in_compute_type(model, run.compute.dtype),
        world=run.world,
        data=None,
        mix=run.data.shares,
        seq_len=config.batch.seq_len,
        batch=config.batch.micro_batch,
        val_tokens=config.evals.val_tokens,
        on_batch=on_batch,
        tokenizer=run.tokenizer,
        files=files_by_name(config.evals.files, shelves.entries("evals")),
        limit=config.evals.limit,
        brief=True,
        part=part,
        options=shelves.own_options(config.evals, name),
    )
    try:
        with scoring(context):
            figures = entry.evaluate(context)
    except Exception as error:  # out of memory, no network, a bug in an entry: none may cost the run
        note(
            run, step, f"evaluation {name} failed at step {step} ({type(error).__name__}: {error}); training continues"
        )
        return
    state.results[name] = figures
    elapsed_s = time.perf_counter() - started_at
    run.metrics.log(
        "eval", step, eval=name, **figures, elapsed_s=elapsed_s, seen_tokens=config.batch.tokens_until(step)
    )
    if run.world.is_main:
        shown = ", ".join(f"{key} {figure(value)}" for key, value in figures.items() if value is not None)
        say(f"step {step:>6,} | {name}: {shown}")
    if name == "val_loss":
        if run.world.is_main:
            judge(run, state, step)
        take_in_validation(run, state, step, figures.get("loss"))


def take_in_validation(run: TrainingRun, state: RunState, step: int, loss: float | None) -> None:
    """Keep the model if its loss is the lowest so far. Every rank has the same figures: all save, or none."""
    before, state.best = state.best, state.best.after(step, loss)
    if state.best.step == before.step:
        return
    run.metrics.log("best", step, loss=state.best.loss, kept=run.config.keep_best)
    if run.config.keep_best:
        save_best(run, state, step)


def why_stop_early(config: RunConfig, best: BestSoFar) -> str:
    """Why a run ends here, after validations in a row that were not below the best; empty if it does not."""
    if not 0 < config.stop_after_worse <= best.n_worse:
        return ""
    return f"stopped early: {best.n_worse} validations in a row were not below {best.loss:.4f}, of step {best.step:,}"


def judge(run: TrainingRun, state: RunState, step: int) -> None:
    """Compare the run with its reference, from its record: so a resumed run knows what came before."""
    if run.metrics.path is None:
        return
    try:
        verdict = of_record(read_events(run.metrics.path), run.config.evals.verdict)
    except Exception as error:  # as with evaluations: none may cost the run
        note(run, step, f"no verdict at step {step} ({type(error).__name__}: {error}); training continues")
        return
    state.verdict = verdict
    if verdict is None or not verdict.worth_saying:
        return
    run.metrics.log("verdict", step, **verdict.event())
    if not verdict.finished:  # the last one is printed with the summary
        say(f"step {step:>6,} | verdict: {verdict.line()}")


def sample(run: TrainingRun, model: LanguageModel, step: int) -> None:
    """Let the model write, with a generator of its own: dropout and data do not notice."""
    options, tokenizer, device = run.config.sample, run.tokenizer, run.world.device
    ids = tokenizer.encode(options.prompt) or [tokenizer.start_id]
    room = model.context_size - len(ids)
    try:
        rows = generate(
            model,
            torch.tensor([ids] * options.n, device=device),
            min(options.max_new_tokens, room),
            temperature=options.temperature,
            top_k=options.top_k,
            never=tokenizer.textless,
            generator=torch.Generator(device).manual_seed(random_seed(run.config.seed, step, 0)),
            on_token=lambda _: run.watchdog.beat(f"step {step}, sample", counted=False),  # rank 0 alone
        )
    except Exception as error:
        note(run, step, f"sampling failed at step {step} ({type(error).__name__}: {error}); training continues")
        return
    texts = [tokenizer.decode(row) for row in rows.tolist()]
    run.metrics.log("sample", step, prompt=options.prompt, texts=texts)
    for text in texts[:1]:
        say(f"step {step:>6,} | sample: {text}")


def random_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of the random numbers of one micro-batch of one update, counted over all ranks."""
    return (seed * 1_000_003 + step) * 65_537 + micro_batch & 0x7FFF_FFFF_FFFF_FFFF


def note(run: TrainingRun, step: int, text: str) -> None:
    """Something that a reader of the record should know."""
    run.metrics.log("note", step, text=text)
    if run.world.is_main:
        warn(text)
