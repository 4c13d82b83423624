"""Disk space of a run. In: a configuration; out: bytes of data and checkpoints, and which disks lack room for them."""

import os
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.errors import Problem
from regpt2.base.files import free_bytes, nearest_folder
from regpt2.config.run import RunConfig
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.sources.plan import InputFile, Part, Plan, Slice
from regpt2.data.tokens.manifest import TOKEN_BYTES
from regpt2.training.memory import FP32, Setup


def checkpoint_bytes(setup: Setup) -> int:
    """Of one checkpoint: fp32 weights, LoRA's adapters, the optimizer's state; with optim.ema the weights twice."""
    copies = 2 if setup.optim.ema else 1
    return FP32 * (copies * setup.n_params + setup.n_adapters) + setup.state_bytes


def n_saves(config: RunConfig) -> int:
    """Checkpoints that a whole run saves."""
    return -(-config.max_steps // config.save_every) if config.save_every else 0


def most_checkpoints(config: RunConfig) -> int:
    """Checkpoints on the disk at most: a new one is written before the oldest is removed."""
    saves, kept = n_saves(config), config.keep_checkpoints
    return min(saves, kept + 1) if kept else saves


def best_bytes(config: RunConfig, setup: Setup) -> int:
    """Of the best checkpoint, fp32 weights alone: two, since a new one is written before the old one is removed."""
    return 2 * FP32 * setup.n_params if config.keep_best else 0


def run_bytes(config: RunConfig, setup: Setup) -> int:
    """Of all checkpoints of a run, at most; with LoRA also of the frozen weights, which are kept once."""
    frozen = FP32 * setup.n_params * bool(setup.lora.rank and config.save_every)
    return most_checkpoints(config) * checkpoint_bytes(setup) + best_bytes(config, setup) + frozen


@dataclass(frozen=True)
class DataNeed:
    """Disk space of the data."""

    shards_bytes: int
    missing_bytes: int  # still to be written, with the working space of `prepare`; 0: the data are prepared
    how: str


def data_need(config: RunConfig) -> DataNeed:
    """Of the data folder if it exists, else by the tokens that the run reads, each used once."""
    n_tokens = config.batch.tokens_until(config.max_steps)
    try:
        with open_mixture(read_shares(config.data, config.mix)) as data:
            return DataNeed(data.n_tokens * TOKEN_BYTES, 0, f"prepared: {data.plan(n_tokens)}")
    except (Problem, OSError):  # not prepared yet, or on another machine
        pass
    if config.batch.one_batch:
        return DataNeed(config.batch.batch_tokens * TOKEN_BYTES, 0, "one batch of any data")
    # Sizes of FineWeb-Edu's files: 2.0 GB with 0.71B tokens each; one worker.
    n_files = max(1, round(n_tokens / 710e6))
    share = n_tokens / n_files / 710e6
    pieces = [InputFile("", f"{i}.parquet", int(2.04e9 * share), 0, url="-") for i in range(n_files)]
    plan = Plan(tuple(Part((Slice(file),), file.n_bytes) for file in pieces), "", "", n_tokens=int(n_tokens / 1.05))
    space = Space(plan, "gpt2", 100_000_000, 1, None)
    shards_bytes = n_tokens * TOKEN_BYTES
    return DataNeed(shards_bytes, space.most_bytes, "not prepared yet; each token used once, prepared by one worker")


def disk_lacks(config: RunConfig, data: DataNeed, checkpoints_bytes: int) -> list[str]:
    """A line for each disk of this machine that has too little space, with the bytes needed and free."""
    needs: dict[int, list[tuple[Path, int]]] = {}
    for folder, n_bytes in ((Path(config.data or "."), data.missing_bytes), (Path(config.run), checkpoints_bytes)):
        needs.setdefault(os.stat(nearest_folder(folder)).st_dev, []).append((folder, n_bytes))
    lacks = []
    for wanted in needs.values():
        need, free = sum(n_bytes for _, n_bytes in wanted), free_bytes(wanted[0][0])
        if need > free:
            folders = " and ".join(str(folder) for folder, n_bytes in wanted if n_bytes)
            lacks.append(f"{folders} need {need / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free")
    return lacks
