"""A run resumed. In: a run made ready; out: its weights and state as the newest good checkpoint has them.

The best validation so far comes from the record, which is cut back to that checkpoint.
"""

import dataclasses

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.record.best import BestSoFar, best_of
from regpt2.base.record.metrics import read_events
from regpt2.config.toml_file import differences, read_toml
from regpt2.run.intervals import note
from regpt2.run.saving import read_base, save_best
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training import checkpoint
from regpt2.training.lora import load_adapters, read_adapters
from regpt2.training.optimizer import load_state_tensors
from regpt2.training.ranks.strategy import load_weights
from regpt2.training.ranks.weight_average import split_raw
from regpt2.training.saving.best_checkpoint import kept_step, recover_best
from regpt2.training.step import LossScale

# Another value of these makes another run: the batches of a step, or the weights, would not be the same.
_DEFINE_THE_RUN = (
    "seed", "model.", "optim.name", "optim.ema", "lora.",
    "batch.batch_tokens", "batch.ramp_", "batch.seq_len", "batch.order", "batch.one_batch",
)  # fmt: skip
_MAY_CHANGE_SILENTLY = (
    "recipe", "run", "data", "mix", "max_epochs", "dropout_by_size",
    "resume", "log_every", "eval_every", "sample_every", "save_every",
    "keep_checkpoints", "keep_best", "stop_after_worse", "verify_data", "check_memory", "track", "evals.verdict",
    "sample.", "parallel.check_every", "parallel.timeout_s",
)  # fmt: skip


def restore(run: TrainingRun, state: RunState) -> int:
    """Load the newest good checkpoint; returns the number of updates already made, 0 for a new run.

    Raises:
        CheckpointError, ConfigError: every checkpoint is damaged, or they are of another run.
    """
    newest = None
    with run.world.together():
        if run.world.is_main:  # it alone sets damaged ones aside; all ranks have to read the same one
            newest = checkpoint.newest_good(run.folder / "checkpoints")
    name = run.world.from_main(newest and newest.name)
    if name is None:
        return 0
    with run.world.together():
        found = checkpoint.read(run.folder / "checkpoints" / name)
        _check_same_run(run, found)
        moments, raw = split_raw(found.optimizer)
        if run.config.lora.rank:
            state.base_sha256 = found.state.get("base_sha256", "")
            load_weights(run.model, read_base(run.folder, state.base_sha256))
            load_adapters(run.adapted, read_adapters(found.folder))
        elif run.average is not None:
            run.average.load(found.model, raw, found.folder)
        else:
            load_weights(run.model, found.model)
        load_state_tensors(run.optimizer, run.adapted, moments)
    state.guard.load_state(found.state["guard"])
    if state.scale is not None and found.state["loss_scale"] is not None:
        state.scale = LossScale(**found.state["loss_scale"])
    state.earlier_s = found.state["elapsed_s"]
    state.saved_at = found.step
    state.origin = found.state.get("init", {})
    return found.step


def restore_best(run: TrainingRun, state: RunState, first: int) -> None:
    """The best validation up to step `first`, on every rank. Call it once the record is cut back.

    A kill between a validation and the save of its model is mended here, where the weights are those of that step.
    """
    checkpoints, path = run.folder / "checkpoints", run.metrics.path
    found, kept = BestSoFar(), None
    with run.world.together():
        if run.world.is_main:
            found = best_of(read_events(path)) if path and path.is_file() else found
            if checkpoints.is_dir():
                recover_best(checkpoints)
                kept = kept_step(checkpoints)
    best, kept = run.world.from_main([dataclasses.asdict(found), kept])
    state.best = BestSoFar(**best)
    if not run.config.keep_best or kept == state.best.step:
        return
    if state.best.step == first:
        save_best(run, state, first)
    elif kept is not None:
        of_this = (
            f"this run's best up to step {first:,} was step {state.best.step:,}" if state.best.step is not None else ""
        )
        note(
            run,
            first,
            f"{checkpoints / 'best'} is of step {kept:,}{f'; {of_this}' if of_this else ', of an earlier start'}. "
            "The next validation that is better replaces it",
        )
    else:
        lost = f"the model of the best validation so far, of step {state.best.step:,}, is not on the disk"
        note(run, first, f"{lost}; {checkpoints / 'best'} will be the next one that is better")


def _check_same_run(run: TrainingRun, found: checkpoint.Checkpoint) -> None:
    """Refuse to resume as another run than the one that was started."""
    if not (run.folder / "config.toml").is_file():
        raise CheckpointError(f"{run.folder / 'config.toml'} is missing; put it back, or use another --run folder.")
    before = read_toml(run.folder / "config.toml")
    if before.init != run.config.init:
        raise ConfigError(
            f"init was {before.init!r} in {run.folder} and is {run.config.init!r} now: that makes it another run. Set "
            "it back (a resume does not read that model again, so it may be gone), or use another --run folder."
        )
    shape = dataclasses.asdict(run.config.model)
    for key, value in found.config["model"].items():
        if shape.get(key) != value:
            raise CheckpointError(
                f"{found.folder} holds a model with {key} = {value}, the recipe has {shape.get(key)}; "
                "use the recipe of that run, or another --run folder."
            )
    if found.state["data_fingerprint"] != run.data.fingerprint:
        raise CheckpointError(
            f"{run.folder} was trained on data with fingerprint {found.state['data_fingerprint'][:16]}, {run.data} has "
            f"{run.data.fingerprint[:16]}; give the --data or --mix of that run, or another --run folder."
        )
    for key, (old, new) in differences(before, run.config).items():
        if key.startswith(_DEFINE_THE_RUN):
            raise ConfigError(
                f"{key} was {old} in {run.folder} and is {new} now: that makes it another run. "
                f"Set it back, or use another --run folder."
            )
        if run.world.is_main and not key.startswith(_MAY_CHANGE_SILENTLY):
            warn(f"{key} was {old} up to step {found.step} and is {new} from here on.")
