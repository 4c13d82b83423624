"""A run made ready: what would make it another run is refused at a resume, and leaves no trace."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RECIPE
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.run.loop import train


@pytest.fixture(scope="module")
def begun(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two updates, asked for more."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    config = load_recipe(str(folder / "tiny.toml"))
    config = dataclasses.replace(config, data=str(tiny_data), run=str(folder / "run"), eval_every=0, sample_every=0)
    train(dataclasses.replace(config, max_steps=2))
    return config


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("seed", 1337, 7),
        ("model.n_layer", 2, 3),
        ("model.n_head", 2, 4),
        ("model.n_embd", 32, 64),
        ("model.block_size", 32, 64),
        ("model.dropout", 0.1, 0.2),
        ("optim.name", "adamw", "lion"),
        ("batch.batch_tokens", 256, 128),
        ("batch.ramp_from", 0, 128),
        ("batch.seq_len", 32, 16),
        ("batch.order", "shuffled", "sequential"),
        ("batch.one_batch", False, True),
    ],
)
def test_what_would_make_it_another_run_is_refused_at_a_resume(
    key: str, before: object, now: object, begun: RunConfig
) -> None:
    section, _, name = key.rpartition(".")
    also: dict[str, Any] = {"ramp_tokens": 1000} if name == "ramp_from" else {}
    changed = {name: now, **also}
    if section:
        changed = {section: dataclasses.replace(getattr(begun, section), **changed)}
    saved = contents(Path(begun.run))
    with pytest.raises((ConfigError, CheckpointError), match=f"{name} (was|=) {before}.* {now}"):
        train(dataclasses.replace(begun, **changed))
    assert contents(Path(begun.run)) == saved
