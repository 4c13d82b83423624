"""Checkpoints of a run. In: a run at a step; out: a checkpoint on its way to the disk, or a refusal before the run."""

import dataclasses

import torch

from regpt2.model.files.contract import TokenizerRef
from regpt2.model.weights import native
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training import checkpoint
from regpt2.training.optimizer import state_tensors
from regpt2.training.ranks.replicas import check_replicas
from regpt2.training.ranks.strategy import gather


def require_room(run: TrainingRun, first: int) -> None:
    """Refuse to start a run whose checkpoints the disk cannot hold."""
    every, last = run.config.save_every, run.config.max_steps
    with run.world.together():
        if run.world.is_main and every:
            checkpoint.require_room(
                run.folder / "checkpoints",
                12 * sum(p.numel() for p in run.model.parameters()),  # fp32 weights and AdamW's two moments
                keep=run.config.keep_checkpoints,
                saves_left=-(-last // every) - first // every,
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
    facts = {
        "step": step,
        "seed": config.seed,
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": config.batch.batch_tokens,
        "tokens": config.batch.tokens_until(step),
        "data_fingerprint": run.data.fingerprint,
        "guard": state.guard.state(),
        "loss_scale": dataclasses.asdict(state.scale) if state.scale else None,
        "elapsed_s": state.elapsed_s,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
    }
    tokenizer = TokenizerRef(
        run.tokenizer.name,
        run.tokenizer.fingerprint,
        added=getattr(run.tokenizer, "added", ()),
        characters=run.tokenizer.characters,
    )
    run.saver.save(
        lambda: checkpoint.snapshot(
            step,
            native.config_json(run.model.config, tokenizer, run.model.trained_seq_len),
            native.tensors(run.model, parameters),
            moments,
            facts,
            run.saver.copies,
        )
    )
