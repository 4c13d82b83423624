"""Checkpoints of a run. In: a run at a step; out: a checkpoint on its way to the disk, or a refusal before the run.

The newest are for a resume, each with the optimizer; the best is a model alone, of the lowest validation loss.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.base.files import make_dir, sha256_file, write_atomic
from regpt2.data.added_tokens import AddedTokens
from regpt2.model.files.contract import CONFIG, WEIGHTS, Vocabulary
from regpt2.model.files.tensors import read_tensors
from regpt2.model.weights import native
from regpt2.run.setup import RunState, TrainingRun
from regpt2.training import checkpoint
from regpt2.training.lora import adapter_files
from regpt2.training.optimizer import state_tensors
from regpt2.training.ranks.strategy import gather
from regpt2.training.saving.best_checkpoint import write_best

BASE = "base"  # the folder of a run with LoRA that keeps the weights it began with


def require_room(run: TrainingRun, first: int) -> None:
    """Refuse to start a run whose checkpoints the disk cannot hold."""
    config, every, last = run.config, run.config.save_every, run.config.max_steps
    frozen, learning = (
        sum(p.numel() for p in run.adapted.parameters() if p.requires_grad is wanted) for wanted in (False, True)
    )
    with run.world.together():
        if run.world.is_main and (every or config.keep_best):
            checkpoint.require_room(
                run.folder / "checkpoints",
                4 * frozen + (16 if config.optim.ema else 12) * learning,  # fp32 weights, two moments, an average
                keep=config.keep_checkpoints,
                saves_left=-(-last // every) - first // every if every else 0,
                best_bytes=4 * (frozen or learning) if config.keep_best else 0,
                once_bytes=4 * frozen if every and not first else 0,
            )


def keep_base(run: TrainingRun, state: RunState, first: int) -> None:
    """With LoRA: write the frozen weights once, as a model in `base/`. Adapters alone cannot resume without them.

    A checkpoint holds merged weights, from which the bits of the frozen ones cannot be computed.
    """
    if first or not (run.config.lora.rank and run.config.save_every):
        return
    with run.world.together():
        if run.world.is_main:
            make_dir(run.folder / BASE)
            model, base = run.model, run.folder / BASE
            write_atomic(base / CONFIG, native.config_json(model, _tokenizer(run)))
            write_atomic(base / WEIGHTS, save_tensors(native.tensors(model)))
            state.base_sha256 = sha256_file(base / WEIGHTS)


def read_base(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The frozen weights of a run with LoRA.

    Raises:
        CheckpointError: they are missing, or not those that its checkpoints were trained with.
    """
    path = folder / BASE / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it holds the frozen weights of this run; put it back to resume.")
    if (got := sha256_file(path)) != sha256:
        raise CheckpointError(
            f"{path} has the SHA-256 {got:.16}, expected {sha256:.16} by the checkpoints of this run; put "
            "that file back."
        )
    return read_tensors(path)


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
        run.check_replicas(step)
    # Here and not in the thread that writes: shards are gathered by an exchange, for which every rank has to be here.
    parameters = _parameters(run)
    moments = gather(state_tensors(run.optimizer, run.adapted) | (run.average.raw() if run.average else {}), world)
    if not world.is_main:
        return
    facts = _facts(run, state, step) | {
        "guard": state.guard.state(),
        "loss_scale": dataclasses.asdict(state.scale) if state.scale else None,
        "elapsed_s": state.elapsed_s,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "strategy": config.parallel.strategy,
    }
    others = {}
    if config.lora.rank:
        facts["base_sha256"] = state.base_sha256
        others = adapter_files(run.adapted, config.lora)
    run.saver.save(lambda: _snapshot(run, step, parameters, moments, facts, others))


def save_best(run: TrainingRun, state: RunState, step: int) -> None:
    """Start to write checkpoints/best from the model of this step, whose validation loss is the lowest so far.

    Every rank calls this, rank 0 writes. The ranks' weights are compared as before any save.
    """
    if run.config.parallel.check_every:
        run.check_replicas(step)
    parameters = _parameters(run)
    if not run.world.is_main:
        return
    facts = _facts(run, state, step) | {"val_loss": state.best.loss}
    run.saver.save(lambda: _snapshot(run, step, parameters, None, facts), write_best)


def _parameters(run: TrainingRun) -> dict[str, torch.Tensor]:
    """The weights to save, on rank 0: with optim.ema the averages, with LoRA merged ones. Every rank calls this."""
    if run.average is not None:
        return gather(run.average.tensors, run.world)
    model = run.plain() if run.config.lora.rank else run.model
    return gather(dict(model.named_parameters()), run.world)


def _facts(run: TrainingRun, state: RunState, step: int) -> dict[str, Any]:
    config = run.config
    return {
        "step": step,
        "seed": config.seed,
        "val_tokens": config.evals.val_tokens,
        "batch_tokens": config.batch.batch_tokens,
        "tokens": config.batch.tokens_until(step),
        "data_fingerprint": run.data.fingerprint,
        **({"init": state.origin} if state.origin else {}),
    }


def _snapshot(
    run: TrainingRun,
    step: int,
    parameters: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor] | None,
    facts: dict[str, Any],
    others: dict[str, bytes] | None = None,
) -> checkpoint.Snapshot:
    config_json = native.config_json(run.model, _tokenizer(run))
    tensors = native.tensors(run.model, parameters)
    return checkpoint.snapshot(step, config_json, tensors, moments, facts, run.saver.copies, others)


def _tokenizer(run: TrainingRun) -> Vocabulary:
    return Vocabulary(
        run.tokenizer.name,
        run.tokenizer.fingerprint,
        run.tokenizer.eot,
        run.tokenizer.vocab,
        added=run.tokenizer.added if isinstance(run.tokenizer, AddedTokens) else (),
        characters=run.tokenizer.characters,
    )
