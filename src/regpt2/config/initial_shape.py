"""A run from existing weights. In: a recipe's table, and what options change in it; out: it with the model's shape."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regpt2.config.run import TO_BE_NAMED, RunConfig
from regpt2.data.loader import BatchConfig
from regpt2.model.files.load import peek_model
from regpt2.model.initial_weights import require_fit
from regpt2.training import checkpoint

_OF_THE_RECIPE = ("dropout", "vocab_multiple")  # settings of training, which some formats of the same weights lack


def resumes(run: str) -> bool:
    """Does the run have a checkpoint? Then its model is what it trains further, and `init` is not read again."""
    return bool(checkpoint.folders(Path(run) / "checkpoints"))


def with_shape(table: dict[str, Any], changed: Mapping[str, Any], run: str) -> dict[str, Any]:
    """A recipe's table, with the shape of the model that `init` names under what the recipe states of `model`.

    Args:
        table: as in the TOML file; without `init`, here or in `changed`, it is returned as it is.
        changed: by section, what options set afterwards, which replaces what the recipe states.
        run: the run folder, if neither names one.

    Raises:
        ConfigError: the recipe states another shape.
        UsageError, CheckpointError, DownloadError: the model is missing or damaged, as in `peek_model`.
    """
    init, stated = changed.get("init", table.get("init")), table.get("model", {})
    batch, run = table.get("batch", {}), changed.get("run") or table.get("run") or run
    places, sections = (init, run), (stated, batch)
    if init in ("", None, TO_BE_NAMED) or not all(isinstance(one, str | Path) for one in places):
        return table  # a wrong type is refused where the table is read
    if not all(isinstance(one, dict) for one in sections):
        return table
    init, run = str(init), str(run)
    peeked, now = peek_model(run if resumes(run) else init), {key: changed.get(key, {}) for key in ("model", "batch")}
    stated = {key: value for key, value in stated.items() if key not in now["model"]}
    require_fit(peeked.config, _compared(stated, run), peeked.source)
    shape = {key: value for key, value in asdict(peeked.config).items() if key not in _OF_THE_RECIPE}
    model = {**shape, **stated}
    if isinstance(stated.get("vocab_size"), int):
        model["vocab_size"] = max(shape["vocab_size"], stated["vocab_size"])
    sizes = [model["block_size"], now["model"].get("block_size")]
    longest = min(size for size in sizes if isinstance(size, int) and size > 0)
    if "seq_len" not in batch or "seq_len" in now["batch"]:  # else it is the recipe's word, and is refused if too long
        given = batch.get("seq_len", BatchConfig.seq_len)
        batch = {**batch, "seq_len": min(longest, given) if isinstance(given, int) else given}
    return {**table, "init": init, "model": model, "batch": batch}


def require_shape(default: RunConfig, config: RunConfig) -> None:
    """Refuse options by which the model is no longer of the shape that `init` gave to `default`.

    Raises:
        ConfigError: it names both values.
    """
    if config.init and config.init != TO_BE_NAMED:
        source = config.run if resumes(config.run) else config.init
        require_fit(default.model, _compared(asdict(config.model), config.run), source)


def _compared(stated: dict[str, Any], run: str) -> dict[str, Any]:
    """A resumed run may have more tokens than the model that it began from had, whose number the recipe may state."""
    return {key: value for key, value in stated.items() if key != "vocab_size" or not resumes(run)}
