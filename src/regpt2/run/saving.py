"""Checkpoints of a run. In: a run at a step; out: a checkpoint on its way to the disk, or a refusal before the run.

The newest are for a resume, each with the optimizer; the best is a model alone, of the lowest validation loss.
"""

import dataclasses
from typing import Any

import torch

from regpt2.model.files.contract import TokenizerRef
from regpt2.model.weights import native
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training import checkpoint
from regpt2.training.optimizer import state_tensors
from regpt2.training.ranks.replicas import check_replicas
from regpt2.training.ranks.strategy import gather
from regpt2.training.saving.best_checkpoint import write_best


def require_room(run: TrainingRun, first: int) -> None:
    """Refuse to start a run whose checkpoints the disk cannot hold."""
    config, every, last = run.config, run.config.save_every, run.config.max_steps
    n_weights = sum(p.numel() for p in run.model.parameters())
    with run.world.together():
        if run.world.is_main and (every or config.keep_best):
            checkpoint.require_room(
                run.folder / "checkpoints",
                12 * n_weights,  # fp32 weights and AdamW's two moments
                keep=config.keep_checkpoints,
                saves_left=-(-last // every) - first // every if every else 0,
                best_bytes=4 * n_weights if config.keep_best else 0,
            )


def save(run: TrainingRun, state: RunState, step: int) -> None:
    """Start a checkpoint of this step; returns once everything is copied. Every rank calls this, rank 0 writes.

    Raises:
        Problem: the ranks' weights have drifted apart.
    """
    config, world = run.config, run.world
    if step == state.saved_at:
        return
    state.saved_at = step
    if config.parallel.check_every:  # or a rank's flipped bit would be saved, and every resume would spread it
        check_replicas(run.model, world, step)
    # Here and not in the thread that writes: shards are gathered by an exchange, for which every rank has to be here.
    parameters = gather(dict(run.model.named_parameters()), world)
    moments = gather(state_tensors(run.optimizer, run.model), world)
    if not world.is_main:
        return
    facts = _facts(run, step) | {
        "guard": state.guard.state(),
        "loss_scale": dataclasses.asdict(state.scale) if state.scale else None,
        "elapsed_s": state.elapsed_s,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
    }
    run.saver.save(lambda: _snapshot(run, step, parameters, moments, facts))


def save_best(run: TrainingRun, state: RunState, step: int) -> None:
    """Start to write checkpoints/best from the model of this step, whose validation loss is the lowest so far.

    Every rank calls this, rank 0 writes. The ranks' weights are compared as before any save.
    """
    if run.config.parallel.check_every:
        check_replicas(run.model, run.world, step)
    parameters = gather(dict(run.model.named_parameters()), run.world)
    if not run.world.is_main:
        return
    facts = _facts(run, step) | {"val_loss": state.best.loss}
    run.saver.save(lambda: _snapshot(run, step, parameters, None, facts), write_best)


def _facts(run: TrainingRun, step: int) -> dict[str, Any]:
    config = run.config
    return {
        "step": step,
        "seed": config.seed,
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": config.batch.batch_tokens,
        "tokens": config.batch.tokens_until(step),
        "data_fingerprint": run.data.fingerprint,
    }


def _snapshot(
    run: TrainingRun,
    step: int,
    parameters: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor] | None,
    facts: dict[str, Any],
) -> checkpoint.Snapshot:
    tokenizer = TokenizerRef(run.tokenizer.name, run.tokenizer.fingerprint, characters=run.tokenizer.characters)
    config_json = native.config_json(run.model.config, tokenizer, run.model.trained_seq_len)
    tensors = native.tensors(run.model, parameters)
    return checkpoint.snapshot(step, config_json, tensors, moments, facts, run.saver.copies)
