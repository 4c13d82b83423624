"""Configuration is strict: every key, type and value that cannot be is refused, with its name and the mend."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt2.base.errors import ConfigError, Problem
from regpt2.config.run import RunConfig, SampleConfig
from regpt2.config.toml_file import differences, read_toml, to_toml


def toml(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stepps = 3", r"my.toml: unknown key 'max_stepps'; did you mean 'max_steps'\?"),
        (
            "[optim]\nlrr = 1.0",
            r"unknown key 'optim.lrr'; did you mean 'optim.lr'\?|unknown key 'optim.lrr'; did you mean 'lr'",
        ),
        ("[optm]\nlr = 1.0", r"unknown key 'optm'; did you mean 'optim'"),
        ('max_steps = "many"', r"max_steps = 'many' is a str, expected int"),
        ("max_steps = 3.5", r"max_steps = 3.5 is a float, expected int"),
        ("max_steps = true", r"max_steps = True is a bool, expected int"),
        ("max_steps = 0", r"max_steps = 0 must be at least 1"),
        ("save_every = -1", r"save_every = -1 must be at least 0"),
        ('resume = "maybe"', r"resume = 'maybe' must be one of 'auto', 'never', 'must'"),
        ("optim = 3", r"optim = 3 is a int, expected a table"),
        ("[optim]\nbetas = [0.9]", r"optim.betas = \[0.9\] is a list, expected a list of 2 values"),
        ("[optim]\nlr = -1.0", r"optim.lr = -1.0 must be above 0"),
        ("[optim]\nlr = nan", r"optim.lr = nan must be above 0"),
        ('[optim]\nname = "sgd"', r"optim: there is no 'sgd'"),
        ('[evals]\nnames = ["val_los"]', r"did you mean 'val_loss'"),
        ("[model]\nn_head = 5", r"model.n_embd = 768 must be a multiple of model.n_head = 5; the nearest is 770"),
        ("[model]\nblock_size = 512", r"batch.seq_len = 1024 is longer than model.block_size = 512"),
        ("max_steps = ", r"is not TOML"),
        ("max_steps = 1\nmax_steps = 2", r"is not TOML"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Problem, match=message) as caught:
        read_toml(toml(tmp_path, text))
    assert caught.value.exit_code == 2


def test_an_integer_may_stand_for_a_float(tmp_path: Path) -> None:
    config = read_toml(toml(tmp_path, "[optim]\nlr = 1"))
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)


@given(
    prompt=st.text(max_size=40),
    lr=st.floats(1e-9, 10.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    names=st.lists(st.just("val_loss"), max_size=2),
)
def test_any_config_survives_being_written(
    prompt: str, lr: float, betas: tuple[float, float], names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = RunConfig()
    config = dataclasses.replace(
        base,
        sample=SampleConfig(prompt=prompt),
        optim=dataclasses.replace(base.optim, lr=lr, betas=betas),
        evals=dataclasses.replace(base.evals, names=tuple(names)),
    )
    path = tmp_path_factory.mktemp("c") / "config.toml"
    try:
        text = to_toml(config).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    path.write_bytes(text)
    assert read_toml(path) == config


def test_differences_name_keys_by_section() -> None:
    base = RunConfig()
    other = dataclasses.replace(base, seed=1, optim=dataclasses.replace(base.optim, lr=1.0))
    assert differences(base, other) == {"seed": (1337, 1), "optim.lr": (6e-4, 1.0)}
    with pytest.raises(ConfigError):
        dataclasses.replace(base, log_every=0)
